package sys

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Lengths in bytes of struct sockaddr_in and struct sockaddr_in6.
const (
	sockaddrLen4 = 16
	sockaddrLen6 = 28
)

// Sockaddr is an IP address and a port as the kernel's socket calls take them. It is comparable.
type Sockaddr struct {
	b [sockaddrLen6]byte
	n uint32
}

// NewSockaddr returns a; the zone of an IPv6 address is the index of its interface.
func NewSockaddr(a netip.AddrPort, zone uint32) (s Sockaddr) {
	binary.BigEndian.PutUint16(s.b[2:], a.Port())
	if ip := a.Addr().Unmap(); ip.Is4() {
		binary.NativeEndian.PutUint16(s.b[:], unix.AF_INET)
		v4 := ip.As4()
		copy(s.b[4:], v4[:])
		s.n = sockaddrLen4
	} else {
		binary.NativeEndian.PutUint16(s.b[:], unix.AF_INET6)
		v6 := ip.As16()
		copy(s.b[8:], v6[:])
		binary.NativeEndian.PutUint32(s.b[24:], zone)
		s.n = sockaddrLen6
	}
	return s
}

// AddrPort is the address, without its zone; the zero AddrPort when it is none of IP's.
func (s *Sockaddr) AddrPort() netip.AddrPort {
	port := binary.BigEndian.Uint16(s.b[2:])
	switch family := binary.NativeEndian.Uint16(s.b[:]); {
	case family == unix.AF_INET && s.n >= sockaddrLen4:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(s.b[4:])), port)
	case family == unix.AF_INET6 && s.n >= sockaddrLen6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(s.b[8:])), port)
	}
	return netip.AddrPort{}
}

// WithPort is the address with another port.
func (s *Sockaddr) WithPort(port uint16) Sockaddr {
	t := *s
	binary.BigEndian.PutUint16(t.b[2:], port)
	return t
}
