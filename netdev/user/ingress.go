package user

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// verdict is what becomes of a frame of the guest's.
type verdict uint8

const (
	refuse  verdict = iota // not for a router to carry, or malformed
	done                   // answered, or meant for a group that has no member here
	toStack                // for the network stack
)

// ingress decides on the guest's frames. It has no state of its own that changes, and is called by every transmitq's worker.
type ingress struct {
	routes
	link  *link
	dhcp4 *dhcp4
	dhcp6 *dhcp6
	ra    *advertiser
}

// frame takes a frame of the guest's. It reports false for one that goes nowhere.
func (g *ingress) frame(b *zerocopy.Buffer) bool {
	if b.Len() < ethLen || b.Len() > virtio.MaxFrame {
		return false
	}
	hdr := b.Header()
	pkt := copyIn(b, &hdr)
	views, _ := pkt.AsViewList()
	f := frame{data: views.Front().AsSlice(), size: b.Len(), hdr: hdr}
	switch g.classify(&f) {
	case toStack:
		pkt.LinkHeader().Consume(ethLen)
		pkt.PktType = f.pktType
		g.link.deliver(header.Ethernet(f.data).Type(), pkt)
		return true
	case done:
		pkt.DecRef()
		return true
	}
	pkt.DecRef()
	return false
}

// frame is a frame in private memory while it is decided on.
type frame struct {
	data    []byte // from the Ethernet header: all of it, or of a large segment the headers
	size    int    // bytes, of which data may be less
	hdr     virtio.NetHdr
	pktType tcpip.PacketType
}

// ip is what follows the Ethernet header.
func (f *frame) ip() []byte { return f.data[ethLen:] }

// ipSize is the length in bytes of what follows the Ethernet header.
func (f *frame) ipSize() int { return f.size - ethLen }

func (g *ingress) classify(f *frame) verdict {
	if len(f.data) < ethLen {
		return refuse
	}
	eth := header.Ethernet(f.data)
	dst := eth.DestinationAddress()
	switch {
	case header.IsMulticastEthernetAddress(eth.SourceAddress()):
		return refuse
	case dst == g.link.mac:
		f.pktType = tcpip.PacketHost
	case dst == header.EthernetBroadcastAddress:
		f.pktType = tcpip.PacketBroadcast
	case header.IsMulticastEthernetAddress(dst):
		f.pktType = tcpip.PacketMulticast
	default:
		return refuse
	}
	switch eth.Type() {
	case header.ARPProtocolNumber:
		return g.arp(header.ARP(f.ip()))
	case header.IPv4ProtocolNumber:
		return g.ipv4(f)
	case header.IPv6ProtocolNumber:
		return g.ipv6(f)
	}
	return done
}

// arp passes what concerns the router's addresses. The stack would answer for any address, and so break the guest's detection of
// duplicates.
func (g *ingress) arp(a header.ARP) verdict {
	if g.opts.NoIPv4 || !a.IsValid() {
		return refuse
	}
	sender := netip.AddrFrom4([4]byte(a.ProtocolAddressSender()))
	target := netip.AddrFrom4([4]byte(a.ProtocolAddressTarget()))
	probe := sender.IsUnspecified()
	switch {
	case !probe && !g.guest4(sender):
		return refuse
	case !g.own(target):
		return done
	case a.Op() == header.ARPRequest, a.Op() == header.ARPReply && !probe:
		return toStack
	}
	return refuse
}

// guest4 tells whether a can be an address of the guest's.
func (g *ingress) guest4(a netip.Addr) bool {
	return g.opts.Net.Contains(a) && !g.own(a) && a != g.opts.Net.Addr() && a != lastAddr(g.opts.Net)
}

