package user

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

var testRouter = link{mac: "\x52\x55\x0a\x00\x02\x02"}

// ipFrame is a frame of the guest's, with a transport part of these bytes.
func guestFrame(src, dst string, proto tcpip.TransportProtocolNumber, l4 []byte) []byte {
	from := link{mac: guestMAC}
	f, body := from.ipFrame(testRouter.mac, netip.MustParseAddr(src), netip.MustParseAddr(dst), proto, 64, len(l4))
	copy(body, l4)
	return f
}

func synFrame(src, dst string, sport, dport uint16) []byte {
	h := make(header.TCP, header.TCPMinimumSize)
	h.Encode(&header.TCPFields{SrcPort: sport, DstPort: dport, SeqNum: 77, DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagSyn, WindowSize: 1024})
	setSum(h, header.TCPProtocolNumber, src, dst, header.TCPChecksumOffset)
	return guestFrame(src, dst, header.TCPProtocolNumber, h)
}

func udpFrame(src, dst string, sport, dport uint16, payload []byte) []byte {
	h := make(header.UDP, header.UDPMinimumSize+len(payload))
	h.Encode(&header.UDPFields{SrcPort: sport, DstPort: dport, Length: uint16(len(h))})
	copy(h.Payload(), payload)
	setSum(h, header.UDPProtocolNumber, src, dst, 6)
	return guestFrame(src, dst, header.UDPProtocolNumber, h)
}

func setSum(l4 []byte, proto tcpip.TransportProtocolNumber, src, dst string, at int) {
	s := header.PseudoHeaderChecksum(proto, stackAddr(netip.MustParseAddr(src)), stackAddr(netip.MustParseAddr(dst)), uint16(len(l4)))
	v := ^checksum.Checksum(l4, s)
	l4[at], l4[at+1] = byte(v>>8), byte(v)
}
