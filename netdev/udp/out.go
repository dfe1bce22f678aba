package udp

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
)

// outSocket is a socket that frames leave through. It belongs to the transmitq's worker.
type outSocket struct {
	fd     int
	buffer int      // bytes of kernel memory that may wait in it
	used   int      // bytes that do, at most
	copies sys.Msgs // datagrams for sendmmsg
	owner  []int    // by datagram: the index in sender.copied of its frame
}

// newOut opens a socket to send from.
func newOut(a netip.AddrPort, dev string) (s outSocket, err error) {
	if s.fd, err = newSocket(a, dev); err != nil {
		return s, err
	}
	if err = s.own(); err == nil {
		err = sendOnly(s.fd)
	}
	if err != nil {
		return s, errors.Join(err, unix.Close(s.fd))
	}
	return s, nil
}

// own prepares the sending side of the socket.
func (s *outSocket) own() (err error) {
	if err := grow(s.fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, sendBuffer); err != nil {
		return err
	}
	if s.buffer, err = unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUF); err != nil {
		return fmt.Errorf("size of the socket buffer: %w", err)
	}
	return nil
}

// take reports whether n bytes of kernel memory are known to be free, and counts them as used.
func (s *outSocket) take(n int) bool {
	if s.used+n > s.buffer && s.used > 0 {
		return false
	}
	s.used += n
	return true
}

// refresh asks the kernel how much is in use. Nothing may be queued here.
func (s *outSocket) refresh() {
	var err error
	if s.used, err = unix.IoctlGetInt(s.fd, unix.SIOCOUTQ); err != nil {
		panic("bug: SIOCOUTQ of a UDP socket: " + err.Error())
	}
}

// sendCopies sends the queued datagrams and calls done for each, with its frame's index and why the kernel refused it, or 0.
func (s *outSocket) sendCopies(done func(frame int, errno unix.Errno)) {
	for i := 0; i < s.copies.Len(); {
		n, errno := s.copies.Send(s.fd, i)
		if errno != 0 {
			n = 1 // the first, which was not sent
		}
		for range n {
			done(s.owner[i], errno)
			i++
		}
	}
	s.forget()
}

// forget drops the queued datagrams.
func (s *outSocket) forget() {
	s.copies.Reset()
	s.owner = s.owner[:0]
}
