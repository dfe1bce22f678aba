package config

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Switch is [switch.NAME]. Zero stands for the default of the switch.
type Switch struct {
	Name         string
	MaxAddresses int
	Ageing       time.Duration
	MTU          int // bytes
	Hold         time.Duration
	Backlog      int // frames
	BacklogBytes int
}

var switchKeys = keys[Switch]{
	{name: "max-addresses", form: "addresses", field: func(s *Switch) any { return &s.MaxAddresses }, lo: 16, hi: 1 << 20},
	{name: "ageing", form: `a duration like "5m"`, field: func(s *Switch) any { return &s.Ageing }, lo: int64(time.Second), hi: int64(24 * time.Hour)},
	{name: "mtu", form: "bytes", field: func(s *Switch) any { return &s.MTU }, lo: minMTU, hi: maxMTU},
	{name: "hold", form: `a duration like "2ms"`, field: func(s *Switch) any { return &s.Hold }, lo: int64(time.Microsecond), hi: int64(time.Second)},
	{name: "backlog", form: "frames", field: func(s *Switch) any { return &s.Backlog }, lo: 1, hi: 1 << 15},
	{name: "backlog-bytes", form: "bytes", field: func(s *Switch) any { return &s.BacklogBytes }, lo: 1 << 17, hi: 1 << 30},
}

// Uplink is [uplink.NAME]: a network that is a port of a switch.
type Uplink struct {
	Name      string
	Net       string
	Switch    string
	MTU       int // bytes; 0: the device's
	Queues    int // pairs; 0: 1, or what Net says
	ZeroCopy  string
	NoBalloon bool
	Rules
}

var defaultUplink = Uplink{ZeroCopy: "auto"}

var uplinkKeys = append(keys[Uplink]{
	{name: "net", form: "a network as --net has it", field: func(u *Uplink) any { return &u.Net }},
	{name: "switch", form: "the name of a switch", field: func(u *Uplink) any { return &u.Switch }},
	{name: "mtu", form: "bytes", field: func(u *Uplink) any { return &u.MTU }, lo: minMTU, hi: maxMTU},
	{name: "queues", form: "queue pairs", field: func(u *Uplink) any { return &u.Queues }, lo: 1, hi: maxPair},
	{name: "zerocopy", form: `"auto", "on" or "off"`, field: func(u *Uplink) any { return &u.ZeroCopy }, check: oneOf("auto", "on", "off")},
	{name: "no-balloon", form: "true or false", field: func(u *Uplink) any { return &u.NoBalloon }},
}, rulesOf(func(u *Uplink) *Rules { return &u.Rules })...)

// Rules are what a switch holds one of its ports to. A port that runs takes new ones at once.
type Rules struct {
	Access       int      // VLAN; 0: that of the switch's default, unless there is a trunk
	Trunk        []string // VLANs, each a number or a range like 10-20
	Native       int      // VLAN of a trunk's untagged frames; 0: none
	Isolated     bool
	MACs         []string // that the guest may have; empty: any
	IPs          []string // addresses or prefixes that it may have; empty: any
	NoDHCPServer bool
	NoRouter     bool
	FromGuest    Limit
	ToGuest      Limit
	Broadcast    int // frames per second that it may send, as are the next two; 0: any number
	Multicast    int
	Unknown      int // to addresses that the switch does not know
	MaxAddresses int // that are learned on the port; 0: the switch's default
}

// Limit is a rate, and what may come at once. 0 is no limit, or a default.
type Limit struct{ Frames, Bytes, BurstFrames, BurstBytes int }

// maxVLAN is the largest VLAN identifier (IEEE 802.1Q: 4095 is reserved).
const maxVLAN = 4094

