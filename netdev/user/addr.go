package user

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// stackAddr is a as the network stack writes it.
func stackAddr(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

// hostAddr is an address of the network stack's.
func hostAddr(a tcpip.Address) netip.Addr {
	addr, _ := netip.AddrFromSlice(a.AsSlice())
	return addr
}

func protoOf(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}

// routable4 tells whether a is an IPv4 address that a packet of a guest may be for: "this network", loopback, multicast, the reserved block
// and broadcast are not. The first two would mean the host itself once they are given to one of its sockets.
func routable4(a netip.Addr) bool {
	first := a.As4()[0]
	return first != 0 && first != 127 && first < 224
}

var (
	compat6 = netip.MustParsePrefix("::/96") // IPv4-compatible, and with it :: and ::1
	mapped6 = netip.MustParsePrefix("::ffff:0:0/96")
)

// routable6 is routable4 for IPv6; link-local addresses mean nothing behind a router.
func routable6(a netip.Addr) bool {
	return !a.IsMulticast() && !a.IsLinkLocalUnicast() && !compat6.Contains(a) && !mapped6.Contains(a)
}

// routes decides where on the host an address of the guest's leads.
type routes struct {
	opts *Options
	gw6  netip.Addr // the router's link-local address
}

// own tells whether a is one of the router's own addresses.
func (r *routes) own(a netip.Addr) bool {
	o := r.opts
	return a == o.Host || a == o.DNS || a == o.Host6 || a == o.DNS6 || a == r.gw6
}

// local tells whether a is in one of the guest's networks.
func (r *routes) local(a netip.Addr) bool { return r.opts.Net.Contains(a) || r.opts.Net6.Contains(a) }

// lookup returns the address that the host connects to when the guest connects to a. It reports false where nothing may be
// reached.
func (r *routes) lookup(a netip.Addr) (netip.Addr, bool) {
	switch {
	case r.opts.Restrict:
		return netip.Addr{}, false
	case a == r.opts.Host && !r.opts.NoHostLoopback:
		return netip.AddrFrom4([4]byte{127, 0, 0, 1}), true
	case a == r.opts.Host6 && !r.opts.NoHostLoopback:
		return netip.IPv6Loopback(), true
	case r.own(a) || r.local(a):
		return netip.Addr{}, false
	case a.Is4():
		return a, routable4(a)
	}
	return a, routable6(a)
}
