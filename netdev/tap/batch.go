package tap

import (
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/internal/sys/uring"
	"github.com/vhostd/vhostd/zerocopy"
)

const (
	// batchFrames is how many frames one system call hands over.
	batchFrames = 64
	// batchLeast is the number of frames from which on that is cheaper than a writev for each. Measured, docs/perf/2026-11-22-tap.md: two
	// cost up to 9 % more, three 3 to 6 % less, 32 of 1514 bytes 27 to 34 % less.
	batchLeast = 3
)

// errBounded: a queue whose frames have to be written one by one (see the package comment).
var errBounded = errors.New("its send buffer has a bound, and frames behind one that is refused would overtake it")

// batcher writes frames of a queue many at a time, through an io_uring. It belongs to the transmitq's worker.
//
//	fill: [private header][guest page]... of each frame   Submit: one system call   settle: what became of each
type batcher struct {
	ring   *uring.Ring
	least  int // frames
	hdrs   [batchFrames][hdrSize]byte
	iovs   [batchFrames]sys.Iovecs
	errnos [batchFrames]syscall.Errno
}

// newBatcher makes a batcher for fd, for batches of least frames and more.
func newBatcher(fd, least int) (*batcher, error) {
	if n, err := sys.TunSendBuffer(fd); err != nil || n < sys.TunUnbounded {
		return nil, errors.Join(errBounded, err)
	}
	ring, err := uring.New(batchFrames, batchFrames)
	if err != nil {
		return nil, err
	}
	b := &batcher{ring: ring, least: least}
	if err = ring.SetFile(fd); err == nil {
		err = b.probe()
	}
	if err != nil {
		return nil, errors.Join(err, b.close())
	}
	return b, nil
}

// probe finds out whether the ring can write without waiting, by a write that no tap takes: it is shorter than a header.
func (b *batcher) probe() error {
	var short sys.Iovecs
	short.Add(make([]byte, 1))
	b.ring.WritevFile(short.Pieces(), 0)
	if _, err := b.ring.Submit(); err != nil {
		return err
	}
	b.collect(1)
	if b.errnos[0] == unix.EOPNOTSUPP {
		return fmt.Errorf("io_uring: writing without waiting: %w", b.errnos[0])
	}
	return nil
}

func (b *batcher) close() error { return b.ring.Close() }

// sendBatch sends the first frames of bufs, up to batchFrames, and returns how many it took. full: the send buffer has no room for the next.
func (q *queue) sendBatch(bufs []*zerocopy.Buffer) (n int, full bool) {
	b := q.send.batch
	n = q.fill(bufs[:min(len(bufs), batchFrames)])
	lost, err := b.ring.Submit()
	n -= lost
	b.collect(n)
	if err != nil {
		q.stopBatches()
	}
	return q.settle(bufs[:n], b.errnos[:n])
}

// fill queues writes of the first of bufs and returns their number. There is room for one frame of too many fragments. Guest memory can fault
// under gather, so nothing is queued before the last of them.
func (q *queue) fill(bufs []*zerocopy.Buffer) (n int) {
	b, flat := q.send.batch, false
	for _, buf := range bufs {
		if len(buf.Segs()) > maxFrags {
			if flat {
				break
			}
			flat = true
		}
		q.gather(&b.iovs[n], b.hdrs[n][:q.hdr], buf)
		n++
	}
	for i := range n {
		b.ring.WritevFile(b.iovs[i].Pieces(), uint64(i))
	}
	return n
}

// collect notes what became of the n writes that were submitted. The kernel has done them when Submit returns, so there is nothing to wait for;
// if it ever had not, their pages would be in use until it has.
func (b *batcher) collect(n int) {
	for got := 0; got < n; {
		c, ok := b.ring.Next()
		if ok {
			b.errnos[c.Data] = c.Errno()
			got++
			continue
		}
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(b.ring.FD()), Events: unix.POLLIN}}, -1)
	}
}

// settle releases the frames that are done with, and returns how many are. A frame that was refused for want of room stays, and so do
// all behind it, unless one of them got through: nobody may overtake, so then it is lost instead. That happens once, when the send
// buffer got a bound after all: from then on frames are written one by one.
func (q *queue) settle(bufs []*zerocopy.Buffer, errnos []syscall.Errno) (n int, full bool) {
	last := len(errnos) - 1
	for last >= 0 && errnos[last] != 0 {
		last--
	}
	start := 0 // bufs[start:i] are sent and not released
	for i, errno := range errnos {
		if errno == 0 {
			continue
		}
		zerocopy.ReleaseAll(bufs[start:i], zerocopy.Copied)
		if errno == unix.EAGAIN {
			q.stopBatches()
			if i > last {
				return i, true
			}
		}
		q.drop(bufs[i])
		start = i + 1
	}
	zerocopy.ReleaseAll(bufs[start:], zerocopy.Copied)
	return len(bufs), false
}

// stopBatches has all frames from now on written one by one.
func (q *queue) stopBatches() {
	if q.send.batch != nil {
		_ = q.send.batch.close()
		q.send.batch = nil
	}
}
