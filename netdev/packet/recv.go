package packet

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
	addrLen = 12 // bytes of the Ethernet addresses, behind which a VLAN tag lies
	tagLen  = 4
	// aliveEvery is the number of idle looks at the ring between two at the socket's error, which poll tells of and the ring does not.
	aliveEvery = 64
)

// receiver empties the receive ring. It belongs to the receiveq's worker, between SetOffloads.
type receiver struct {
	q      *queue
	accept offload.Set
	slots  []slot
	next   int
	frags  [3][]byte
	tag    [tagLen]byte

	// For frames in the socket's queue.
	hdr    [virtio.NetHdrSizeLegacy]byte
	iov    sys.Iovecs
	stage  []byte        // one of those that cannot go to the guest as they are
	staged int           // bytes of the frame in the stage that waits for the guest; 0 for none
	held   virtio.NetHdr // and its header
	tagged bool          // and whether tag belongs to it

	idles   uint
	monitor int // tells of changes of interfaces while ours is down; -1 while it is up
	lost    atomic.Uint64
}

func (r *receiver) start(q *queue, slots []slot) {
	r.q, r.slots, r.next, r.monitor, r.staged = q, slots, 0, -1, 0
	if r.stage == nil {
		r.stage = make([]byte, virtio.MaxFrame)
	}
}

// abandon forgets the ring, and counts what waits there.
func (r *receiver) abandon() {
	for i := range r.slots {
		if r.slots[i].is(unix.TP_STATUS_USER) {
			r.lost.Add(1)
		}
	}
	if r.staged > 0 {
		r.lost.Add(1)
	}
	_ = r.watch(false) // closing cannot fail
	r.slots, r.staged = nil, 0
}

