package l2switch_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/vhostd/vhostd/netdev/l2switch"
	"github.com/vhostd/vhostd/virtio"
)

// clocked is a lab whose time stands still until it is told.
func clocked(t *testing.T, c l2switch.Config, ports ...l2switch.PortConfig) (l *lab, forward func(time.Duration)) {
	var now time.Duration
	l = newLab(t, c)
	l.s.SetClock(func() time.Duration { return now })
	for _, p := range ports {
		l.add(p)
	}
	return l, func(d time.Duration) { now += d }
}

func TestVLANs(t *testing.T) {
	l := newLab(t, l2switch.Config{},
		l2switch.PortConfig{Name: "ten", VLAN: l2switch.VLAN{Access: 10}},
		l2switch.PortConfig{Name: "ten too", VLAN: l2switch.VLAN{Access: 10}},
		l2switch.PortConfig{Name: "twenty", VLAN: l2switch.VLAN{Access: 20}},
		l2switch.PortConfig{Name: "trunk", VLAN: l2switch.VLAN{Trunk: []l2switch.VLANRange{{First: 5, Last: 15}, {First: 20, Last: 20}}, Native: 30}},
		l2switch.PortConfig{Name: "thirty", VLAN: l2switch.VLAN{Access: 30}},
	)
	all := func(n int) []byte { return ether(everybody, mac(n), 0x88b5, []byte(fmt.Sprint("from ", n))) }

	l.passes("ten", "ten too", all(1), nil) // an access port's frame stays in its VLAN, and has its tag on a trunk
	l.expect("trunk", tag(all(1), 10))
	l.nothing("twenty")
	l.nothing("thirty")

	l.passes("trunk", "ten", tag(all(2), 10), all(2)) // and the other way
	l.expect("ten too", all(2))
	l.nothing("twenty")
	l.passes("trunk", "twenty", tag(all(3), 20), all(3))
	l.nothing("ten")

	l.passes("trunk", "thirty", all(4), nil) // the native VLAN has no tag
	l.passes("thirty", "trunk", all(5), nil)
	l.nothing("ten")

	others := []string{"ten", "ten too", "twenty", "thirty"}
	l.dropped("trunk", tag(all(6), 16), "trunk", l2switch.DropVLAN, others...)
	l.dropped("trunk", tag(all(6), 4095), "trunk", l2switch.DropVLAN, others...)
	l.dropped("ten", tag(all(7), 10), "ten", l2switch.DropVLAN, "ten too", "trunk", "twenty") // an access port takes no tag, not even its own
	l.dropped("ten", tag(all(7), 20), "ten", l2switch.DropVLAN, "ten too", "trunk", "twenty")
	l.passes("ten", "ten too", tag(all(1), 0), all(1)) // but a priority
	l.expect("trunk", tag(all(1), 10))
}

// TestVLANHopsByDoubleTag: a second tag never becomes the first.
func TestVLANHopsByDoubleTag(t *testing.T) {
	l := newLab(t, l2switch.Config{},
		l2switch.PortConfig{Name: "access", VLAN: l2switch.VLAN{Access: 1}},
		l2switch.PortConfig{Name: "trunk", VLAN: l2switch.VLAN{Trunk: []l2switch.VLANRange{{First: 2, Last: 20}}, Native: 1}},
		l2switch.PortConfig{Name: "trunk too", VLAN: l2switch.VLAN{Trunk: []l2switch.VLANRange{{First: 1, Last: 20}}}},
		l2switch.PortConfig{Name: "victim", VLAN: l2switch.VLAN{Access: 20}},
	)
	f := ether(everybody, mac(1), 0x88b5)
	l.dropped("access", tag(tag(f, 20), 1), "access", l2switch.DropVLAN, "trunk", "trunk too", "victim")
	l.dropped("access", tag(tag(f, 20), 0), "access", l2switch.DropVLAN, "trunk", "trunk too", "victim")
	l.dropped("trunk", tag(tag(f, 20), 0), "trunk", l2switch.DropVLAN, "trunk too", "victim", "access")
	// Tagged with 1, a frame would leave the first trunk without that tag, and with the other in its place.
	l.dropped("trunk too", tag(tag(f, 20), 1), "trunk", l2switch.DropVLANOut, "trunk", "victim", "access")
	// Where the first tag stays, the second is data.
	l.passes("trunk", "trunk too", tag(tag(f, 20), 15), nil)
}

