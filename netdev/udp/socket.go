package udp

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Socket buffers that are asked for, in bytes. The kernel may give less; what it gives is what is counted with.
const (
	sendBuffer = 4 << 20
	recvBuffer = 4 << 20
)

// newSocket opens a datagram socket that is bound to a.
func newSocket(a netip.AddrPort, dev string) (fd int, err error) {
	family := unix.AF_INET
	if a.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("UDP socket: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unix.Close(fd))
			fd = -1
		}
	}()
	if dev != "" {
		if err := unix.BindToDevice(fd, dev); err != nil {
			return fd, fmt.Errorf("binding to interface %s: %w (is there such an interface?)", dev, err)
		}
	}
	var to unix.Sockaddr = &unix.SockaddrInet4{Port: int(a.Port()), Addr: v4(a.Addr())}
	if family == unix.AF_INET6 {
		to = &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16(), ZoneId: zone(a.Addr(), dev)}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return fd, fmt.Errorf("IPV6_V6ONLY: %w", err)
		}
	}
	if err := unix.Bind(fd, to); err != nil {
		return fd, fmt.Errorf("binding to %s: %w%s", a, err, explainBind(err))
	}
	return fd, allowFragments(fd, family)
}

func v4(a netip.Addr) (b [4]byte) {
	if a.Is4() {
		b = a.As4()
	}
	return b
}

func unspecified(v6 bool) netip.Addr {
	if v6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// zone is the index of dev for a link-local address, which means nothing without.
func zone(a netip.Addr, dev string) uint32 {
	if !a.IsLinkLocalUnicast() && !a.IsLinkLocalMulticast() || dev == "" {
		return 0
	}
	index, err := ifindex(dev)
	if err != nil {
		return 0 // the address will not bind, which says it
	}
	return index
}

func ifindex(dev string) (uint32, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(dev)
	if err != nil {
		return 0, err
	}
	err = unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr)
	return ifr.Uint32(), err
}

func explainBind(err error) string {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return ": somebody receives there already, maybe a tunnel of the kernel's (ip -d link)"
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return ": no interface has that address"
	}
	return ""
}

// allowFragments has the kernel cut a datagram that is longer than the path's MTU, as its own tunnels do, instead of refusing it.
func allowFragments(fd, family int) error {
	level, opt := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
	if family == unix.AF_INET6 {
		level, opt = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	}
	if err := unix.SetsockoptInt(fd, level, opt, unix.IP_PMTUDISC_DONT); err != nil {
		return fmt.Errorf("path MTU discovery off: %w", err)
	}
	return nil
}

// grow asks for a larger socket buffer: by force where we may, else as much as the host allows.
func grow(fd, force, opt, n int) error {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, n) == nil {
		return nil
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, n); err != nil {
		return fmt.Errorf("socket buffer of %d bytes: %w", n, err)
	}
	return nil
}

// sendOnly has a socket drop what comes to it: nobody reads it.
func sendOnly(fd int) error {
	drop := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop[0]}); err != nil {
		return fmt.Errorf("filter of a sending socket: %w", err)
	}
	return nil
}

// pathMTU is what the route to a peer has room for at the moment, in bytes of IP packet.
func (o *Options) pathMTU(peer netip.AddrPort) (int, error) {
	fd, err := newSocket(netip.AddrPortFrom(o.Local.Addr(), 0), o.Dev)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := o.prepare(fd); err != nil {
		return 0, err
	}
	level, opt := unix.IPPROTO_IP, unix.IP_MTU
	var to unix.Sockaddr = &unix.SockaddrInet4{Port: int(peer.Port()), Addr: v4(peer.Addr())}
	if peer.Addr().Is6() {
		level, opt = unix.IPPROTO_IPV6, unix.IPV6_MTU
		to = &unix.SockaddrInet6{Port: int(peer.Port()), Addr: peer.Addr().As16(), ZoneId: zone(peer.Addr(), o.Dev)}
	}
	if err := unix.Connect(fd, to); err != nil {
		return 0, fmt.Errorf("the way to peer %s: %w%s", peer, err, explainRoute(err))
	}
	mtu, err := unix.GetsockoptInt(fd, level, opt)
	if err != nil {
		return 0, fmt.Errorf("MTU of the way to peer %s: %w", peer, err)
	}
	return mtu, nil
}

func explainRoute(err error) string {
	if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
		return ": this host has no route there"
	}
	return ""
}
