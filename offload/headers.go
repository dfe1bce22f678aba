package offload

import (
	"encoding/binary"
	"errors"

	"github.com/vhostd/vhostd/virtio"
)

// MaxHeaders is the most bytes of headers that a frame may have to be cut, and that a segment may have. Ethernet with two VLAN tags, the
// longest IPv4 header and the longest TCP header are 142; the rest is for IPv6 extension headers.
const MaxHeaders = 256

// MaxSegments is the most segments that one frame is cut into: 64 KiB at 8 bytes, which is as small as Linux makes them.
const MaxSegments = 8192

// Errors of Segmenter.Start: whose fault they are is always the frame's, which is to be dropped. They are plain values, so that a guest
// that sends nothing else costs no memory.
var (
	ErrTruncated  = errors.New("frame ends within its headers")
	ErrHeaders    = errors.New("headers are longer than 256 bytes")
	ErrCsum       = errors.New("checksum lies beyond the frame, or beyond 256 bytes, or not where the segments' headers have it")
	ErrGSOType    = errors.New("unknown gso_type")
	ErrGSOSize    = errors.New("gso_size is 0, or a segment of it does not fit an IP packet")
	ErrSegments   = errors.New("frame would be cut into more than 8192 segments")
	ErrProtocol   = errors.New("headers are not those that gso_type says")
	ErrFragment   = errors.New("frame to be cut is a fragment already")
	ErrExtensions = errors.New("IPv6 extension header that cannot be cut")
)

// Ethernet types and IP protocol numbers.
const (
	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
	etherVLAN = 0x8100 // IEEE 802.1Q
	etherQinQ = 0x88a8 // IEEE 802.1ad

	protoHopByHop = 0
	protoTCP      = 6
	protoUDP      = 17
	protoRouting  = 43
	protoFragment = 44
	protoDestOpts = 60
)

// Offsets and lengths in bytes within the IP, TCP and UDP headers.
const (
	ip4Len = 20
	ip6Len = 40
	tcpLen = 20
	udpLen = 8

	tcpCsum = 16
	udpCsum = 6
)

// layout says where the headers of a frame lie, in bytes from its beginning.
type layout struct {
	l3, l4 int
	next   int // the byte that says what the l4 header is: IPv4's protocol, or the last next-header of IPv6
	v6     bool
	proto  uint8
	routed bool // an IPv6 routing header with segments left: the pseudo-header's destination is not the one in the IPv6 header
}

var be = binary.BigEndian

// parse finds the headers of the frame that begins with h, which is all of it or its first MaxHeaders bytes.
func parse(h []byte) (l layout, err error) {
	at := 12
	for {
		if len(h) < at+2 {
			return l, ErrTruncated
		}
		etype := be.Uint16(h[at:])
		at += 2
		switch etype {
		case etherVLAN, etherQinQ:
			at += 2
			continue
		case etherIPv4:
			err = l.parseIPv4(h, at)
		case etherIPv6:
			err = l.parseIPv6(h, at)
		default:
			err = ErrProtocol
		}
		return l, err
	}
}

func (l *layout) parseIPv4(h []byte, at int) error {
	if len(h) < at+ip4Len {
		return ErrTruncated
	}
	ihl := int(h[at]&0xf) * 4
	if h[at]>>4 != 4 || ihl < ip4Len {
		return ErrProtocol
	}
	const moreAndOffset = 0x3fff
	if be.Uint16(h[at+6:])&moreAndOffset != 0 {
		return ErrFragment
	}
	l.l3, l.l4, l.next, l.proto = at, at+ihl, at+9, h[at+9]
	return nil
}

// parseIPv6 walks the extension headers that stand before the l4 header. Each is at least 8 bytes long, so the walk ends.
func (l *layout) parseIPv6(h []byte, at int) error {
	if len(h) < at+ip6Len {
		return ErrTruncated
	}
	if h[at]>>4 != 6 {
		return ErrProtocol
	}
	l.v6, l.l3, l.l4, l.next, l.proto = true, at, at+ip6Len, at+6, h[at+6]
	for {
		switch l.proto {
		case protoTCP, protoUDP:
			return nil
		case protoFragment:
			return ErrFragment
		case protoHopByHop, protoRouting, protoDestOpts:
		default:
			return ErrExtensions
		}
		if len(h) < l.l4+8 {
			return ErrTruncated
		}
		if l.proto == protoRouting && h[l.l4+3] != 0 {
			l.routed = true
		}
		l.next, l.proto = l.l4, h[l.l4]
		l.l4 += 8 + 8*int(h[l.l4+1])
	}
}

// l4Len is the length of the TCP or UDP header, which must lie in h.
func (l *layout) l4Len(h []byte) (int, error) {
	if l.proto == protoUDP {
		if len(h) < l.l4+udpLen {
			return 0, ErrTruncated
		}
		return udpLen, nil
	}
	if len(h) < l.l4+tcpLen {
		return 0, ErrTruncated
	}
	n := int(h[l.l4+12]>>4) * 4
	if n < tcpLen {
		return 0, ErrProtocol
	}
	if len(h) < l.l4+n {
		return 0, ErrTruncated
	}
	return n, nil
}

// is reports whether the headers are those of the segmentation type gso.
func (l *layout) is(gso uint8) bool {
	switch gso {
	case virtio.GSOTCPv4:
		return l.proto == protoTCP && !l.v6
	case virtio.GSOTCPv6:
		return l.proto == protoTCP && l.v6
	default:
		return l.proto == protoUDP
	}
}

// pseudo is the sum of the pseudo-header's addresses and protocol: all of it but the length, which differs by segment. h are the frame's
// headers, and total the bytes of its l4 header and payload.
func (l *layout) pseudo(h []byte, csumAt, total int) Sum {
	var s Sum
	switch {
	case l.routed:
		// Only the driver knows the last destination: its own sum serves, less the length that it counted.
		s.AddWord(be.Uint16(h[csumAt:]))
		s.AddWord(^uint16(total))
		s.AddWord(^uint16(total >> 16))
		return s
	case l.v6:
		s.Add(h[l.l3+8 : l.l3+ip6Len])
	default:
		s.Add(h[l.l3+12 : l.l3+ip4Len])
	}
	s.AddWord(uint16(l.proto))
	return s
}