// TestVLANTagMovesOffsets: a header's offsets follow the tag that goes in or out.
func TestVLANTagMovesOffsets(t *testing.T) {
	l := newLab(t, l2switch.Config{},
		l2switch.PortConfig{Name: "access", VLAN: l2switch.VLAN{Access: 7}},
		l2switch.PortConfig{Name: "trunk", VLAN: l2switch.VLAN{Trunk: []l2switch.VLANRange{{First: 7, Last: 7}}}},
	)
	f := ether(everybody, mac(1), tIPv4, ip4("192.0.2.1", "192.0.2.2", pUDP, 0, udp(1, 2)...))
	hdr := virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, HdrLen: 42, CsumStart: 34, CsumOffset: 6}
	l.send("access", hdr, f)
	if h, got := l.peers["trunk"].Capture(); h.CsumStart != 38 || h.HdrLen != 46 || len(got) != len(f)+4 {
		t.Errorf("%+v, %d bytes", h, len(got))
	}
	hdr.CsumStart, hdr.HdrLen = 38, 46
	l.send("trunk", hdr, tag(f, 7))
	if h, got := l.peers["access"].Capture(); h.CsumStart != 34 || h.HdrLen != 42 || len(got) != len(f) {
		t.Errorf("%+v, %d bytes", h, len(got))
	}
	hdr.CsumStart = 2 // would be in front of the frame without the tag
	l.droppedHdr("trunk", hdr, tag(f, 7), "access", l2switch.DropVLANOut, "access")
}

func TestIsolation(t *testing.T) {
	l := newLab(t, l2switch.Config{},
		l2switch.PortConfig{Name: "a", Isolated: true}, l2switch.PortConfig{Name: "b", Isolated: true}, l2switch.PortConfig{Name: "gateway"})
	l.passes("a", "gateway", ether(everybody, mac(1), 0x88b5), nil)
	l.nothing("b")
	l.passes("b", "gateway", ether(everybody, mac(2), 0x88b5), nil)
	l.nothing("a")
	l.dropped("a", ether(mac(2), mac(1), 0x88b5), "a", l2switch.DropIsolated, "b", "gateway")
	l.passes("gateway", "a", ether(mac(1), mac(3), 0x88b5), nil)
	if err := l.s.Update(l2switch.PortConfig{Name: "b"}); err != nil {
		t.Fatal(err)
	}
	l.passes("a", "b", ether(mac(2), mac(1), 0x88b5), nil)
}

func TestMTU(t *testing.T) {
	l := newLab(t, l2switch.Config{MTU: 1500}, l2switch.PortConfig{Name: "a", MTU: 9000}, l2switch.PortConfig{Name: "b"})
	long := func(n int) []byte { return ether(everybody, mac(1), 0x88b5, make([]byte, n)) }
	l.passes("a", "b", long(1500), nil)
	l.dropped("a", long(1501), "b", l2switch.DropMTUOut, "b")
	l.dropped("a", long(9001), "a", l2switch.DropMTU, "b")
	l.dropped("b", long(1501), "b", l2switch.DropMTU, "a")
	// A frame that will be cut counts as what it is cut into.
	f := ether(everybody, mac(1), tIPv4, ip4("192.0.2.1", "192.0.2.2", pTCP, 0, make([]byte, 4000)...))
	f[34+12] = 5 << 4
	hdr := virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, GSOType: virtio.GSOTCPv4, GSOSize: 1460, HdrLen: 54, CsumStart: 34, CsumOffset: 16}
	l.send("a", hdr, f)
	l.expect("b", f)
	hdr.GSOSize = 1461
	l.droppedHdr("a", hdr, f, "b", l2switch.DropMTUOut, "b")
}

