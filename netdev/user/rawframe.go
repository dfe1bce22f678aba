package user

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// sendFrame puts a whole frame into the first outbox: what DHCP and the router send before the guest has an address.
func (l *link) sendFrame(frame []byte) {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
	l.out.put(pkt)
	pkt.DecRef()
}

// ipFrame returns a frame from the router with an IP header for n bytes of the transport's, and those bytes of it.
func (l *link) ipFrame(mac tcpip.LinkAddress, src, dst netip.Addr, proto tcpip.TransportProtocolNumber, hops uint8, n int) (f, l4 []byte) {
	size := header.IPv4MinimumSize
	if src.Is6() {
		size = header.IPv6MinimumSize
	}
	f = make([]byte, ethLen+size+n)
	header.Ethernet(f).Encode(&header.EthernetFields{SrcAddr: l.mac, DstAddr: mac, Type: protoOf(src)})
	ip := f[ethLen:]
	if src.Is6() {
		header.IPv6(ip).Encode(&header.IPv6Fields{
			PayloadLength: uint16(n), TransportProtocol: proto, HopLimit: hops, SrcAddr: stackAddr(src), DstAddr: stackAddr(dst),
		})
		return f, ip[size:]
	}
	header.IPv4(ip).Encode(&header.IPv4Fields{
		TotalLength: uint16(len(ip)), TTL: hops, Protocol: uint8(proto), SrcAddr: stackAddr(src), DstAddr: stackAddr(dst),
	})
	header.IPv4(ip).SetChecksum(^header.IPv4(ip).CalculateChecksum())
	return f, ip[size:]
}

const defaultHops = 64

// sendUDP sends a datagram from the router.
func (l *link) sendUDP(mac tcpip.LinkAddress, src, dst netip.AddrPort, payload []byte) {
	n := header.UDPMinimumSize + len(payload)
	f, l4 := l.ipFrame(mac, src.Addr(), dst.Addr(), header.UDPProtocolNumber, defaultHops, n)
	u := header.UDP(l4)
	u.Encode(&header.UDPFields{SrcPort: src.Port(), DstPort: dst.Port(), Length: uint16(n)})
	copy(u.Payload(), payload)
	sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, stackAddr(src.Addr()), stackAddr(dst.Addr()), uint16(n))
	if sum = ^checksum.Checksum(l4, sum); sum == 0 {
		sum = 0xffff
	}
	u.SetChecksum(sum)
	l.sendFrame(f)
}
