package udp

import "encoding/binary"

// headLen is how many bytes of a frame are copied to decide on it: Ethernet with two VLAN tags, IPv6, and ports.
const headLen = 14 + 8 + 40 + 4

const (
	etherVLAN  = 0x8100
	etherQinQ  = 0x88a8
	etherIPv4  = 0x0800
	etherIPv6  = 0x86dd
	protoTCP   = 6
	protoUDP   = 17
	protoSCTP  = 132
	fragmented = 0x3fff // more fragments, or an offset
)

// flowHash is equal for frames of one flow, in one direction: by addresses and ports where the frame is IP's, else by Ethernet addresses.
// Fragments of a datagram count as a flow without ports, so that they stay together.
func flowHash(h []byte) uint32 {
	if len(h) < etherHdr {
		return 0
	}
	off := 12
	proto := binary.BigEndian.Uint16(h[off:])
	for (proto == etherVLAN || proto == etherQinQ) && len(h) >= off+6 {
		off += 4
		proto = binary.BigEndian.Uint16(h[off:])
	}
	ip := h[off+2:]
	switch {
	case proto == etherIPv4 && len(ip) >= 20 && ip[0]>>4 == 4:
		l4 := int(ip[0]&15) * 4
		s := mix(uint32(ip[9]), ip[12:20])
		if binary.BigEndian.Uint16(ip[6:])&fragmented == 0 && hasPorts(ip[9]) && l4 >= 20 && len(ip) >= l4+4 {
			s = mix(s, ip[l4:l4+4])
		}
		return finish(s)
	case proto == etherIPv6 && len(ip) >= 40 && ip[0]>>4 == 6:
		s := mix(uint32(ip[6]), ip[8:40])
		if hasPorts(ip[6]) && len(ip) >= 44 {
			s = mix(s, ip[40:44])
		}
		return finish(s)
	}
	return finish(mix(uint32(proto), h[:12]))
}

// flowLen is how many of a frame's first bytes flowHash looks at, as far as h, some of them, tells; else headLen.
func flowLen(h []byte) int {
	off := 12
	for len(h) >= off+2 {
		switch binary.BigEndian.Uint16(h[off:]) {
		case etherVLAN, etherQinQ:
			off += 4
			continue
		case etherIPv6:
			return min(off+2+44, headLen)
		case etherIPv4:
			if ip := h[off+2:]; len(ip) > 0 {
				return min(off+2+max(20, int(ip[0]&15)*4)+4, headLen)
			}
			return headLen
		}
		return off + 2
	}
	return headLen
}

func hasPorts(proto byte) bool { return proto == protoTCP || proto == protoUDP || proto == protoSCTP }

// mix takes in b, four bytes at a time.
func mix(s uint32, b []byte) uint32 {
	for ; len(b) >= 4; b = b[4:] {
		s = (s ^ binary.LittleEndian.Uint32(b)) * 0x9e3779b1
		s ^= s >> 15
	}
	return s
}

func finish(s uint32) uint32 {
	s *= 0x85ebca6b
	return s ^ s>>13
}