func TestReservedAndOwnPort(t *testing.T) {
	l := newLab(t, l2switch.Config{}, l2switch.PortConfig{Name: "a"}, l2switch.PortConfig{Name: "b"})
	for _, last := range []byte{0, 2, 3, 0xe, 0xf} {
		l.dropped("a", ether(l2switch.MAC{1, 0x80, 0xc2, 0, 0, last}, mac(1), 0x88cc), "a", l2switch.DropReserved, "b")
	}
	l.passes("a", "b", ether(l2switch.MAC{1, 0x80, 0xc2, 0, 0, 0x10}, mac(1), 0x88cc), nil)
	l.passes("a", "b", ether(everybody, mac(2), 0x88b5), nil) // two stations behind one port
	l.dropped("a", ether(mac(2), mac(1), 0x88b5), "a", l2switch.DropSamePort, "b")
}

func TestStormControl(t *testing.T) {
	l, forward := clocked(t, l2switch.Config{},
		l2switch.PortConfig{Name: "a", Storm: l2switch.Storm{Broadcast: 100, Multicast: 50, UnknownUnicast: 20}}, l2switch.PortConfig{Name: "b"})
	for _, c := range []struct {
		dst   l2switch.MAC
		burst int
		why   l2switch.Reason
	}{
		{everybody, 10, l2switch.DropStormBroadcast},
		{l2switch.MAC{1, 0, 0x5e, 1, 2, 3}, 5, l2switch.DropStormMulticast},
		{mac(9), 2, l2switch.DropStormUnknown},
	} {
		for range 2 {
			for range c.burst {
				l.passes("a", "b", ether(c.dst, mac(1), 0x88b5), nil)
			}
			l.dropped("a", ether(c.dst, mac(1), 0x88b5), "a", c.why, "b")
			forward(99 * time.Millisecond)
			forward(2 * time.Millisecond)
		}
	}
	l.passes("b", "a", ether(everybody, mac(2), 0x88b5), nil)
	for range 1000 { // a frame to somebody is no storm
		l.passes("a", "b", ether(mac(2), mac(1), 0x88b5), nil)
	}
}

func TestLimits(t *testing.T) {
	for _, c := range []struct {
		name string
		from l2switch.Limit
		to   l2switch.Limit
		at   string
		why  l2switch.Reason
		fit  int // frames of 1000 bytes in a burst
	}{
		{"frames from", l2switch.Limit{Frames: 100, BurstFrames: 7}, l2switch.Limit{}, "a", l2switch.DropLimit, 7},
		{"frames to", l2switch.Limit{}, l2switch.Limit{Frames: 100, BurstFrames: 7}, "b", l2switch.DropLimitOut, 7},
		{"bytes from", l2switch.Limit{Bytes: 1e6, BurstBytes: 100_000}, l2switch.Limit{}, "a", l2switch.DropLimit, 100},
		{"bytes to", l2switch.Limit{}, l2switch.Limit{Bytes: 1e6, BurstBytes: 100_000}, "b", l2switch.DropLimitOut, 100},
		{"both from", l2switch.Limit{Frames: 100, Bytes: 1e6, BurstFrames: 50, BurstBytes: 100_000}, l2switch.Limit{}, "a", l2switch.DropLimit, 50},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, forward := clocked(t, l2switch.Config{},
				l2switch.PortConfig{Name: "a", FromGuest: c.from}, l2switch.PortConfig{Name: "b", ToGuest: c.to})
			f := ether(everybody, mac(1), 0x88b5, make([]byte, 986))
			for range c.fit {
				l.passes("a", "b", f, nil)
			}
			l.dropped("a", f, c.at, c.why, "b")
			forward(10 * time.Millisecond) // one frame's worth of either
			switch {
			case c.from.Bytes > 0, c.to.Bytes > 0, c.from.Frames > 0, c.to.Frames > 0:
				l.passes("a", "b", f, nil)
			}
			if c.from.Bytes == 0 && c.to.Bytes == 0 {
				l.dropped("a", f, c.at, c.why, "b")
			}
			forward(time.Hour) // no more than a burst comes together
			for range c.fit {
				l.passes("a", "b", f, nil)
			}
			l.dropped("a", f, c.at, c.why, "b")
			// The same limits again are no new burst; no limits are none.
			if err := l.s.Update(l2switch.PortConfig{Name: "a", FromGuest: c.from}); err != nil {
				t.Fatal(err)
			}
			l.dropped("a", f, c.at, c.why, "b")
			for _, name := range []string{"a", "b"} {
				if err := l.s.Update(l2switch.PortConfig{Name: name}); err != nil {
					t.Fatal(err)
				}
			}
			for range 3 * c.fit {
				l.passes("a", "b", f, nil)
			}
		})
	}
}