func (g *ingress) ipv4(f *frame) verdict {
	ip := header.IPv4(f.ip())
	if g.opts.NoIPv4 || !ip.IsValid(f.ipSize()) || int(ip.HeaderLength()) > len(ip) || !ip.IsChecksumValid() {
		return refuse
	}
	l4 := l4Part{
		start: ethLen + int(ip.HeaderLength()), end: ethLen + int(ip.TotalLength()), proto: ip.TransportProtocol(),
		src: ip.SourceAddress(), dst: ip.DestinationAddress(), fragment: ip.More() || ip.FragmentOffset() != 0,
	}
	src, dst := netip.AddrFrom4(l4.src.As4()), netip.AddrFrom4(l4.dst.As4())
	if udp := l4.udp(f); udp != nil && udp.DestinationPort() == dhcp4ServerPort {
		return g.dhcp4.input(f, udp.Payload())
	}
	switch {
	case !g.guest4(src):
		return refuse
	case dst.IsMulticast() || dst == lastAddr(g.opts.Net) || dst == limitedBroadcast:
		return done
	case f.pktType != tcpip.PacketHost:
		return refuse
	case !g.own(dst) && (g.opts.Net.Contains(dst) || !routable4(dst)):
		return refuse
	}
	return l4.verify(f)
}

var limitedBroadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

func (g *ingress) ipv6(f *frame) verdict {
	ip := header.IPv6(f.ip())
	if g.opts.NoIPv6 || !ip.IsValid(f.ipSize()) {
		return refuse
	}
	l4 := l4Part{
		start: ethLen + header.IPv6MinimumSize, proto: tcpip.TransportProtocolNumber(ip.NextHeader()),
		src: ip.SourceAddress(), dst: ip.DestinationAddress(),
	}
	l4.end = l4.start + int(ip.PayloadLength())
	if !l4.skipExtensions(f) {
		return refuse
	}
	src, dst := netip.AddrFrom16(l4.src.As16()), netip.AddrFrom16(l4.dst.As16())
	if l4.proto == header.ICMPv6ProtocolNumber {
		if v, decided := g.neighbor(f, &l4, src); decided {
			return v
		}
	}
	if udp := l4.udp(f); udp != nil && udp.DestinationPort() == dhcp6ServerPort && dst.IsMulticast() {
		return g.dhcp6.input(f, src, udp.Payload())
	}
	switch {
	case !g.guest6(src):
		return refuse
	case dst.IsMulticast():
		return done
	case f.pktType != tcpip.PacketHost:
		return refuse
	case !g.own(dst) && (g.opts.Net6.Contains(dst) || !routable6(dst)):
		return refuse
	}
	return l4.verify(f)
}

func (g *ingress) guest6(a netip.Addr) bool {
	return (g.opts.Net6.Contains(a) || a.IsLinkLocalUnicast()) && !g.own(a)
}

// neighbor decides on neighbor discovery (RFC 4861), with the same care as arp.
func (g *ingress) neighbor(f *frame, l4 *l4Part, src netip.Addr) (v verdict, decided bool) {
	icmp := l4.bytes(f)
	if len(icmp) < header.ICMPv6MinimumSize {
		return refuse, true
	}
	switch header.ICMPv6(icmp).Type() {
	case header.ICMPv6RouterSolicit:
		if !src.IsUnspecified() && !g.guest6(src) {
			return refuse, true
		}
		g.ra.solicited()
		return done, true
	case header.ICMPv6RouterAdvert, header.ICMPv6RedirectMsg:
		return refuse, true
	case header.ICMPv6NeighborSolicit, header.ICMPv6NeighborAdvert:
		target, ok := ndTarget(icmp)
		advert := header.ICMPv6(icmp).Type() == header.ICMPv6NeighborAdvert
		switch {
		case !ok || !src.IsUnspecified() && !g.guest6(src):
			return refuse, true
		case advert && g.guest6(target), !advert && g.own(target):
			return toStack, true
		}
		return done, true
	}
	return refuse, false
}

// ndTarget is the target address of a neighbor solicitation or advertisement (RFC 4861 §4.3).
func ndTarget(icmp []byte) (netip.Addr, bool) {
	const at, end = 8, 24
	if len(icmp) < end {
		return netip.Addr{}, false
	}
	return netip.AddrFromSlice(icmp[at:end])
}
