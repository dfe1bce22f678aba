package user

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/vhostd/vhostd/virtio"
)

// l4Part is where the transport's part of a frame lies.
type l4Part struct {
	start, end int // in the frame
	proto      tcpip.TransportProtocolNumber
	src, dst   tcpip.Address
	fragment   bool
}

// bytes is the part, or nil when it is not all there.
func (p *l4Part) bytes(f *frame) []byte {
	if p.start > p.end || p.end > len(f.data) {
		return nil
	}
	return f.data[p.start:p.end]
}

// skipExtensions leaves IPv6's extension headers (RFC 8200 §4) before the part, so that it is the transport's, or a fragment of that. It reports false when
// one of them is not all there.
func (p *l4Part) skipExtensions(f *frame) bool {
	const unit = 8 // bytes; a header's length does not count the first one
	for {
		switch header.IPv6ExtensionHeaderIdentifier(p.proto) {
		case header.IPv6HopByHopOptionsExtHdrIdentifier, header.IPv6RoutingExtHdrIdentifier, header.IPv6DestinationOptionsExtHdrIdentifier:
		case header.IPv6FragmentExtHdrIdentifier:
			p.fragment = true
			return true
		default:
			return true
		}
		if p.start+unit > min(p.end, len(f.data)) {
			return false
		}
		h := f.data[p.start:]
		p.proto = tcpip.TransportProtocolNumber(h[0])
		p.start += unit * (1 + int(h[1]))
	}
}

// udp is the part as a whole datagram of sound length, or nil.
func (p *l4Part) udp(f *frame) header.UDP {
	u := header.UDP(p.bytes(f))
	if p.proto != header.UDPProtocolNumber || p.fragment || len(u) < header.UDPMinimumSize {
		return nil
	}
	if n := int(u.Length()); n >= header.UDPMinimumSize && n <= len(u) {
		return u[:n]
	}
	return nil
}

// checksumOffset is where the transport keeps its checksum, -1 for others than TCP and UDP.
func (p *l4Part) checksumOffset() int {
	switch p.proto {
	case header.TCPProtocolNumber:
		return header.TCPChecksumOffset
	case header.UDPProtocolNumber:
		const udpChecksumOffset = 6
		return udpChecksumOffset
	}
	return -1
}

// verify makes sure that the stack, which takes the checksums of TCP and UDP as verified, may do so. A partial checksum of
// the packet itself was never on a wire. One that lies deeper, in a tunnel of the guest's, is completed: nobody will do so later.
func (p *l4Part) verify(f *frame) verdict {
	at := p.checksumOffset()
	if f.hdr.Flags&virtio.NetHdrNeedsCsum != 0 {
		if at >= 0 && !p.fragment && int(f.hdr.CsumStart) == p.start && int(f.hdr.CsumOffset) == at {
			return toStack
		}
		if !complete(f) {
			return refuse
		}
	}
	if at < 0 || p.fragment {
		return toStack
	}
	b := p.bytes(f)
	if len(b) < at+2 {
		return refuse
	}
	if p.proto == header.UDPProtocolNumber && p.src.Len() == header.IPv4AddressSize && binary.BigEndian.Uint16(b[at:]) == 0 {
		return toStack // the sender has computed none
	}
	if checksum.Checksum(b, header.PseudoHeaderChecksum(p.proto, p.src, p.dst, uint16(len(b)))) != 0xffff {
		return refuse
	}
	return toStack
}

// complete computes the checksum that the virtio-net header leaves partial (virtio-v1.2 §5.1.6.2).
func complete(f *frame) bool {
	start := int(f.hdr.CsumStart)
	at := start + int(f.hdr.CsumOffset)
	if len(f.data) < f.size || at+2 > len(f.data) {
		return false
	}
	sum := ^checksum.Checksum(f.data[start:], 0)
	if sum == 0 {
		sum = 0xffff // the same number, and for UDP not "none"
	}
	binary.BigEndian.PutUint16(f.data[at:], sum)
	return true
}