func TestLearningAndAgeing(t *testing.T) {
	l, forward := clocked(t, l2switch.Config{Ageing: 10 * time.Second},
		l2switch.PortConfig{Name: "a"}, l2switch.PortConfig{Name: "b"}, l2switch.PortConfig{Name: "c"})
	l.passes("a", "b", ether(everybody, mac(1), 0x88b5), nil)
	l.expect("c", ether(everybody, mac(1), 0x88b5))
	to1 := ether(mac(1), mac(2), 0x88b5)
	l.passes("b", "a", to1, nil)
	l.nothing("c")
	forward(10 * time.Second)
	l.passes("b", "a", to1, nil)
	l.nothing("c")
	forward(time.Second) // not heard of for 11 seconds
	l.passes("b", "a", to1, nil)
	l.expect("c", to1)
	l.passes("a", "b", ether(mac(2), mac(1), 0x88b5), nil) // heard of again; 2 was all the time
	l.nothing("c")
	l.passes("c", "a", ether(everybody, mac(1), 0x88b5), nil) // it has moved
	l.expect("b", ether(everybody, mac(1), 0x88b5))
	l.passes("b", "c", to1, nil)
	l.nothing("a")
	if st := l.s.Stats(); st.Moves != 1 || st.Addresses != 2 {
		t.Errorf("%+v", st)
	}
	if err := l.ports["c"].Close(); err != nil { // what was behind it is forgotten
		t.Fatal(err)
	}
	l.passes("b", "a", to1, nil)
	if n := len(l.s.Table()); n != 1 {
		t.Errorf("%d addresses: %v", n, l.s.Table())
	}
}