// rulesOf are the keys of a table that has Rules.
func rulesOf[T any](of func(*T) *Rules) keys[T] {
	ks := keys[T]{
		{name: "vlan.access", form: "a VLAN", field: func(t *T) any { return &of(t).Access }, lo: 1, hi: maxVLAN},
		{name: "vlan.trunk", form: `VLANs like "10" and "20-29"`, field: func(t *T) any { return &of(t).Trunk }, check: checkVLANs},
		{name: "vlan.native", form: "a VLAN", field: func(t *T) any { return &of(t).Native }, lo: 1, hi: maxVLAN},
		{name: "isolated", form: "true or false", field: func(t *T) any { return &of(t).Isolated }},
		{name: "guard.mac", form: "addresses like 52:54:00:12:34:56", field: func(t *T) any { return &of(t).MACs }, check: checkMAC},
		{name: "guard.ip", form: `addresses or prefixes like "10.0.0.5" and "fd00::/64"`, field: func(t *T) any { return &of(t).IPs }, check: checkIP},
		{name: "guard.no-dhcp-server", form: "true or false", field: func(t *T) any { return &of(t).NoDHCPServer }},
		{name: "guard.no-router", form: "true or false", field: func(t *T) any { return &of(t).NoRouter }},
		{name: "storm.broadcast", form: "frames per second", field: func(t *T) any { return &of(t).Broadcast }, hi: unbounded},
		{name: "storm.multicast", form: "frames per second", field: func(t *T) any { return &of(t).Multicast }, hi: unbounded},
		{name: "storm.unknown-unicast", form: "frames per second", field: func(t *T) any { return &of(t).Unknown }, hi: unbounded},
		{name: "max-addresses", form: "addresses", field: func(t *T) any { return &of(t).MaxAddresses }, lo: 1, hi: 1 << 20},
	}
	for _, l := range []struct {
		name string
		of   func(*T) *Limit
	}{
		{"from-guest", func(t *T) *Limit { return &of(t).FromGuest }},
		{"to-guest", func(t *T) *Limit { return &of(t).ToGuest }},
	} {
		ks = append(ks,
			key[T]{name: l.name + ".frames", form: "per second", field: func(t *T) any { return &l.of(t).Frames }, hi: unbounded},
			key[T]{name: l.name + ".bytes", form: "per second", field: func(t *T) any { return &l.of(t).Bytes }, hi: unbounded},
			key[T]{name: l.name + ".burst-frames", form: "at once", field: func(t *T) any { return &l.of(t).BurstFrames }, hi: unbounded},
			key[T]{name: l.name + ".burst-bytes", form: "at once", field: func(t *T) any { return &l.of(t).BurstBytes }, hi: unbounded})
	}
	for i := range ks {
		ks[i].live = true
	}
	return ks
}

// VLANs reads an element of Rules.Trunk.
func VLANs(s string) (first, last int, err error) {
	a, b, ranged := strings.Cut(s, "-")
	if !ranged {
		b = a
	}
	first, err1 := strconv.Atoi(a)
	last, err2 := strconv.Atoi(b)
	if err1 != nil || err2 != nil || first < 1 || last > maxVLAN || first > last {
		return 0, 0, fmt.Errorf("want a VLAN from 1 to %d, or a range like 10-20, not %q", maxVLAN, s)
	}
	return first, last, nil
}

func checkVLANs(s string) error { _, _, err := VLANs(s); return err }

// MAC reads an element of Rules.MACs.
func MAC(s string) (mac [6]byte, err error) {
	a, err := net.ParseMAC(s)
	if err != nil || len(a) != len(mac) || a[0]&1 != 0 {
		return mac, fmt.Errorf("want an address of one station, like 52:54:00:12:34:56, not %q", s)
	}
	if copy(mac[:], a); mac == [6]byte{} {
		return mac, errors.New("all zero is no address")
	}
	return mac, nil
}

func checkMAC(s string) error { _, err := MAC(s); return err }

// IP reads an element of Rules.IPs. An address is a prefix of full length.
func IP(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return p, fmt.Errorf(`want an address or a prefix, like "10.0.0.5" and "fd00::/64", not %q`, s)
	}
	return p, nil
}

func checkIP(s string) error { _, err := IP(s); return err }

func (r Rules) clone() Rules {
	r.Trunk, r.MACs, r.IPs = slices.Clone(r.Trunk), slices.Clone(r.MACs), slices.Clone(r.IPs)
	return r
}

// checkRules looks for what contradicts itself, and for rules where nobody enforces them.
func (f *File) checkRules(path, sw string, r *Rules) {
	if r.Access != 0 && (len(r.Trunk) > 0 || r.Native != 0) {
		f.Blame(path+".vlan.access", errors.New("a port is either an access port or a trunk, and this one has vlan.trunk or vlan.native as well"))
	}
	_, known := f.Switches[sw]
	switch {
	case sw != "" && !known && len(f.Switches) == 0:
		f.Blame(path+".switch", fmt.Errorf("there is no switch %q, nor any other", sw))
	case sw != "" && !known:
		f.Blame(path+".switch", fmt.Errorf("there is no switch %q%s", sw, suggest(sw, slices.Sorted(maps.Keys(f.Switches)))))
	}
}

// checkUplinks looks at what one key does not tell.
func (f *File) checkUplinks() {
	for _, name := range slices.Sorted(maps.Keys(f.Uplinks)) {
		u, path := f.Uplinks[name], "uplink."+name
		if u.Net == "" && !f.says(path, "net") {
			f.Blame(path, errors.New("net is missing: which network the switch is joined to"))
		}
		if u.Switch == "" && !f.says(path, "switch") {
			f.Blame(path, errors.New("switch is missing: which one is joined to the network"))
		}
		if p, ok := f.Ports[name]; ok && p.Switch == u.Switch && u.Switch != "" {
			f.Blame(path, fmt.Errorf("switch %s has a port of that name: choose another", u.Switch))
		}
		f.checkRules(path, u.Switch, &u.Rules)
	}
}
