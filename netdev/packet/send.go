package packet

import (
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// Bytes that a frame has at least, and that the kernel copies of one into the linear part of its skb: enough for headers, however little
// or much the guest says that they are.
const (
	minFrame  = 14
	minLinear = 64
	maxLinear = 256
)

// sender fills the transmit ring. It belongs to the transmitq's worker.
//
//	kernel looks here -> head [request][request][request] next -> free, or SENDING
//	                          <------- pending -------->
type sender struct {
	q       *queue
	slots   []slot
	seq     []uint64 // by slot: the number of the frame in it
	next    int
	pending int
	frames  uint64 // numbers given out
	first   uint64 // number of the first frame of this Send
	gone    []bool // frames of this Send that were dropped
	full    bool   // the last Send found no free slot
	poll    [1]unix.PollFd
	dropped atomic.Uint64
}

func (s *sender) start(q *queue, slots []slot) {
	s.q, s.slots, s.seq = q, slots, make([]uint64, len(slots))
	s.next, s.pending, s.full = 0, 0, false
}

// abandon forgets the ring. What the kernel has not taken is lost.
func (s *sender) abandon() {
	s.dropped.Add(uint64(s.pending))
	s.slots, s.pending, s.full = nil, 0, false
}

// Send copies frames into slots and has the kernel look at them once; see netdev.Queue.
func (q *queue) Send(bufs []*zerocopy.Buffer) int {
	s := &q.send
	s.begin(len(bufs))
	taken := 0
	for s.flush() && taken < len(bufs) && s.free() {
		for taken < len(bufs) && s.put(bufs[taken]) {
			taken++
		}
	}
	s.full = taken < len(bufs)
	s.release(bufs[:taken])
	return taken
}

// begin numbers the frames of a Send from here.
func (s *sender) begin(n int) {
	s.first = s.frames
	for len(s.gone) < n {
		s.gone = append(s.gone, false)
	}
	clear(s.gone[:n])
}

// free tells whether there is a slot for another frame.
func (s *sender) free() bool {
	return len(s.slots) == 0 || s.pending < len(s.slots) && s.slots[s.next].load() == unix.TP_STATUS_AVAILABLE
}

// put copies a frame into the next slot, or drops it. It reports false when there is no slot.
func (s *sender) put(b *zerocopy.Buffer) bool {
	if !s.free() {
		return false
	}
	n, hdr := b.Len(), b.Header()
	if !s.fits(hdr, n) {
		s.drop(s.frames)
		s.frames++
		return true
	}
	t, header := &s.slots[s.next], s.q.dev.header
	if header > 0 {
		hdr = outgoing(hdr, n)
		hdr.Encode(t.mem[sendData : sendData+header])
	}
	b.CopyTo(t.mem[sendData+header:sendData+header+n], 0)
	t.putLen(header + n)
	s.seq[s.next] = s.frames
	s.frames++
	t.store(unix.TP_STATUS_SEND_REQUEST)
	s.next = s.after(s.next)
	s.pending++
	return true
}

// fits tells whether a frame of n bytes can be sent at all. The kernel does not hold a frame with a virtio-net header to the MTU.
func (s *sender) fits(hdr virtio.NetHdr, n int) bool {
	d := s.q.dev
	if len(s.slots) == 0 || n < minFrame || n > s.slots[s.next].room(d.header) {
		return false
	}
	return n <= d.mtu+etherMax || d.header > 0 && hdr.GSOType != virtio.GSONone
}

// outgoing is the guest's header as the kernel gets it: only what a driver may say (virtio-v1.2 §5.1.6.2.1), and with hdr_len, a hint that
// a device must not rely on, as the length of what the kernel copies.
func outgoing(hdr virtio.NetHdr, frameLen int) virtio.NetHdr {
	hdr.Flags &= virtio.NetHdrNeedsCsum
	hdr.HdrLen = uint16(min(max(int(hdr.HdrLen), minLinear), maxLinear, frameLen))
	return hdr
}

func (s *sender) after(i int) int {
	if i++; i == len(s.slots) {
		return 0
	}
	return i
}

// head is the slot at which the kernel looks next.
func (s *sender) head() int {
	if i := s.next - s.pending; i >= 0 {
		return i
	}
	return s.next - s.pending + len(s.slots)
}

// flush has the kernel take what is pending, drops what it refuses, and reports whether nothing is left.
func (s *sender) flush() bool {
	for s.pending > 0 {
		errno := sys.PacketKick(s.q.fd)
		moved := s.advance()
		if errno == unix.ENETDOWN {
			// It is told once more when all is well again.
			errno = sys.PacketKick(s.q.fd)
			moved = s.advance() || moved
		}
		switch errno {
		case 0:
			if !moved {
				return false
			}
		case unix.EAGAIN:
			return s.pending == 0
		case unix.ENETDOWN, unix.ENXIO, unix.ENODEV:
			for s.pending > 0 {
				s.dropHead()
			}
		default:
			// What the kernel refuses now (a bad header, a full qdisc, no memory) it would refuse again, or too late.
			s.dropHead()
		}
	}
	return true
}

// advance takes note of the slots that the kernel has taken.
func (s *sender) advance() (moved bool) {
	for i := s.head(); s.pending > 0 && !s.slots[i].is(unix.TP_STATUS_SEND_REQUEST|unix.TP_STATUS_WRONG_FORMAT); i = s.after(i) {
		s.pending--
		moved = true
	}
	return moved
}

// dropHead drops the frame at which the kernel looks next: those behind it move up.
func (s *sender) dropHead() {
	if s.pending == 0 {
		return // the error was that of a frame which is gone
	}
	i := s.head()
	s.drop(s.seq[i])
	for range s.pending - 1 {
		j := s.after(i)
		s.slots[i].take(&s.slots[j])
		s.seq[i] = s.seq[j]
		s.slots[i].store(unix.TP_STATUS_SEND_REQUEST)
		i = j
	}
	s.slots[i].store(unix.TP_STATUS_AVAILABLE)
	s.next = i
	s.pending--
}

// drop counts the frame with this number as lost.
func (s *sender) drop(seq uint64) {
	s.dropped.Add(1)
	if seq >= s.first {
		s.gone[seq-s.first] = true
	}
}

// release gives the frames of this Send back: each was copied, or dropped.
func (s *sender) release(bufs []*zerocopy.Buffer) {
	start := 0
	for i := range bufs {
		if s.gone[i] {
			zerocopy.ReleaseAll(bufs[start:i], zerocopy.Copied)
			zerocopy.ReleaseAll(bufs[i:i+1], zerocopy.Dropped)
			start = i + 1
		}
	}
	zerocopy.ReleaseAll(bufs[start:], zerocopy.Copied)
}

// Held tells that frames are in the ring for which the socket had no room; see netdev.Holder.
func (q *queue) Held() bool { return q.send.pending > 0 }

// Reap has the kernel look again at frames for which it had no room.
func (q *queue) Reap() {
	if s := &q.send; s.pending > 0 {
		s.begin(0) // what is pending was released long ago
		s.flush()
	}
}

// SendFD is the socket: writable while its buffer has room. With all slots in use it is not writable, but for frames that overtake others on
// their way out: then there is nothing to wait for, and -1 has the caller look again after a while.
func (q *queue) SendFD() int {
	s := &q.send
	if s.full && s.pending == 0 && !s.free() {
		s.poll[0] = unix.PollFd{Fd: int32(q.fd), Events: unix.POLLOUT}
		if n, err := unix.Poll(s.poll[:], 0); err == nil && n > 0 && !s.free() {
			return -1
		}
	}
	return q.fd
}