// TestInventedAddressesTakeNothingFromOthers floods the table from one port.
func TestInventedAddressesTakeNothingFromOthers(t *testing.T) {
	l, forward := clocked(t, l2switch.Config{MaxAddresses: 1024, Ageing: 10 * time.Second},
		l2switch.PortConfig{Name: "a"}, l2switch.PortConfig{Name: "b", MaxAddresses: 600}, l2switch.PortConfig{Name: "flood", MaxAddresses: 500})
	for i := range 500 {
		l.passes("b", "a", ether(everybody, mac(0x1000+i), 0x88b5), nil)
		l.expect("flood", ether(everybody, mac(0x1000+i), 0x88b5))
	}
	f := ether(mac(0x1000), mac(0), 0x88b5)
	for i := range uint32(20000) {
		binary.BigEndian.PutUint32(f[8:], 0x77000000+i)
		l.send("flood", virtio.NetHdr{}, f)
		l.expect("b", f)
	}
	check := func(flood int) {
		t.Helper()
		entries, counted, shares := l.s.FullCheck()
		if entries != counted || counted != shares || l.stats("b").Addresses != 500 || l.stats("flood").Addresses > flood {
			t.Fatalf("%d entries, %d counted, %d in shares; b has %d, flood %d", entries, counted, shares, l.stats("b").Addresses, l.stats("flood").Addresses)
		}
	}
	check(500)
	for i := range 500 { // none of them was forgotten
		l.passes("a", "b", ether(mac(0x1000+i), mac(1), 0x88b5), nil)
	}
	l.nothing("flood")
	if l.stats("flood").NotLearned < 19000 {
		t.Errorf("%+v", l.stats("flood"))
	}
	forward(time.Second)
	for i := range 500 { // a port that has as many as it may gets none that others have, either
		l.passes("flood", "a", ether(mac(1), mac(0x1000+i), 0x88b5), nil)
	}
	check(500)
	forward(5 * time.Second)
	for i := range 500 {
		l.passes("b", "a", ether(mac(1), mac(0x1000+i), 0x88b5), nil) // b's are heard of again
	}
	forward(6 * time.Second) // what was invented has aged, and makes room
	before := l.stats("flood").NotLearned
	for i := range uint32(500) {
		binary.BigEndian.PutUint32(f[8:], 0x78000000+i)
		l.send("flood", virtio.NetHdr{}, f)
		l.expect("b", f)
	}
	if n := l.stats("flood").NotLearned - before; n > 0 {
		t.Errorf("%d addresses were not learned although there was room", n)
	}
	check(500)
}

func TestConfigIsChecked(t *testing.T) {
	for _, c := range []l2switch.Config{
		{MaxAddresses: 1}, {MaxAddresses: 1 << 21}, {Ageing: time.Millisecond}, {Hold: -1}, {Hold: time.Hour}, {Backlog: -1}, {Backlog: 1 << 20},
		{BacklogBytes: 100}, {MTU: 67}, {MTU: 65536},
	} {
		if _, err := l2switch.New(c); err == nil {
			t.Errorf("%+v is accepted", c)
		}
	}
	s := newSwitch(t, l2switch.Config{})
	for _, c := range []l2switch.PortConfig{
		{}, {Name: "p", Pairs: 129}, {Name: "p", MTU: 1}, {Name: "p", VLAN: l2switch.VLAN{Access: 4095}},
		{Name: "p", VLAN: l2switch.VLAN{Access: 1, Native: 2}}, {Name: "p", VLAN: l2switch.VLAN{Trunk: []l2switch.VLANRange{{First: 0, Last: 3}}}},
		{Name: "p", VLAN: l2switch.VLAN{Trunk: []l2switch.VLANRange{{First: 4, Last: 3}}}}, {Name: "p", MaxAddresses: -1},
		{Name: "p", Guard: l2switch.Guard{MACs: []l2switch.MAC{{1}}}}, {Name: "p", Guard: l2switch.Guard{MACs: []l2switch.MAC{{}}}},
	} {
		if _, err := s.AddPort(c); err == nil {
			t.Errorf("%+v is accepted", c)
		}
	}
	d := addPort(t, s, l2switch.PortConfig{Name: "p"})
	if _, err := s.AddPort(l2switch.PortConfig{Name: "p"}); err == nil {
		t.Error("two ports have one name")
	}
	if err := s.Update(l2switch.PortConfig{Name: "p", Pairs: 2}); err == nil {
		t.Error("a port's queues can change")
	}
	if err := s.Update(l2switch.PortConfig{Name: "q"}); err == nil {
		t.Error("a port that is not there can change")
	}
	if err := s.RemovePort("q"); err == nil {
		t.Error("a port that is not there can go")
	}
	if err := s.RemovePort("p"); err != nil {
		t.Error(err)
	}
	addPort(t, s, l2switch.PortConfig{Name: "p"})
	if err := d.Close(); err != nil { // of the first p; the second stays
		t.Error(err)
	}
	if n := len(s.Stats().Ports); n != 1 {
		t.Errorf("%d ports", n)
	}
}

