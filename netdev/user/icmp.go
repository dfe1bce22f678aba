package user

import (
	"encoding/binary"
	"errors"
	"syscall"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// nicID is the stack's only interface.
const nicID = 1

// icmpOut sends ICMP messages to the guest.
type icmpOut struct {
	stack *stack.Stack
	opts  *Options
}

// send sends a message, whose checksum is filled in here, from one address to a guest's. The stack cuts it if it has to.
func (o *icmpOut) send(src, dst tcpip.Address, msg []byte) {
	proto, number := header.IPv4ProtocolNumber, header.ICMPv4ProtocolNumber
	if src.Len() == header.IPv6AddressSize {
		proto, number = header.IPv6ProtocolNumber, header.ICMPv6ProtocolNumber
	}
	const at = 2 // of the checksum
	msg[at], msg[at+1] = 0, 0
	var sum uint16
	if number == header.ICMPv6ProtocolNumber {
		sum = header.PseudoHeaderChecksum(number, src, dst, uint16(len(msg)))
	}
	binary.BigEndian.PutUint16(msg[at:], ^checksum.Checksum(msg, sum))

	r, err := o.stack.FindRoute(nicID, src, dst, proto, false)
	if err != nil {
		return
	}
	defer r.Release()
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: int(r.MaxHeaderLength()) + header.ICMPv4MinimumSize,
		Payload:            buffer.MakeWithData(msg[header.ICMPv4MinimumSize:]),
	})
	defer pkt.DecRef()
	copy(pkt.TransportHeader().Push(header.ICMPv4MinimumSize), msg)
	pkt.TransportProtocolNumber = number
	r.WritePacket(stack.NetworkHeaderParams{Protocol: number, TTL: r.DefaultTTL(), TOS: stack.DefaultTOS}, pkt)
}

// quote is the beginning of a packet of the guest's, as an ICMP error quotes it (RFC 792, RFC 4443 §3.1).
type quote struct {
	guest, dst tcpip.Address
	proto      tcpip.TransportProtocolNumber
	l4         [8]byte
}

func quoteTCP(id stack.TransportEndpointID, seq uint32) quote {
	q := quotePorts(id, header.TCPProtocolNumber)
	binary.BigEndian.PutUint32(q.l4[4:], seq)
	return q
}

func quoteUDP(id stack.TransportEndpointID) quote {
	q := quotePorts(id, header.UDPProtocolNumber)
	binary.BigEndian.PutUint16(q.l4[4:], header.UDPMinimumSize)
	return q
}

func quotePorts(id stack.TransportEndpointID, proto tcpip.TransportProtocolNumber) quote {
	q := quote{guest: id.RemoteAddress, dst: id.LocalAddress, proto: proto}
	binary.BigEndian.PutUint16(q.l4[0:], id.RemotePort)
	binary.BigEndian.PutUint16(q.l4[2:], id.LocalPort)
	return q
}

// reasons are the host's errors as codes of "destination unreachable" in ICMPv4 and ICMPv6.
var reasons = []struct {
	err    error
	v4, v6 byte
}{
	{syscall.ENETUNREACH, 0, 0},
	{syscall.EHOSTUNREACH, 1, 3},
	{syscall.EADDRNOTAVAIL, 0, 0}, // the host has no address of that kind
	{syscall.EAFNOSUPPORT, 0, 0},
	{syscall.EACCES, 13, 1},
	{syscall.EPERM, 13, 1},
	{syscall.ECONNREFUSED, 3, 4},
}

// unreachable tells whether err means that no packet gets there, as opposed to an answer of the other end.
func unreachable(err error) bool {
	for _, r := range reasons {
		if errors.Is(err, r.err) {
			return r.err != syscall.ECONNREFUSED
		}
	}
	return false
}

// unreachable sends "destination unreachable" for the packet in q, if err is a reason for that.
func (o *icmpOut) unreachable(q quote, err error) {
	for _, r := range reasons {
		if !errors.Is(err, r.err) {
			continue
		}
		if q.dst.Len() == header.IPv6AddressSize {
			o.send(stackAddr(o.opts.Host6), q.guest, q.message6(r.v6))
		} else {
			o.send(stackAddr(o.opts.Host), q.guest, q.message4(r.v4))
		}
		return
	}
}

// unusedLen is the length of the ICMP error's own header.
const unusedLen = 8

func (q *quote) message4(code byte) []byte {
	m := make([]byte, unusedLen+header.IPv4MinimumSize+len(q.l4))
	m[0], m[1] = byte(header.ICMPv4DstUnreachable), code
	ip := header.IPv4(m[unusedLen:])
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(ip)), TTL: defaultHops, Protocol: uint8(q.proto), SrcAddr: q.guest, DstAddr: q.dst,
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	copy(ip[header.IPv4MinimumSize:], q.l4[:])
	return m
}

func (q *quote) message6(code byte) []byte {
	m := make([]byte, unusedLen+header.IPv6MinimumSize+len(q.l4))
	m[0], m[1] = byte(header.ICMPv6DstUnreachable), code
	header.IPv6(m[unusedLen:]).Encode(&header.IPv6Fields{
		PayloadLength: uint16(len(q.l4)), TransportProtocol: q.proto, HopLimit: defaultHops, SrcAddr: q.guest, DstAddr: q.dst,
	})
	copy(m[unusedLen+header.IPv6MinimumSize:], q.l4[:])
	return m
}
