package l2switch_test

import (
	"net/netip"
	"testing"

	"github.com/vhostd/vhostd/netdev/l2switch"
	"github.com/vhostd/vhostd/virtio"
)

const (
	tIPv4, tARP, tRARP, tIPv6      = 0x0800, 0x0806, 0x8035, 0x86dd
	pTCP, pUDP, pICMPv6, pFragment = 6, 17, 58, 44
	pHopByHop, pDestOpts           = 0, 60
)

// guarded is a lab with a guest that is not trusted, me, and another.
func guarded(t *testing.T) *lab {
	return newLab(t, l2switch.Config{},
		l2switch.PortConfig{Name: "me", Guard: l2switch.Guard{
			MACs:         []l2switch.MAC{mac(1)},
			IPs:          []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::1/128")},
			NoDHCPServer: true, NoRouter: true,
		}},
		l2switch.PortConfig{Name: "other"})
}

// TestGuardLetsHonestGuestsPass sends what a guest needs to live.
func TestGuardLetsHonestGuestsPass(t *testing.T) {
	l := guarded(t)
	me, you := mac(1), mac(2)
	for name, f := range map[string][]byte{
		"ARP request":           ether(everybody, me, tARP, arp(1, me, "192.0.2.1", "192.0.2.2")),
		"ARP reply":             ether(you, me, tARP, arp(2, me, "192.0.2.1", "192.0.2.2")),
		"ARP probe":             ether(everybody, me, tARP, arp(1, me, "0.0.0.0", "192.0.2.1")),
		"RARP announcement":     ether(everybody, me, tRARP, arp(3, me, "0.0.0.0", "0.0.0.0")),
		"IPv4":                  ether(you, me, tIPv4, ip4("192.0.2.1", "192.0.2.2", pTCP, 0, udp(1, 2)...)),
		"IPv4 fragment":         ether(you, me, tIPv4, ip4("192.0.2.1", "192.0.2.2", pUDP, 0x2000|100, udp(67, 68)...)),
		"DHCP discover":         ether(everybody, me, tIPv4, ip4("0.0.0.0", "255.255.255.255", pUDP, 0, udp(68, 67)...)),
		"IPv6":                  ether(you, me, tIPv6, ip6("2001:db8::1", "2001:db8::2", pTCP, udp(1, 2)...)),
		"IPv6 link-local":       ether(you, me, tIPv6, ip6("fe80::ff:fe00:1", "fe80::2", pUDP, udp(546, 547)...)),
		"IPv6 DAD":              ether(everybody, me, tIPv6, ip6("::", "ff02::1:ff00:1", pICMPv6, nd(135, 24, "2001:db8::1")...)),
		"IPv6 MLD":              ether(everybody, me, tIPv6, ip6("::", "ff02::16", pHopByHop, cat(ext(pICMPv6), nd(143, 8, ""))...)),
		"neighbour solicit":     ether(everybody, me, tIPv6, ip6("2001:db8::1", "ff02::1:ff00:2", pICMPv6, nd(135, 24, "2001:db8::2", link(1, me))...)),
		"neighbour advert":      ether(you, me, tIPv6, ip6("2001:db8::1", "2001:db8::2", pICMPv6, nd(136, 24, "2001:db8::1", link(2, me))...)),
		"router solicit":        ether(everybody, me, tIPv6, ip6("fe80::ff:fe00:1", "ff02::2", pICMPv6, nd(133, 8, "", link(1, me))...)),
		"extension headers":     ether(you, me, tIPv6, ip6("2001:db8::1", "2001:db8::2", pHopByHop, cat(ext(pDestOpts), ext(pTCP), udp(1, 2))...)),
		"first IPv6 fragment":   ether(you, me, tIPv6, ip6("2001:db8::1", "2001:db8::2", pFragment, cat(fragment(pUDP, 0), udp(1, 2))...)),
		"later IPv6 fragment":   ether(you, me, tIPv6, ip6("2001:db8::1", "2001:db8::2", pFragment, cat(fragment(pUDP, 9), udp(547, 546))...)),
		"ARP in a priority tag": tag(ether(everybody, me, tARP, arp(1, me, "192.0.2.1", "192.0.2.2")), 0),
	} {
		want := f
		if name == "ARP in a priority tag" {
			want = ether(everybody, me, tARP, arp(1, me, "192.0.2.1", "192.0.2.2"))
		}
		l.passes("me", "other", f, want)
	}
	if d := l.stats("me").Drops; len(d) > 0 {
		t.Errorf("dropped %v", d)
	}
}