// FuzzJudge: no frame makes the judge panic, and none passes whose source is not the guest's, or that a DHCP server or a router sends; nor one that becomes so when
// a device completes its checksum.
func FuzzJudge(f *testing.F) {
	me := mac(1)
	f.Add(ether(mac(2), me, tIPv6, ip6("2001:db8::1", "2001:db8::2", pDestOpts, cat(ext(pICMPv6), nd(136, 24, "2001:db8::1", link(2, me)))...)), false, uint16(0), uint16(0))
	f.Add(ether(everybody, me, tARP, arp(1, me, "192.0.2.1", "192.0.2.2")), true, uint16(14), uint16(14))
	f.Add(tag(ether(mac(2), me, tIPv4, ip4("192.0.2.1", "192.0.2.2", pUDP, 0x2000, udp(67, 68)...)), 0), true, uint16(34), uint16(6))
	f.Add(ether(mac(2), me, tIPv4, ip4("192.0.2.1", "192.0.2.2", pUDP, 0, udp(53, 53)...)), true, uint16(34), uint16(6))
	c := l2switch.PortConfig{Name: "me", Guard: l2switch.Guard{MACs: []l2switch.MAC{me}, IPs: prefixes("192.0.2.1/32", "2001:db8::1/128"), NoDHCPServer: true, NoRouter: true}}
	f.Fuzz(func(t *testing.T, frame []byte, needsCsum bool, start, offset uint16) {
		head := append([]byte(nil), frame[:min(len(frame), 256)]...)
		if _, ok := l2switch.ParseFuzz(c, head, len(frame), needsCsum, start, offset); !ok {
			return
		}
		if wrong := mischief(head, me); wrong != "" {
			t.Fatalf("%s passed: %x", wrong, head)
		}
		if at := int(start) + int(offset); needsCsum && at+2 <= len(head) {
			head[at], head[at+1] = ^head[at], ^head[at+1]
			if wrong := mischief(head, me); wrong != "" {
				t.Fatalf("%s passed, by its checksum at %d: %x", wrong, at, head)
			}
		}
	})
}

// mischief reads a frame as plainly as can be, and tells what in it is not the guest's to send.
func mischief(head []byte, me [6]byte) string {
	at := 12
	if binary.BigEndian.Uint16(head[at:]) == 0x8100 {
		at += 4
	}
	l3 := head[at+2:]
	var claims []byte
	var proto byte
	var l4 []byte
	switch binary.BigEndian.Uint16(head[at:]) {
	case tIPv4:
		claims, proto = l3[12:16], l3[9]
		if n := int(l3[0]&15) * 4; binary.BigEndian.Uint16(l3[6:])&0x1fff == 0 && n <= len(l3) {
			l4 = l3[n:]
		}
	case tARP:
		claims = l3[14:18]
	case tIPv6:
		claims, proto, l4 = l3[8:24], l3[6], l3[40:]
	case tRARP:
		return ""
	default:
		return "another protocol"
	}
	server, client := uint16(67), uint16(68)
	if len(claims) == 16 {
		server, client = 547, 546
	}
	switch {
	case proto == pUDP && len(l4) >= 4 && (binary.BigEndian.Uint16(l4) == server || binary.BigEndian.Uint16(l4[2:]) == client):
		return "a DHCP server"
	case proto == pICMPv6 && len(claims) == 16 && len(l4) > 0 && (l4[0] == 134 || l4[0] == 137):
		return "a router"
	}
	for _, mine := range []string{"192.0.2.1", "0.0.0.0", "2001:db8::1", "fe80::ff:fe00:1", "::"} {
		if [6]byte(head[6:12]) == me && bytes.Equal(claims, addr(mine)) {
			return ""
		}
	}
	return "an impostor"
}
