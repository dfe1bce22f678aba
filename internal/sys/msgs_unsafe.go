package sys

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mmsghdr is struct mmsghdr (sendmmsg(2)): a message, and how many bytes of it were moved.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
	_   [4]byte
}

// Msgs collects datagrams for one call of sendmmsg(2), or for an io_uring. It keeps its memory from one batch to the next. The zero value is
// empty and ready. What is added has to stay where it is until Reset.
type Msgs struct {
	msgs   []mmsghdr
	names  []Sockaddr
	iovs   []unix.Iovec
	first  []int // index in iovs of each message's first piece
	trains []segmentSize
	sealed bool
}

// Reset empties it.
func (m *Msgs) Reset() {
	m.msgs, m.names, m.iovs, m.first, m.sealed = m.msgs[:0], m.names[:0], m.iovs[:0], m.first[:0], false
}

// Len is the number of datagrams.
func (m *Msgs) Len() int { return len(m.msgs) }

// Begin starts another datagram, without a piece yet.
func (m *Msgs) Begin(to *Sockaddr) {
	m.first, m.sealed = append(m.first, len(m.iovs)), false
	m.names = append(m.names, *to)
	m.msgs = append(m.msgs, mmsghdr{hdr: unix.Msghdr{Namelen: to.n}})
}

// Add appends a piece to the last datagram, unless b is empty.
func (m *Msgs) Add(b []byte) {
	if len(b) > 0 {
		m.iovs = append(m.iovs, unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))})
	}
}

// Header returns datagram i as the kernel takes it: good until the next Begin, Add or Reset.
func (m *Msgs) Header(i int) *unix.Msghdr {
	m.seal()
	return &m.msgs[i].hdr
}

// seal points the headers at their addresses and pieces, which no longer move.
func (m *Msgs) seal() {
	if m.sealed {
		return
	}
	m.sealed = true
	for i := range m.msgs {
		end := len(m.iovs)
		if i+1 < len(m.first) {
			end = m.first[i+1]
		}
		h := &m.msgs[i].hdr
		h.Name = &m.names[i].b[0]
		h.Iov, h.Iovlen = nil, uint64(end-m.first[i])
		h.Control, h.Controllen = nil, 0
		if h.Iovlen > 0 {
			h.Iov = &m.iovs[m.first[i]]
		}
	}
}

// Send sends the datagrams from number i on, without waiting, and returns how many were sent. The error is that of the first, when
// none was.
func (m *Msgs) Send(fd, i int) (int, syscall.Errno) {
	m.seal()
	rest := m.msgs[i:]
	return mmsg(unix.SYS_SENDMMSG, fd, rest, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
}

// SendPages is Send of datagrams [i, end) with MSG_ZEROCOPY: the kernel refers to their pieces until fd's ErrorQueue says otherwise.
func (m *Msgs) SendPages(fd, i, end int) (int, syscall.Errno) {
	m.seal()
	return mmsg(unix.SYS_SENDMMSG, fd, m.msgs[i:end], unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL|unix.MSG_ZEROCOPY)
}

// SendOne is Send of one datagram.
func (m *Msgs) SendOne(fd, i int) syscall.Errno {
	m.seal()
	_, errno := mmsg(unix.SYS_SENDMMSG, fd, m.msgs[i:i+1], unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	return errno
}

// mmsg does not wait, so Go's scheduler need not hear of it: its monitor would take the processor from a batch that lasts, each time.
func mmsg(nr uintptr, fd int, msgs []mmsghdr, flags uintptr) (int, syscall.Errno) {
	if len(msgs) == 0 {
		return 0, 0
	}
	for {
		n, _, errno := unix.RawSyscall6(nr, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(msgs))), uintptr(len(msgs)), flags, 0, 0)
		switch errno {
		case 0:
			return int(n), 0
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// segmentSize is the control message UDP_SEGMENT of udp(7): the length in bytes of the datagrams that a message is cut into.
type segmentSize struct {
	hdr  unix.Cmsghdr
	size uint16
	_    [6]byte
}

// To is where datagram i goes.
func (m *Msgs) To(i int) *Sockaddr { return &m.names[i] }

// Train returns datagrams [i, i+n) as one message, which the kernel, or the network card, cuts into datagrams again: all but the last are size bytes
// long, the last is no longer, and all go to one address. It is good as Header's is; Apart undoes it.
func (m *Msgs) Train(i, n, size int) *unix.Msghdr {
	m.seal()
	if len(m.trains) < len(m.msgs) {
		m.trains = make([]segmentSize, 2*len(m.msgs)) // those that are in use stay where they are
	}
	c := &m.trains[i]
	c.size = uint16(size)
	c.hdr.Level, c.hdr.Type = unix.SOL_UDP, unix.UDP_SEGMENT
	c.hdr.SetLen(unix.CmsgLen(2))
	h := &m.msgs[i].hdr
	end := len(m.iovs)
	if i+n < len(m.first) {
		end = m.first[i+n]
	}
	h.Iovlen = uint64(end - m.first[i])
	h.Control = (*byte)(unsafe.Pointer(c))
	h.SetControllen(unix.CmsgSpace(2))
	return h
}

// Apart makes every datagram a message of its own again.
func (m *Msgs) Apart() { m.sealed = false }

// Inbox is private memory that datagrams are received into, a batch at a time.
type Inbox struct {
	msgs  []mmsghdr
	iovs  []unix.Iovec
	names []Sockaddr
	bufs  [][]byte
}

// NewInbox returns an Inbox for up to n datagrams of up to size bytes; both at least 1. Longer ones are cut.
func NewInbox(n, size int) *Inbox {
	in := &Inbox{msgs: make([]mmsghdr, n), iovs: make([]unix.Iovec, n), names: make([]Sockaddr, n), bufs: make([][]byte, n)}
	for i := range in.msgs {
		in.bufs[i] = make([]byte, size)
		in.iovs[i] = unix.Iovec{Base: &in.bufs[i][0], Len: uint64(size)}
		in.msgs[i].hdr = unix.Msghdr{Name: &in.names[i].b[0], Iov: &in.iovs[i], Iovlen: 1}
	}
	return in
}

// Recv takes the datagrams that wait at fd, and returns how many. The error is EAGAIN when none waits.
func (in *Inbox) Recv(fd int) (int, syscall.Errno) {
	for i := range in.msgs {
		in.msgs[i].hdr.Namelen = uint32(len(in.names[i].b))
	}
	return mmsg(unix.SYS_RECVMMSG, fd, in.msgs, unix.MSG_DONTWAIT)
}

// Datagram is number i of those that the last Recv took, and who sent it: good until the next Recv.
func (in *Inbox) Datagram(i int) ([]byte, *Sockaddr) {
	in.names[i].n = in.msgs[i].hdr.Namelen
	return in.bufs[i][:in.msgs[i].n], &in.names[i]
}

// PageSize is the unit in bytes in which the kernel takes hold of memory, here counted in the smallest pages of the architectures.
const PageSize = 4096

// PageOffset is the distance in bytes from the start of a page to b, which is not empty.
func PageOffset(b []byte) int { return int(uintptr(unsafe.Pointer(unsafe.SliceData(b))) % PageSize) }