// TestGuardStopsImpostors sends what a guest must not say, in all the ways of saying it that are known to have fooled others.
func TestGuardStopsImpostors(t *testing.T) {
	l := guarded(t)
	me, you := mac(1), mac(2)
	dests := func(n int) (all []byte) {
		for range n {
			all = append(all, ext(pDestOpts)...)
		}
		return all
	}
	for name, c := range map[string]struct {
		f   []byte
		why l2switch.Reason
	}{
		"another's MAC":                        {ether(you, mac(3), tIPv4, ip4("192.0.2.1", "192.0.2.2", pTCP, 0, udp(1, 2)...)), l2switch.DropMAC},
		"a group's MAC":                        {ether(you, l2switch.MAC{3, 0, 0, 0, 0, 1}, tIPv4), l2switch.DropMalformed},
		"no MAC":                               {ether(you, l2switch.MAC{}, tIPv4), l2switch.DropMalformed},
		"another's IPv4":                       {ether(you, me, tIPv4, ip4("192.0.2.3", "192.0.2.2", pTCP, 0, udp(1, 2)...)), l2switch.DropIP},
		"another's IPv4 in a later fragment":   {ether(you, me, tIPv4, ip4("192.0.2.3", "192.0.2.2", pUDP, 7, udp(1, 2)...)), l2switch.DropIP},
		"no IPv4, and not to ask for one":      {ether(you, me, tIPv4, ip4("0.0.0.0", "192.0.2.2", pTCP, 0, udp(68, 67)...)), l2switch.DropIP},
		"IPv4 of version 6":                    {ether(you, me, tIPv4, ip6("2001:db8::1", "2001:db8::2", pTCP, udp(1, 2)...)), l2switch.DropMalformed},
		"IPv4 with a header of 4 bytes":        {ether(you, me, tIPv4, []byte{0x41, 0, 0, 40}), l2switch.DropMalformed},
		"another's IPv6":                       {ether(you, me, tIPv6, ip6("2001:db8::3", "2001:db8::2", pTCP, udp(1, 2)...)), l2switch.DropIP},
		"another's link-local address":         {ether(you, me, tIPv6, ip6("fe80::3", "fe80::2", pTCP, udp(1, 2)...)), l2switch.DropIP},
		"no IPv6, and no ICMPv6":               {ether(you, me, tIPv6, ip6("::", "fe80::2", pUDP, udp(1, 2)...)), l2switch.DropIP},
		"ARP with another's MAC":               {ether(you, me, tARP, arp(2, mac(3), "192.0.2.1", "192.0.2.2")), l2switch.DropARP},
		"ARP with another's IP":                {ether(you, me, tARP, arp(2, me, "192.0.2.3", "192.0.2.2")), l2switch.DropARP},
		"gratuitous ARP with another's IP":     {ether(everybody, me, tARP, arp(1, me, "192.0.2.3", "192.0.2.3")), l2switch.DropARP},
		"ARP probe for another's IP":           {ether(everybody, me, tARP, arp(1, me, "0.0.0.0", "192.0.2.2")), l2switch.DropARP},
		"IPv6 DAD for another's address":       {ether(everybody, me, tIPv6, ip6("::", "ff02::1:ff00:2", pICMPv6, nd(135, 24, "2001:db8::2")...)), l2switch.DropND},
		"ARP of another hardware":              {ether(you, me, tARP, []byte{0, 6, 8, 0, 6, 4, 0, 2}), l2switch.DropARP},
		"ARP that ends early":                  {ether(you, me, tARP, arp(2, me, "192.0.2.1", "192.0.2.2"))[:40], l2switch.DropARP},
		"RARP for another":                     {ether(everybody, me, tRARP, arp(3, mac(3), "0.0.0.0", "0.0.0.0")), l2switch.DropARP},
		"advertisement of another's IPv6":      {ether(you, me, tIPv6, ip6("2001:db8::1", "2001:db8::2", pICMPv6, nd(136, 24, "2001:db8::3", link(2, me))...)), l2switch.DropND},
		"advertisement of another's MAC":       {ether(you, me, tIPv6, ip6("2001:db8::1", "2001:db8::2", pICMPv6, nd(136, 24, "2001:db8::1", link(2, mac(3)))...)), l2switch.DropND},
		"another's MAC in the second option":   {ether(you, me, tIPv6, ip6("2001:db8::1", "2001:db8::2", pICMPv6, nd(136, 24, "2001:db8::1", link(14, me), link(2, mac(3)))...)), l2switch.DropND},
		"solicitation with another's MAC":      {ether(you, me, tIPv6, ip6("2001:db8::1", "2001:db8::2", pICMPv6, nd(135, 24, "2001:db8::2", link(1, mac(3)))...)), l2switch.DropND},
		"an option of no length":               {ether(you, me, tIPv6, ip6("2001:db8::1", "2001:db8::2", pICMPv6, nd(136, 24, "2001:db8::1", []byte{14, 0, 0, 0, 0, 0, 0, 0})...)), l2switch.DropND},
		"discovery in a fragment":              {ether(you, me, tIPv6, ip6("2001:db8::1", "2001:db8::2", pFragment, cat(fragment(pICMPv6, 0), nd(136, 24, "2001:db8::1", link(2, me)))...)), l2switch.DropND},
		"discovery behind options":             {ether(you, me, tIPv6, ip6("2001:db8::1", "2001:db8::2", pDestOpts, cat(ext(pICMPv6), nd(136, 24, "2001:db8::3", link(2, me)))...)), l2switch.DropND},
		"a router's advertisement":             {ether(everybody, me, tIPv6, ip6("fe80::ff:fe00:1", "ff02::1", pICMPv6, nd(134, 16, "")...)), l2switch.DropRouter},
		"a router's, behind options":           {ether(everybody, me, tIPv6, ip6("fe80::ff:fe00:1", "ff02::1", pHopByHop, cat(ext(pDestOpts), ext(pICMPv6), nd(134, 16, ""))...)), l2switch.DropRouter},
		"a router's, in a fragment":            {ether(everybody, me, tIPv6, ip6("fe80::ff:fe00:1", "ff02::1", pFragment, cat(fragment(pICMPv6, 0), nd(134, 16, ""))...)), l2switch.DropRouter},
		"a router's, its header in the second": {ether(everybody, me, tIPv6, ip6("fe80::ff:fe00:1", "ff02::1", pFragment, fragment(pDestOpts, 0)...))[:62], l2switch.DropProtocol},
		"a router's, behind too many options":  {ether(everybody, me, tIPv6, ip6("fe80::ff:fe00:1", "ff02::1", pDestOpts, cat(dests(30), ext(pICMPv6), nd(134, 16, ""))...)), l2switch.DropProtocol},
		"a redirect":                           {ether(you, me, tIPv6, ip6("fe80::ff:fe00:1", "fe80::2", pICMPv6, nd(137, 40, "")...)), l2switch.DropRouter},
		"a DHCP offer":                         {ether(everybody, me, tIPv4, ip4("192.0.2.1", "255.255.255.255", pUDP, 0, udp(67, 68)...)), l2switch.DropDHCP},
		"a DHCP offer from another port":       {ether(everybody, me, tIPv4, ip4("192.0.2.1", "255.255.255.255", pUDP, 0, udp(1067, 68)...)), l2switch.DropDHCP},
		"a DHCP offer in a first fragment":     {ether(everybody, me, tIPv4, ip4("192.0.2.1", "255.255.255.255", pUDP, 0x2000, udp(67, 68)...)), l2switch.DropDHCP},
		"a DHCPv6 reply":                       {ether(you, me, tIPv6, ip6("fe80::ff:fe00:1", "fe80::2", pUDP, udp(547, 546)...)), l2switch.DropDHCP},
		"a DHCPv6 reply from another port":     {ether(you, me, tIPv6, ip6("fe80::ff:fe00:1", "fe80::2", pDestOpts, cat(ext(pUDP), udp(999, 546))...)), l2switch.DropDHCP},
		"a UDP header that ends early":         {ether(you, me, tIPv4, ip4("192.0.2.1", "192.0.2.2", pUDP, 0))[:38], l2switch.DropMalformed},
		"another protocol":                     {ether(you, me, 0x88b5), l2switch.DropProtocol},
		"IPv4 in LLC":                          {ether(you, me, 48, []byte{0xaa, 0xaa, 3, 0, 0, 0, 8, 0}, ip4("192.0.2.3", "192.0.2.2", pTCP, 0)), l2switch.DropProtocol},
		"a tag of another kind":                {ether(you, me, 0x88a8, []byte{0, 1, 8, 0}), l2switch.DropVLAN},
	} {
		t.Run(name, func(t *testing.T) {
			sub := *l
			sub.T = t
			sub.dropped("me", c.f, "me", c.why, "other")
		})
	}
}

