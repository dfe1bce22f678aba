package l2switch

import (
	"encoding/binary"
	"net/netip"
)

// macMask is an Ethernet address in the low bits of a station.
const macMask = 1<<48 - 1

// rules are a port's configuration as the data path uses it. They are replaced as a whole.
type rules struct {
	cfg     PortConfig
	maxLen  int // of a frame without tag, in bytes
	macs    map[uint64]struct{}
	ips     []netip.Prefix
	trunk   *[(maxVLAN + 1 + 63) / 64]uint64 // tagged VLANs; nil: an access port
	pvid    uint16                           // of untagged frames; 0: they are dropped
	guarded bool                             // more than the Ethernet header decides

	fromGuest, toGuest limiter
	storm              [numStorms]bucketRate
}

// newRules returns the rules of c. Buckets of limits go on as they stand in before, if it is not nil and they have not changed.
func newRules(c PortConfig, before *rules) (*rules, error) {
	r := &rules{cfg: c, maxLen: c.MTU, pvid: c.VLAN.Access}
	if c.MTU == 0 {
		r.maxLen = maxMTU
	}
	r.maxLen += etherLen
	if c.VLAN.Access == 0 {
		r.pvid, r.trunk = c.VLAN.Native, new([(maxVLAN + 1 + 63) / 64]uint64)
		for _, t := range c.VLAN.Trunk {
			for v := t.First; v <= t.Last; v++ {
				r.trunk[v/64] |= 1 << (v % 64)
			}
		}
	}
	g := c.Guard
	if len(g.MACs) > 0 {
		r.macs = map[uint64]struct{}{}
	}
	for _, m := range g.MACs {
		r.macs[macOf(m[:])] = struct{}{}
	}
	r.guarded = len(g.MACs) > 0 || len(g.IPs) > 0 || g.NoDHCPServer || g.NoRouter
	if len(g.IPs) > 0 {
		r.ips = append(r.ips, g.IPs...)
		for _, m := range g.MACs {
			r.ips = append(r.ips, netip.PrefixFrom(linkLocal(m), 128))
		}
	}
	r.limit(before)
	return r, nil
}

// linkLocal is the IPv6 address that follows from an Ethernet address (RFC 4291, appendix A).
func linkLocal(m MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]})
}

// carries tells whether the port is in a VLAN.
func (r *rules) carries(vid uint16) bool { return vid == r.pvid || r.tagged(vid) }

// tagged tells whether a VLAN's frames carry its tag here.
func (r *rules) tagged(vid uint16) bool {
	return vid != r.pvid && r.trunk != nil && vid <= maxVLAN && r.trunk[vid/64]>>(vid%64)&1 != 0
}

// allows tells whether the guest may claim an address.
func (r *rules) allows(a netip.Addr) bool {
	if len(r.ips) == 0 {
		return true
	}
	for _, p := range r.ips {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// owns tells whether the guest may have an Ethernet address.
func (r *rules) owns(mac uint64) bool {
	if r.macs == nil {
		return true
	}
	_, ok := r.macs[mac]
	return ok
}

// macOf packs an Ethernet address.
func macOf(b []byte) uint64 {
	return uint64(binary.BigEndian.Uint16(b))<<32 | uint64(binary.BigEndian.Uint32(b[2:6]))
}