// Recv moves frames from the ring into p; see netdev.Queue.
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
	if len(r.slots) == 0 {
		return n, true, nil // the pair is not in use
	}
	// Frames that get lost do not count for the caller, who takes n = 0 for the end of something: they have a limit of their own,
	// after which the descriptor, still readable, brings the caller back.
	for lost := 0; n < limit; {
		s := &r.slots[r.next]
		status := s.load()
		if status&unix.TP_STATUS_USER == 0 {
			return n, true, r.alive()
		}
		switch r.place(p, s, status) {
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

// place hands the frame in the next slot to the guest, and the slot to the kernel. NoRoom: the frame waits, here or in the stage.
func (r *receiver) place(p *zerocopy.Posted, s *slot, status uint32) zerocopy.WriteResult {
	m, at := s.u32(offLen), int(s.u16(offMAC))
	var hdr virtio.NetHdr
	if n := r.q.dev.header; n > 0 && at >= n {
		hdr = virtio.DecodeNetHdr(s.mem[at-n : at])
	}
	if !r.accept.Has(offload.Csum) {
		hdr.Flags &^= virtio.NetHdrDataValid // virtio-v1.2 §5.1.6.4.1: no flags without GUEST_CSUM
	}
	tagged := status&unix.TP_STATUS_VLAN_VALID != 0
	if tagged {
		hdr = r.retag(s, status, hdr)
	}
	var res zerocopy.WriteResult
	switch incomplete := r.incomplete(status, m); {
	case status&unix.TP_STATUS_COPY != 0:
		return r.large(p, s, hdr, m, tagged, incomplete)
	case incomplete, m > s.u32(offSnapLen), m < minFrame:
		r.lost.Add(1)
		res = zerocopy.TooBig
	default:
		res = r.write(p, hdr, s.mem[at:at+m], tagged)
	}
	if res != zerocopy.NoRoom {
		r.free(s)
	}
	return res
}

func (r *receiver) free(s *slot) {
	s.store(unix.TP_STATUS_KERNEL)
	if r.next++; r.next == len(r.slots) {
		r.next = 0
	}
}

// incomplete tells whether a frame of m bytes leaves something to do, and no header says what: it was put together of several, or has
// only part of its checksum.
func (r *receiver) incomplete(status uint32, m int) bool {
	d := r.q.dev
	return d.header == 0 && (m > d.mtu+etherMax || status&unix.TP_STATUS_CSUMNOTREADY != 0)
}

// retag makes the VLAN tag that the kernel took out of the frame, and returns the header of the frame with it.
func (r *receiver) retag(s *slot, status uint32, hdr virtio.NetHdr) virtio.NetHdr {
	tpid := uint16(unix.ETH_P_8021Q)
	if status&unix.TP_STATUS_VLAN_TPID_VALID != 0 {
		tpid = s.u16(offVLANTPID)
	}
	tci := s.u16(offVLANTCI)
	r.tag = [tagLen]byte{byte(tpid >> 8), byte(tpid), byte(tci >> 8), byte(tci)}
	if hdr.Flags&virtio.NetHdrNeedsCsum != 0 {
		hdr.CsumStart += tagLen
	}
	if hdr.HdrLen > 0 {
		hdr.HdrLen += tagLen
	}
	return hdr
}

// write copies a frame to the guest, with its tag.
func (r *receiver) write(p *zerocopy.Posted, hdr virtio.NetHdr, frame []byte, tagged bool) zerocopy.WriteResult {
	if !tagged {
		r.frags[0] = frame
		return p.Write(hdr, r.frags[:1])
	}
	r.frags = [3][]byte{frame[:addrLen], r.tag[:], frame[addrLen:]}
	return p.Write(hdr, r.frags[:])
}

// large reads the frame of m bytes at the head of the socket's queue, which slot s tells of: into the guest's buffers if it can go there as it is. A frame
// that is incomplete is read and lost.
func (r *receiver) large(p *zerocopy.Posted, s *slot, hdr virtio.NetHdr, m int, tagged, incomplete bool) zerocopy.WriteResult {
	// The frame is out of the socket's queue, or what waits of it in the stage, even when guest memory faults: slots and queue stay in step.
	defer r.free(s)
	if !tagged && !incomplete && r.accept.Takes(hdr) {
		if segs, room := p.Space(p.HdrLen() + m); room >= p.HdrLen()+m && r.aim(segs, p.HdrLen(), m) {
			if !r.read(m) {
				return zerocopy.TooBig
			}
			hdr.EncodeInto(segs, p.HdrLen())
			p.Commit(p.HdrLen() + m)
			return zerocopy.Written
		}
	}
	r.aimHeader()
	r.iov.Add(r.stage)
	switch {
	case !r.read(m):
		return zerocopy.TooBig
	case incomplete:
		r.lost.Add(1)
		return zerocopy.TooBig
	}
	r.staged, r.held, r.tagged = m, hdr, tagged
	return r.unstage(p)
}

// aimHeader begins the next read with the virtio-net header that the kernel puts in front, which the slot had already.
func (r *receiver) aimHeader() {
	r.iov.Reset()
	r.iov.Add(r.hdr[:r.q.dev.header])
}

// aim points the next read at m bytes of segs, behind the first skip. It reports false when they are in too many pieces.
func (r *receiver) aim(segs [][]byte, skip, m int) bool {
	r.aimHeader()
	for _, s := range segs {
		if skip >= len(s) {
			skip -= len(s)
			continue
		}
		s = s[skip:]
		skip = 0
		if len(s) > m {
			s = s[:m]
		}
		r.iov.Add(s)
		if m -= len(s); m == 0 {
			return true
		}
		if r.iov.Len() == sys.MaxIovecs {
			return false
		}
	}
	return false
}

// read reads a frame of m bytes from the socket's queue, or counts it as lost.
func (r *receiver) read(m int) bool {
	n, errno := r.iov.Readv(r.q.fd)
	if errno == unix.ENETDOWN {
		// The interface went down after the frame came: the error was told once, and the frame is still there.
		n, errno = r.iov.Readv(r.q.fd)
	}
	if errno != 0 || n != r.q.dev.header+m {
		r.lost.Add(1)
		return false
	}
	return true
}

// unstage writes the frame in the stage to the guest.
func (r *receiver) unstage(p *zerocopy.Posted) zerocopy.WriteResult {
	res := r.write(p, r.held, r.stage[:r.staged], r.tagged)
	if res != zerocopy.NoRoom {
		r.staged = 0
	}
	return res
}

// alive looks now and then whether the interface is down, and while it is, whether it came back or went away.
func (r *receiver) alive() error {
	if r.monitor < 0 {
		if r.idles++; r.idles%aliveEvery != 0 {
			return nil
		}
		// Reading the error takes it away, and poll sleeps again.
		if e, err := unix.GetsockoptInt(r.q.fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && syscall.Errno(e) != unix.ENETDOWN {
			return nil
		}
		if err := r.watch(true); err != nil {
			return err
		}
	}
	if r.monitor >= 0 {
		sys.DrainMonitor(r.monitor) // before looking: what changes later makes it readable
	}
	up, err := r.look()
	if err != nil {
		return err
	}
	if up {
		return r.watch(false)
	}
	return nil
}

// look tells whether the interface is up. The error says that it is gone.
func (r *receiver) look() (up bool, err error) {
	d, fd := r.q.dev, r.q.fd
	index, err := sys.PacketIndex(fd)
	if err != nil {
		return false, fmt.Errorf("%s: %w", d, err)
	}
	if index < 0 {
		return false, fmt.Errorf("%s: the interface is gone: %w", d, unix.ENODEV)
	}
	name, err := sys.InterfaceName(fd, index)
	if err != nil {
		return false, fmt.Errorf("%s: the interface is gone: %w", d, err)
	}
	i, err := sys.InterfaceByName(fd, name)
	if err != nil {
		return false, fmt.Errorf("%s: %w", d, err)
	}
	return i.Up, nil
}

// watch opens or closes the monitor.
func (r *receiver) watch(on bool) (err error) {
	switch {
	case on && r.monitor < 0:
		if r.monitor, err = sys.LinkMonitor(); err != nil {
			return fmt.Errorf("%s: the interface is down, and its return cannot be waited for: %w", r.q.dev, err)
		}
	case !on && r.monitor >= 0:
		unix.Close(r.monitor)
		r.monitor = -1
	}
	return nil
}

// RecvFD is the socket, readable while frames wait, or what tells that the interface has come up again.
func (q *queue) RecvFD() int {
	if q.recv.monitor >= 0 {
		return q.recv.monitor
	}
	return q.fd
}