// TestGuardChecksumsRewriteNothing: a checksum that is yet to be completed must not land on what was checked.
func TestGuardChecksumsRewriteNothing(t *testing.T) {
	l := guarded(t)
	f := ether(mac(2), mac(1), tIPv4, ip4("192.0.2.1", "192.0.2.2", pUDP, 0, udp(1000, 2000)...))
	hdr := func(start, off uint16) virtio.NetHdr {
		return virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, CsumStart: start, CsumOffset: off}
	}
	for _, h := range []virtio.NetHdr{hdr(14, 12), hdr(26, 0), hdr(0, 6), hdr(34, 0), hdr(34, 2)} {
		l.droppedHdr("me", h, f, "me", l2switch.DropMalformed, "other")
	}
	l.droppedHdr("me", hdr(14, 14), ether(mac(2), mac(1), tARP, arp(2, mac(1), "192.0.2.1", "192.0.2.2")), "me", l2switch.DropARP, "other")
	na := ether(mac(2), mac(1), tIPv6, ip6("2001:db8::1", "2001:db8::2", pICMPv6, nd(136, 24, "2001:db8::1", link(2, mac(1)))...))
	l.droppedHdr("me", hdr(54, 10), na, "me", l2switch.DropMalformed, "other")
	l.send("me", hdr(34, 6), f) // where UDP has its checksum
	if h, got := l.peers["other"].Capture(); h.CsumStart != 34 || len(got) != len(f) {
		t.Errorf("%+v, %x", h, got)
	}
}

