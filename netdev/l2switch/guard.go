package l2switch

import (
	"encoding/binary"
	"net/netip"

	"github.com/vhostd/vhostd/virtio"
)

// IP protocols, and IPv6 extension headers (RFC 8200 §4).
const (
	protoHopByHop = 0
	protoUDP      = 17
	protoRouting  = 43
	protoFragment = 44
	protoAuth     = 51
	protoICMPv6   = 58
	protoDestOpts = 60
	protoMobility = 135
)

// Ports of DHCP (RFC 2131) and DHCPv6 (RFC 8415). What comes from a server's port or goes to a client's is from a server.
const (
	dhcpServer   = 67
	dhcpClient   = 68
	dhcp6Client  = 546
	dhcp6Server  = 547
	arpLen       = 28
	ipv6Len      = 40
	minIPv4      = 20
	ndOptionUnit = 8
)

// ICMPv6 types of neighbour discovery (RFC 4861), and where their options begin.
const (
	routerSolicit = 133
	routerAdvert  = 134
	neighSolicit  = 135
	neighAdvert   = 136
	redirect      = 137
)

var ndOptions = map[byte]int{routerSolicit: 8, routerAdvert: 16, neighSolicit: 24, neighAdvert: 24, redirect: 40}

// Options of neighbour discovery.
const (
	ndSourceLink = 1
	ndTargetLink = 2
)

// transport is where the transport header of an IP packet is, and what.
type transport struct {
	proto    byte
	at       int  // offset in head
	fragment bool // it is in pieces
	later    bool // and this is not the first: there is no header here
}

// judge checks a frame of a guest that is not trusted. All that it looks at is in head, which is what arrives.
func (f *frame) judge(r *rules) (why Reason, ok bool) {
	l3 := etherLen + f.tag
	switch f.inner {
	case typeARP, typeRARP:
		return f.judgeARP(r, l3)
	case typeIPv4:
		return f.judgeIPv4(r, l3)
	case typeIPv6:
		return f.judgeIPv6(r, l3)
	}
	// A checksum to be completed could rewrite what was checked.
	return DropProtocol, len(r.ips) == 0 && !isTag(f.inner) && f.hdr().Flags&virtio.NetHdrNeedsCsum == 0
}

// judgeARP checks who is said to have which address (RFC 826, RFC 903).
func (f *frame) judgeARP(r *rules, at int) (why Reason, ok bool) {
	if len(f.head) < at+arpLen || f.hdr().Flags&virtio.NetHdrNeedsCsum != 0 {
		return DropARP, false
	}
	h := f.head[at:]
	if binary.BigEndian.Uint64(h)>>16 != 0x0001_0800_0604 {
		return DropARP, false // not Ethernet and IPv4
	}
	ip, target := netip.AddrFrom4([4]byte(h[14:18])), netip.AddrFrom4([4]byte(h[24:28]))
	if ip.IsUnspecified() && f.inner == typeARP {
		ip = target // a probe: whoever is about to take this address gives it up (RFC 5227 §2.1.1)
	}
	return DropARP, r.owns(macOf(h[8:])) && (ip.IsUnspecified() || r.allows(ip))
}

// judgeIPv4 checks a packet's source, and what it is of DHCP.
func (f *frame) judgeIPv4(r *rules, at int) (why Reason, ok bool) {
	if len(f.head) < at+minIPv4 {
		return DropMalformed, false
	}
	h := f.head[at:]
	n := int(h[0]&15) * 4
	if h[0]>>4 != 4 || n < minIPv4 || len(h) < n {
		return DropMalformed, false
	}
	frag := binary.BigEndian.Uint16(h[6:])
	t := transport{proto: h[9], at: at + n, fragment: frag&0x3fff != 0, later: frag&0x1fff != 0}
	if why, ok = f.judgeTransport(r, t, dhcpServer, dhcpClient); !ok {
		return why, false
	}
	src := netip.AddrFrom4([4]byte(h[12:16]))
	if src.IsUnspecified() {
		return DropIP, len(r.ips) == 0 || f.asksDHCP(t)
	}
	return DropIP, r.allows(src)
}

// asksDHCP tells a message of a DHCP client, which has no address yet.
func (f *frame) asksDHCP(t transport) bool {
	return t.proto == protoUDP && !t.fragment && binary.BigEndian.Uint32(f.head[t.at:]) == dhcpClient<<16|dhcpServer
}

