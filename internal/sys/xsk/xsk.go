// Package xsk is an AF_XDP socket over memory of the caller's: four rings that are shared with the kernel, and the calls around them.
//
// # Theory of operation
//
//	        Fill: addresses to receive at   ---------->            Rx: frames received
//	caller  Tx:   frames to send            ---------->   kernel   Done: addresses of frames that were sent
//	        (Producer: Add, Publish)                               (Consumer: Len, At, Release)
//
// All addresses are offsets in Config.Memory (the UMEM), which the kernel holds from New until Close. With Config.Unaligned an address is any byte
// of it in the lower 48 bits, and the upper 16 are added to that; else it is that of a chunk, or lies in one.
//
// Each ring has one index that its producer stores and one that its consumer stores. What is written before an index is stored (Publish, Release) is
// seen by whoever loads it.
//
// One pool of memory is bound to a queue of an interface at a time, so Bind answers EBUSY until the last one is gone, which is some time after Close.
// What the kernel has been told by the rings cannot be taken back but by Close: when it returns nothing is read from the memory or
// written to it any more, unless another process inherited the descriptor.
//
// A Socket is not safe for concurrent use, but for polling FD, and for the two directions: Fill and Rx by the one, Tx, Done and Kick by the other.
package xsk

import (
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// Desc is an entry of the Rx and Tx rings: a piece of a frame. Options has unix.XDP_PKT_CONTD when another piece of the same frame follows.
type Desc = unix.XDPDesc

// Bounds that the kernel sets.
const (
	// Room is how many bytes the kernel keeps free before what it receives, beside Config.Headroom.
	Room = unix.XDP_PACKET_HEADROOM
	// MinChunk and MaxChunk bound Config.Chunk, in bytes.
	MinChunk, MaxChunk = 2048, 4096
	// MaxPieces is how many descriptors one frame has at most.
	MaxPieces = 17
	// AddrBits are the lower bits of an address with Config.Unaligned.
	AddrBits = 48
)

// Config says what a Socket is made of.
type Config struct {
	Memory    []byte // the UMEM; from the start of a page
	Chunk     int    // bytes of memory behind an address: the longest piece that can be sent; received are Room+Headroom less
	Headroom  int    // bytes that are kept free before what is received, beside Room
	Unaligned bool   // addresses are any byte, and Chunk is any number
	Metadata  int    // bytes of struct xsk_tx_metadata that may lie before a frame that is sent; 0 for none
	// Entries of the rings: powers of two.
	Fill, Rx, Tx, Done int
}

// Socket is an AF_XDP socket. The zero value is one that was closed.
type Socket struct {
	Fill Producer[uint64]
	Rx   Consumer[Desc]
	Tx   Producer[Desc]
	Done Consumer[uint64]

	fd   int
	open bool
	maps [][]byte
}

// New makes a socket with its rings and registers the memory, all pages of which are held until Close.
func New(c Config) (*Socket, error) {
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("AF_XDP socket: %w", err)
	}
	s := &Socket{fd: fd, open: true}
	if err := s.setup(c); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Socket) setup(c Config) error {
	if err := registerMemory(s.fd, c); err != nil {
		return fmt.Errorf("registering %d bytes of memory: %w", len(c.Memory), err)
	}
	for _, r := range []struct{ opt, n int }{
		{unix.XDP_UMEM_FILL_RING, c.Fill}, {unix.XDP_UMEM_COMPLETION_RING, c.Done}, {unix.XDP_RX_RING, c.Rx}, {unix.XDP_TX_RING, c.Tx},
	} {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_XDP, r.opt, r.n); err != nil {
			return fmt.Errorf("ring of %d entries: %w", r.n, err)
		}
	}
	return s.mapRings(c)
}

// Bind ties the socket to a queue of an interface. flags are unix.XDP_COPY, XDP_ZEROCOPY, XDP_USE_SG, XDP_USE_NEED_WAKEUP.
func (s *Socket) Bind(ifindex, queue int, flags uint16) error {
	return unix.Bind(s.fd, &unix.SockaddrXDP{Flags: flags, Ifindex: uint32(ifindex), QueueID: uint32(queue)})
}

// ZeroCopy reports whether the driver reads and writes the memory itself.
func (s *Socket) ZeroCopy() bool {
	v, err := unix.GetsockoptInt(s.fd, unix.SOL_XDP, unix.XDP_OPTIONS)
	return err == nil && v&unix.XDP_OPTIONS_ZEROCOPY != 0
}

// FD is polled: readable when Rx has a frame. In copy mode, polling it also sends what waits in Tx.
func (s *Socket) FD() int { return s.fd }

// Kick has the kernel send what waits in Tx, some of it at least. The errors that say "again" are unix.EAGAIN, EBUSY and ENOBUFS.
func (s *Socket) Kick() syscall.Errno {
	_, _, errno := unix.Syscall6(unix.SYS_SENDTO, uintptr(s.fd), 0, 0, unix.MSG_DONTWAIT, 0, 0)
	return errno
}

// KickFill has the driver look at Fill, when its NeedsWakeup says so.
func (s *Socket) KickFill() {
	_, _, _ = unix.Syscall6(unix.SYS_RECVFROM, uintptr(s.fd), 0, 0, unix.MSG_DONTWAIT, 0, 0) // nothing waits for it
}

// SetBatch asks for n frames to be sent by one Kick in copy mode, where 32 are else (Linux 6.17).
func (s *Socket) SetBatch(n int) {
	_ = unix.SetsockoptInt(s.fd, unix.SOL_XDP, unix.XDP_MAX_TX_SKB_BUDGET, n) // an older kernel wants more kicks
}

// SetSendBuffer sets how many bytes of kernel memory may wait behind the socket in copy mode, or less where the host allows no more.
func (s *Socket) SetSendBuffer(n int) {
	if unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, n) != nil {
		_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, n)
	}
}

// Err is what ended the socket (the interface went away), or nil.
func (s *Socket) Err() error {
	v, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR)
	switch {
	case err != nil:
		return err
	case v != 0:
		return syscall.Errno(v)
	}
	return nil
}

// Close ends the socket; see the package comment. A second call does nothing.
func (s *Socket) Close() error {
	if !s.open {
		return nil
	}
	s.open = false
	var errs []error
	for _, m := range s.maps { // a mapping keeps the socket alive
		errs = append(errs, unix.Munmap(m))
	}
	*s = Socket{fd: s.fd}
	return errors.Join(append(errs, unix.Close(s.fd))...)
}