// TestGuardDecidesOnWhatArrives: a guest that rewrites a frame after it was judged does not change what comes out.
func TestGuardDecidesOnWhatArrives(t *testing.T) {
	l := guarded(t)
	good := ether(mac(2), mac(1), tARP, arp(2, mac(1), "192.0.2.1", "192.0.2.2"))
	page := append([]byte(nil), good...)
	l.send("me", virtio.NetHdr{}, page) // it waits in a lane, with the page
	copy(page, ether(mac(2), mac(3), tARP, arp(2, mac(3), "192.0.2.3", "192.0.2.2")))
	l.expect("other", good)
}

// TestGuardedAddressIsNobodyElses: what one port owns another can neither have learned nor claim.
func TestGuardedAddressIsNobodyElses(t *testing.T) {
	l := newLab(t, l2switch.Config{}, l2switch.PortConfig{Name: "thief"}, l2switch.PortConfig{Name: "other"})
	l.passes("thief", "other", ether(everybody, mac(1), tIPv4), nil) // before anybody owns it
	l.add(l2switch.PortConfig{Name: "owner", Guard: l2switch.Guard{MACs: []l2switch.MAC{mac(1)}}})
	l.dropped("thief", ether(everybody, mac(1), tIPv4), "thief", l2switch.DropMAC, "other", "owner")
	l.passes("other", "owner", ether(mac(1), mac(2), tIPv4), nil) // it was never heard of, and is known all the same
	l.nothing("thief")
	if _, err := l.s.AddPort(l2switch.PortConfig{Name: "second", Guard: l2switch.Guard{MACs: []l2switch.MAC{mac(1)}}}); err == nil {
		t.Error("two ports own one address")
	}
}
