package tap

import (
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// maxFrags is how many fragments go to the kernel as they are, with the header in front.
const maxFrags = sys.MaxIovecs - 1

// sender writes frames to a queue. It belongs to the transmitq's worker.
type sender struct {
	hdr     [hdrSize]byte
	iov     sys.Iovecs
	linear  []byte   // for frames of more than maxFrags fragments
	batch   *batcher // or nil: frames are written one by one
	dropped atomic.Uint64
}

// Send writes frames; see netdev.Queue. The kernel has copied a frame when its write returns.
func (q *queue) Send(bufs []*zerocopy.Buffer) int {
	sent := 0
	for q.send.batch != nil && len(bufs)-sent >= q.send.batch.least {
		n, full := q.sendBatch(bufs[sent:])
		if sent += n; full {
			return sent
		}
	}
	return sent + q.sendEach(bufs[sent:])
}

// sendEach is Send with a system call for every frame.
func (q *queue) sendEach(bufs []*zerocopy.Buffer) int {
	start := 0 // bufs[start:i] are sent and not released
	for i, b := range bufs {
		errno := q.write(b)
		if errno == 0 {
			continue
		}
		zerocopy.ReleaseAll(bufs[start:i], zerocopy.Copied)
		if errno == unix.EAGAIN {
			return i
		}
		q.drop(b)
		start = i + 1
	}
	zerocopy.ReleaseAll(bufs[start:], zerocopy.Copied)
	return len(bufs)
}

// drop is the end of a frame that the kernel refuses now (a bad header, an interface that is down or gone, no memory): it would refuse it
// again, or take it too late.
func (q *queue) drop(b *zerocopy.Buffer) {
	q.send.dropped.Add(1)
	b.Release(zerocopy.Dropped)
}

func (q *queue) write(b *zerocopy.Buffer) syscall.Errno {
	s := &q.send
	q.gather(&s.iov, s.hdr[:q.hdr], b)
	_, errno := s.iov.Writev(q.fd)
	return errno
}

// gather makes v the pieces of a frame, with its header in hdr, the kernel's if it wants one.
func (q *queue) gather(v *sys.Iovecs, hdr []byte, b *zerocopy.Buffer) {
	v.Reset()
	if len(hdr) > 0 {
		h := outgoing(b.Header(), b.Len())
		h.Encode(hdr)
		v.Add(hdr)
	}
	segs := b.Segs()
	if len(segs) > maxFrags {
		v.Add(q.send.flatten(b))
		return
	}
	for i := range segs {
		v.Add(segs[i].Mem)
	}
}

// outgoing is the guest's header as the kernel gets it: only what a driver may say (virtio-v1.2 §5.1.6.2.1), and hdr_len, a hint that
// the device must not rely on, no longer than the frame, for which the kernel would refuse it.
func outgoing(hdr virtio.NetHdr, frameLen int) virtio.NetHdr {
	hdr.Flags &= virtio.NetHdrNeedsCsum
	hdr.HdrLen = uint16(min(int(hdr.HdrLen), frameLen))
	hdr.NumBuffers = 0
	return hdr
}

// flatten copies a frame of too many fragments into private memory.
func (s *sender) flatten(b *zerocopy.Buffer) []byte {
	if len(s.linear) < b.Len() {
		s.linear = make([]byte, max(b.Len(), virtio.MaxFrame))
	}
	return s.linear[:b.CopyTo(s.linear[:b.Len()], 0)]
}

// Reap does nothing: no frame is left when Send returns.
func (q *queue) Reap() {}

// SendFD is the queue's descriptor: writable while the socket buffer has room.
func (q *queue) SendFD() int { return q.fd }
