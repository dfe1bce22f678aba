package tap

import (
	"fmt"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

const (
	// stageSize is the length of the stage in bytes: longer than any frame, so that a read that fills it was cut.
	stageSize = virtio.MaxFrame + 1024
	// minWant is the least that a read is offered of the posted buffers, in bytes: a frame of 1500 bytes with Ethernet and VLAN headers.
	minWant = 1500 + 14 + 4
	// wantStep rounds larger offers, in bytes.
	wantStep = 4096
	// wantWindow is the number of frames after which the offer shrinks to the largest of them. A frame that is longer than the offer
	// costs a copy, and every segment that is offered in vain costs the time to name it to the kernel and to have it checked there.
	wantWindow = 256
	// maxSegs bounds the segments of a read; the header and the stage come on top.
	maxSegs = sys.MaxIovecs - 2
)

// receiver reads frames from a queue. It belongs to the receiveq's worker, between SetOffloads.
type receiver struct {
	accept  offload.Set
	macvtap bool
	hdr     [hdrSize]byte // of the frame that was read, as the kernel wrote it
	iov     sys.Iovecs
	room    int // bytes of posted memory in the last read

	want, peak, seen int // see wantWindow

	stage  []byte
	staged int           // bytes of the frame that waits in the stage; 0 for none
	held   virtio.NetHdr // and its header
	frags  [1][]byte
	idles  uint
	lost   atomic.Uint64
}

// Recv reads frames into p; see netdev.Queue.
func (q *queue) Recv(p *zerocopy.Posted, limit int) (n int, idle bool, err error) {
	r := &q.recv
	if r.staged > 0 {
		switch r.unstage(p) {
		case zerocopy.NoRoom:
			return 0, false, nil
		case zerocopy.Written:
			n++
		}
	}
	// Frames that get lost do not count for the caller, who takes n = 0 for the end of something: they have a limit of their own,
	// after which the descriptor, still readable, brings the caller back.
	for lost := 0; n < limit; {
		segs, total := p.Space(p.HdrLen() + r.want)
		if total == 0 {
			return n, false, nil
		}
		got, errno := q.read(segs, p.HdrLen())
		res := zerocopy.TooBig
		switch errno {
		case 0:
			res = r.place(p, segs, got-q.hdr)
		case unix.EAGAIN:
			return n, true, q.alive()
		case unix.EFAULT, unix.ENOMEM, unix.ENOBUFS, unix.EINVAL:
			// That frame's end. Guest memory that is not there is EFAULT from a macvtap; a tap claims to have written, and the
			// header's write faults.
			r.lost.Add(1)
		default:
			return n, false, fmt.Errorf("reading from the tap's queue: %w (is the interface gone?)", errno)
		}
		switch res {
		case zerocopy.NoRoom:
			return n, false, nil
		case zerocopy.Written:
			n++
		case zerocopy.TooBig:
			if lost++; lost == limit {
				return n, true, nil
			}
		}
	}
	return n, false, nil
}

// read reads a frame: its header into r.hdr, its first bytes into segs, without their first hdrLen, and the rest into the stage, as if
// they had been in the stage all along.
func (q *queue) read(segs [][]byte, hdrLen int) (int, syscall.Errno) {
	r := &q.recv
	r.iov.Reset()
	r.iov.Add(r.hdr[:q.hdr])
	skip, room, used := hdrLen, 0, 0
	for _, s := range segs {
		if skip >= len(s) {
			skip -= len(s)
			continue
		}
		s = s[skip:]
		skip = 0
		r.iov.Add(s)
		room += len(s)
		if used++; room >= r.want || used == maxSegs {
			break
		}
	}
	r.room = room
	if room < len(r.stage) {
		r.iov.Add(r.stage[room:])
	}
	return r.iov.Readv(q.fd)
}

// place hands a frame of m bytes that was read to the guest. NoRoom: it waits in the stage.
func (r *receiver) place(p *zerocopy.Posted, segs [][]byte, m int) zerocopy.WriteResult {
	if m <= 0 || m >= len(r.stage) {
		r.lost.Add(1)
		return zerocopy.TooBig
	}
	hdr := virtio.DecodeNetHdr(r.hdr[:])
	if !r.accept.Has(offload.Csum) {
		hdr.Flags &^= virtio.NetHdrDataValid // virtio-v1.2 §5.1.6.4.1: no flags without GUEST_CSUM
	}
	r.learn(m)
	if m <= r.room && r.accept.Takes(hdr) {
		hdr.EncodeInto(segs, p.HdrLen())
		p.Commit(p.HdrLen() + m)
		return zerocopy.Written
	}
	gather(r.stage[:min(m, r.room)], segs, p.HdrLen())
	r.staged, r.held = m, hdr
	return r.unstage(p)
}

// unstage writes the frame in the stage to the guest.
func (r *receiver) unstage(p *zerocopy.Posted) zerocopy.WriteResult {
	r.frags[0] = r.stage[:r.staged]
	res := p.Write(r.held, r.frags[:])
	if res != zerocopy.NoRoom {
		r.staged = 0
	}
	return res
}

// learn adapts the offer of the next reads to a frame of m bytes.
func (r *receiver) learn(m int) {
	r.peak = max(r.peak, m)
	if r.seen++; m > r.want || r.seen == wantWindow {
		r.want = minWant
		if r.peak > minWant {
			r.want = (r.peak + wantStep - 1) &^ (wantStep - 1)
		}
		r.peak, r.seen = 0, 0
	}
}

// gather copies bytes from segs to dst, from offset skip on.
func gather(dst []byte, segs [][]byte, skip int) {
	for ; len(dst) > 0; segs = segs[1:] {
		if skip >= len(segs[0]) {
			skip -= len(segs[0])
			continue
		}
		dst = dst[copy(dst, segs[0][skip:]):]
		skip = 0
	}
}

// aliveEvery is the number of idle reads of a macvtap between two looks whether it is still there.
const aliveEvery = 64

// alive returns an error when a macvtap has gone: unlike a tap's, its descriptor does not tell by the read.
func (q *queue) alive() error {
	r := &q.recv
	if !r.macvtap {
		return nil
	}
	if r.idles++; r.idles%aliveEvery != 0 {
		return nil
	}
	if _, _, err := sys.TunGetIff(q.fd); err != nil {
		return fmt.Errorf("the macvtap interface is gone: %w", err)
	}
	return nil
}

// RecvFD is the queue's descriptor: readable while frames wait.
func (q *queue) RecvFD() int { return q.fd }
