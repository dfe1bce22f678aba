package udp

import "encoding/binary"

// Mode is how a frame lies in its datagram.
type Mode uint8

// The modes.
const (
	VXLAN  Mode = iota + 1 // RFC 7348
	Geneve                 // RFC 8926
	Dgram                  // the frame and nothing else
)

// String is the mode's name in options.
func (m Mode) String() string {
	switch m {
	case VXLAN:
		return "vxlan"
	case Geneve:
		return "geneve"
	case Dgram:
		return "dgram"
	}
	return "unknown"
}

// Sizes in bytes, and ports assigned by IANA.
const (
	tunnelHdr  = 8 // VXLAN's header, and Geneve's without options
	etherHdr   = 14
	maxPayload = 65507 // of a UDP datagram over IPv4

	vxlanPort  = 4789
	genevePort = 6081
	maxVNI     = 1<<24 - 1
)

// overhead is what the tunnel adds to an IP packet of the guest's, in bytes: its Ethernet header, and what comes before that.
func (m Mode) overhead(v6 bool) int {
	n := 20 + 8 + etherHdr
	if v6 {
		n += 20
	}
	if m != Dgram {
		n += tunnelHdr
	}
	return n
}

// header is what goes before every frame of this network.
func (m Mode) header(vni uint32) []byte {
	if m == Dgram {
		return nil
	}
	h := make([]byte, tunnelHdr)
	if m == VXLAN {
		h[0] = vxlanHasVNI
	} else {
		binary.BigEndian.PutUint16(h[2:], genevePayload)
	}
	binary.BigEndian.PutUint32(h[4:], vni<<8)
	return h
}

const (
	vxlanHasVNI     = 0x08   // flag I (RFC 7348 §5)
	geneveVersion   = 0xc0   // bits of the first byte (RFC 8926 §3.4)
	geneveOptions   = 0x3f   // and the rest of it: length of the options in units of 4 bytes
	geneveControl   = 0x80   // flag O: not a frame
	geneveCritical  = 0x40   // flag C: options that must be understood
	genevePayload   = 0x6558 // protocol type: Ethernet
	geneveUnit      = 4
	minInnerFrame   = etherHdr
	multicastSource = 0x01 // bit of a source address's first byte
)

// verdict is why a datagram carries no frame for the guest.
type verdict uint8

const (
	good      verdict = iota
	malformed         // not what the mode says
	otherVNI
)

// frame finds the Ethernet frame in a datagram from outside.
func (m Mode) frame(d []byte, vni uint32) ([]byte, verdict) {
	skip := 0
	if m != Dgram {
		if len(d) < tunnelHdr {
			return nil, malformed
		}
		skip = tunnelHdr
		switch {
		case m == VXLAN && d[0]&vxlanHasVNI == 0:
			return nil, malformed
		case m == Geneve && (d[0]&geneveVersion != 0 || d[1]&(geneveControl|geneveCritical) != 0 ||
			binary.BigEndian.Uint16(d[2:]) != genevePayload):
			return nil, malformed
		case m == Geneve:
			skip += int(d[0]&geneveOptions) * geneveUnit
		}
		if binary.BigEndian.Uint32(d[4:])>>8 != vni {
			return nil, otherVNI
		}
	}
	if len(d) < skip+minInnerFrame {
		return nil, malformed
	}
	return d[skip:], good
}