// judgeTransport checks the ports of UDP, and that a checksum to be completed leaves alone what is checked here.
func (f *frame) judgeTransport(r *rules, t transport, server, client uint16) (why Reason, ok bool) {
	if f.hdr().Flags&virtio.NetHdrNeedsCsum != 0 {
		at := int(f.hdr().CsumStart) + int(f.hdr().CsumOffset)
		if at < t.at+4 || t.later || t.proto == protoICMPv6 {
			return DropMalformed, false
		}
	}
	if t.later || t.proto != protoUDP {
		return 0, true
	}
	if len(f.head) < t.at+8 {
		return DropMalformed, false
	}
	from, to := binary.BigEndian.Uint16(f.head[t.at:]), binary.BigEndian.Uint16(f.head[t.at+2:])
	return DropDHCP, !r.cfg.Guard.NoDHCPServer || from != server && to != client
}

// judgeIPv6 is judgeIPv4 for IPv6, and checks neighbour discovery.
func (f *frame) judgeIPv6(r *rules, at int) (why Reason, ok bool) {
	if len(f.head) < at+ipv6Len || f.head[at]>>4 != 6 {
		return DropMalformed, false
	}
	t, ok := f.chain(at)
	if !ok {
		return DropProtocol, false
	}
	if why, ok = f.judgeTransport(r, t, dhcp6Server, dhcp6Client); !ok {
		return why, false
	}
	if t.proto == protoICMPv6 && !t.later {
		if why, ok = f.judgeICMPv6(r, t); !ok {
			return why, false
		}
	}
	src := netip.AddrFrom16([16]byte(f.head[at+8 : at+24]))
	if !src.IsUnspecified() {
		return DropIP, r.allows(src)
	}
	// Before it has an address a guest asks whether anybody else does, and joins groups.
	switch {
	case len(r.ips) == 0:
		return 0, true
	case t.proto != protoICMPv6, t.fragment:
		return DropIP, false
	case f.head[t.at] == neighSolicit: // whoever is about to take this address gives it up (RFC 4862 §5.4.3)
		return DropND, r.allows(netip.AddrFrom16([16]byte(f.head[t.at+8 : t.at+24])))
	}
	return 0, true
}

// chain follows the headers of an IPv6 packet up to the transport's. It reports false when they do not end in head: who lets such a first fragment pass lets
// everything pass (RFC 7113).
func (f *frame) chain(at int) (t transport, ok bool) {
	h := f.head
	t = transport{proto: h[at+6], at: at + ipv6Len}
	for {
		n := 0
		switch t.proto {
		case protoHopByHop, protoRouting, protoDestOpts, protoMobility:
			if len(h) >= t.at+2 {
				n = 8 + 8*int(h[t.at+1])
			}
		case protoAuth:
			if len(h) >= t.at+2 {
				n = 8 + 4*int(h[t.at+1])
			}
		case protoFragment:
			if len(h) >= t.at+8 {
				n = 8
				field := binary.BigEndian.Uint16(h[t.at+2:])
				t.fragment, t.later = true, field>>3 != 0
			}
		default:
			return t, true
		}
		if n == 0 || len(h) < t.at+n {
			return t, false
		}
		t.proto, t.at = h[t.at], t.at+n
		if t.later {
			return t, true
		}
	}
}

// judgeICMPv6 checks what routers and neighbours say.
func (f *frame) judgeICMPv6(r *rules, t transport) (why Reason, ok bool) {
	if len(f.head) < t.at+8 {
		return DropMalformed, false
	}
	h := f.head[t.at:]
	kind := h[0]
	options, nd := ndOptions[kind]
	switch {
	case !nd:
		return 0, true
	case r.cfg.Guard.NoRouter && (kind == routerAdvert || kind == redirect):
		return DropRouter, false
	case t.fragment, len(h) < options:
		return DropND, false // RFC 6980
	case r.macs == nil && len(r.ips) == 0:
		return 0, true
	case kind == neighAdvert && !r.allows(netip.AddrFrom16([16]byte(h[8:24]))):
		return DropND, false
	}
	return DropND, len(f.head) == f.length && ownLinks(r, kind, h[options:])
}

// ownLinks checks the link-layer addresses among the options of neighbour discovery: those that say where the sender is.
func ownLinks(r *rules, kind byte, options []byte) bool {
	for len(options) >= ndOptionUnit {
		n := ndOptionUnit * int(options[1])
		if n == 0 || n > len(options) {
			return false
		}
		mine := options[0] == ndSourceLink || options[0] == ndTargetLink && kind == neighAdvert
		if mine && !r.owns(macOf(options[2:])) {
			return false
		}
		options = options[n:]
	}
	return true
}
