package udp

import (
	"bytes"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev/netdevtest"
)

func TestParseOptions(t *testing.T) {
	for _, c := range []struct{ s, want string }{
		{"vxlan:vni=42,remote=10.0.0.2", "vxlan 42 0.0.0.0:4789 [10.0.0.2:4789] auto 0"},
		{"vxlan:vni=0,local=10.0.0.1,remote=10.0.0.2;10.0.0.3:99,port=5000", "vxlan 0 10.0.0.1:5000 [10.0.0.2:5000 10.0.0.3:99] auto 0"},
		{"geneve:vni=16777215,remote=fd00::2,zerocopy=on", "geneve 16777215 [::]:6081 [[fd00::2]:6081] on 1"},
		{"dgram:local=127.0.0.1:7001,remote=127.0.0.1:7002,zerocopy=off", "dgram 0 127.0.0.1:7001 [127.0.0.1:7002] off 0"},
		{"vxlan:vni=1,remote=10.0.0.2,remote=10.0.0.3,zerocopy-min=100", "vxlan 1 0.0.0.0:4789 [10.0.0.2:4789 10.0.0.3:4789] auto 100"},

		{"vlan:id=3", "unknown mode"},
		{"vxlan:remote=10.0.0.2", "vni=N is missing"},
		{"vxlan:vni=16777216,remote=10.0.0.2", "want a number from 0 to 16777215"},
		{"vxlan:vni=1", "0 peers"},
		{"vxlan:vni=1,remote=239.1.1.1;10.0.0.2,ttl=3", "vxlan 1 0.0.0.0:4789 [239.1.1.1:4789 10.0.0.2:4789] auto 0"},
		{"geneve:vni=1,remote=ff02::1:3,dev=eth0", "geneve 1 [::]:6081 [[ff02::1:3]:6081] auto 0"},
		{"vxlan:vni=1,remote=ff02::1:3", "name one with dev="},
		{"vxlan:vni=1,remote=0.0.0.0", "neither one host nor a multicast group"},
		{"vxlan:vni=1,remote=239.1.1.1,local=239.1.1.2", "is a group"},
		{"vxlan:vni=1,remote=239.1.1.1,ttl=256", "want a number from 1 to 255"},
		{"dgram:local=10.0.0.1:1,remote=239.1.1.1:2", "not one host"},
		{"vxlan:vni=1,remote=10.0.0.2;10.0.0.2", "given twice"},
		{"vxlan:vni=1,vni=2,remote=10.0.0.2", "vni is given twice"},
		{"vxlan:vni=1,local=fd00::1,remote=10.0.0.2", "all IPv4 or all IPv6"},
		{"vxlan:vni=1,remote=fe80::1%eth0", "dev="},
		{"vxlan:vni=1,remote=nowhere", "want an address like"},
		{"vxlan:vni=1,remote=10.0.0.2,colour=red", `unknown key "colour": known are vni=N`},
		{"vxlan:vni=1,remote=10.0.0.2,mtu", "want KEY=VALUE"},
		{"vxlan:vni=1,remote=10.0.0.2,dev=a/b", "no interface name"},
		{"vxlan:vni=1,remote=10.0.0.2,zerocopy=maybe", "want auto, on, off"},
		{"vxlan:vni=1,remote=10.0.0.2,learning=maybe", "want on or off"},
		{"vxlan:vni=1,remote=10.0.0.2,zerocopy=off,zerocopy-min=9", "leaves nothing"},
		{"dgram:local=127.0.0.1:1,remote=127.0.0.1:2;127.0.0.1:3", "dgram has one peer"},
		{"dgram:local=127.0.0.1:1,remote=127.0.0.1", "has no port"},
		{"dgram:remote=127.0.0.1:1", "local=ADDR:PORT is missing"},
		{"dgram:vni=1", `unknown key "vni"`},
	} {
		o, err := ParseOptions(c.s)
		got := fmt.Sprint(err)
		if err == nil {
			o, err = o.complete()
			got = fmt.Sprint(o.Mode, " ", o.VNI, " ", o.Local, " ", o.Remotes, " ", o.ZeroCopy, " ", o.ZeroCopyMin)
			if o.ZeroCopyPending != DefaultZeroCopyPending || o.Ports != DefaultPorts || err != nil {
				t.Errorf("%s: %+v, %v", c.s, o, err)
			}
		}
		if !strings.Contains(got, c.want) {
			t.Errorf("%s: %s, want %s", c.s, got, c.want)
		}
	}
}

func TestTunnelHeaders(t *testing.T) {
	frame := netdevtest.Frame(60, 1)
	for _, c := range []struct {
		mode Mode
		want []byte
	}{
		{VXLAN, []byte{8, 0, 0, 0, 0x12, 0x34, 0x56, 0}}, {Geneve, []byte{0, 0, 0x65, 0x58, 0x12, 0x34, 0x56, 0}}, {Dgram, nil},
	} {
		h := c.mode.header(0x123456)
		if !bytes.Equal(h, c.want) {
			t.Errorf("%v: header %x, want %x", c.mode, h, c.want)
		}
		d := append(bytes.Clone(h), frame...)
		if got, v := c.mode.frame(d, 0x123456); v != good || !bytes.Equal(got, frame) {
			t.Errorf("%v: %x, verdict %d", c.mode, got, v)
		}
		if _, v := c.mode.frame(d, 7); v != otherVNI && c.mode != Dgram {
			t.Errorf("%v: a frame of another network: verdict %d", c.mode, v)
		}
		for n := range len(h) + etherHdr {
			if _, v := c.mode.frame(d[:n], 0x123456); v != malformed {
				t.Errorf("%v: %d bytes: verdict %d", c.mode, n, v)
			}
		}
	}
	options := append([]byte{2, 0, 0x65, 0x58, 0, 0, 9, 0, 1, 2, 3, 0, 5, 6, 7, 8}, frame...)
	if got, v := Geneve.frame(options, 9); v != good || !bytes.Equal(got, frame) {
		t.Errorf("with options: %x, verdict %d", got, v)
	}
	for _, bad := range []struct {
		mode Mode
		at   int
		b    byte
	}{{VXLAN, 0, 0}, {Geneve, 0, 0x42}, {Geneve, 1, 0x80}, {Geneve, 1, 0x40}, {Geneve, 3, 0x59}, {Geneve, 0, 0x3f}} {
		d := append(bad.mode.header(9), frame...)
		d[bad.at] = bad.b
		if _, v := bad.mode.frame(d, 9); v != malformed {
			t.Errorf("%v with %#x at %d: verdict %d", bad.mode, bad.b, bad.at, v)
		}
	}
}

// TestFlowLenOfTaggedFrames: behind a VLAN tag, a frame that is not IP's was taken to be told by its first 14 bytes, of which the tag is part and
// the type that counts is not.
func TestFlowLenOfTaggedFrames(t *testing.T) {
	h := make([]byte, headLen)
	h[12], h[13], h[16], h[17] = 0x81, 0, 0x88, 0xcc
	if n := flowLen(h); n != 18 || flowHash(h[:n]) != flowHash(h) {
		t.Errorf("%d bytes, flow %#x; want 18, %#x", n, flowHash(h[:n]), flowHash(h))
	}
}

func TestFlowHash(t *testing.T) {
	tcp := func(src, port byte) []byte {
		b := make([]byte, headLen)
		b[12], b[14], b[23], b[29], b[35] = 8, 0x45, protoTCP, src, port
		return b
	}
	a := flowHash(tcp(1, 1))
	used := map[uint32]bool{}
	for port := range byte(100) {
		used[flowHash(tcp(1, port))%DefaultPorts] = true
	}
	if len(used) != DefaultPorts || a != flowHash(tcp(1, 1)) || a == flowHash(tcp(2, 1)) {
		t.Errorf("100 flows use %d ports of %d", len(used), DefaultPorts)
	}
	f, g := tcp(1, 1), tcp(1, 2)
	f[20], g[20] = 0x20, 0x20 // fragments: what lies where the ports were is none
	if flowHash(f) != flowHash(g) {
		t.Error("fragments of one pair of hosts go different ways")
	}
	for n := range headLen {
		flowHash(f[:n])
	}
}

// TestFlowLen: what lies behind the bytes that are said to be enough changes nothing.
func TestFlowLen(t *testing.T) {
	heads := map[string][]byte{
		"arp": {12: 0x08, 0x06}, "ipv4": {12: 0x08, 0, 0x45, 23: protoTCP}, "ipv4 with options": {12: 0x08, 0, 0x4b, 23: protoUDP},
		"ipv6": {12: 0x86, 0xdd, 0x60, 20: protoUDP}, "vlan": {12: 0x81, 0, 0, 1, 8, 0, 0x45, 27: protoTCP},
		"two tags": {12: 0x88, 0xa8, 0, 1, 0x81, 0, 0, 2, 0x86, 0xdd, 0x60, 28: protoTCP}, "tags without end": bytes.Repeat([]byte{0x81, 0}, 33),
	}
	for name, h := range heads {
		h = append(h, make([]byte, headLen-len(h))...)
		n := flowLen(h)
		for k := range headLen + 1 {
			if short := flowLen(h[:k]); k >= short && short != n {
				t.Errorf("%s: %d of the first %d bytes are enough, %d of all", name, short, k, n)
			}
		}
		want := flowHash(h)
		for i := n; i < headLen; i++ {
			h[i] = 0xee
		}
		if flowHash(h) != want || flowHash(h[:n]) != want {
			t.Errorf("%s: the hash looks behind the first %d bytes", name, n)
		}
	}
}

func TestTable(t *testing.T) {
	addr := func(s string) sys.Sockaddr { return sys.NewSockaddr(netip.MustParseAddrPort(s), 0) }
	named := addr("10.0.0.3:99")
	tbl := newTable(4789, []sys.Sockaddr{named})
	now := time.Now()
	a, b := mac{2, 1}, mac{2, 2}
	want := func(m mac, at time.Time, s string) {
		t.Helper()
		got := "nowhere"
		if p, ok := tbl.lookup(m, at); ok {
			got = p.AddrPort().String()
		}
		if got != s {
			t.Errorf("%v is behind %s, want %s", m, got, s)
		}
	}
	from := addr("10.0.0.2:33333")
	tbl.learn(a, &from, now)
	want(a, now, "10.0.0.2:4789") // source ports are entropy
	from = addr("10.0.0.3:44444")
	tbl.learn(b, &from, now)
	want(b, now, "10.0.0.3:99") // where the configuration says it receives
	tbl.learn(a, &from, now)
	want(a, now, "10.0.0.3:99") // it moved
	want(a, now.Add(learntFor+time.Second), "nowhere")
	tbl.learn(mac{1, 1}, &from, now)
	want(mac{1, 1}, now, "nowhere") // no source is a group
	if tbl.moved != 1 {
		t.Errorf("%d addresses moved", tbl.moved)
	}
	tbl.checkCounts(t)
}

// checkCounts compares what is counted with what is there.
func (t *table) checkCounts(tb testing.TB) {
	tb.Helper()
	behind, strangers := map[sys.Sockaddr]int{}, 0
	for _, e := range t.m {
		behind[e.from]++
		if _, named := t.named[e.from]; !named {
			strangers++
		}
	}
	if !maps.Equal(behind, t.behind) || strangers != t.strangers {
		tb.Errorf("%d strangers and %v are counted as %d and %v", strangers, behind, t.strangers, t.behind)
	}
}

// TestTableUnderAttack: made-up addresses from anywhere neither drive out what is known nor keep the configuration's peers from being learnt.
func TestTableUnderAttack(t *testing.T) {
	addr := func(host byte) *sys.Sockaddr {
		a := sys.NewSockaddr(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 1, host}), 4789), 0)
		return &a
	}
	host, friend := addr(1), addr(2)
	tbl := newTable(4789, []sys.Sockaddr{*host, *friend})
	now, late := time.Now(), time.Now().Add(learntFor+time.Second)
	own := mac{2, 1}
	tbl.learn(own, host, now)
	n := 0
	flood := func(from *sys.Sockaddr, at time.Time) {
		for range 3 * maxLearnt {
			n++
			tbl.learn(mac{2, 9, byte(n >> 16), byte(n >> 8), byte(n)}, from, at)
		}
	}
	size := func(want int) {
		t.Helper()
		if tbl.checkCounts(t); len(tbl.m) != want || tbl.full == 0 {
			t.Errorf("%d addresses known, want %d; %d frames refused", len(tbl.m), want, tbl.full)
		}
	}
	flood(addr(77), now)
	size(1 + maxFromOne)
	for i := range byte(20) {
		flood(addr(100+i), now)
	}
	size(1 + maxStrangers)
	tbl.learn(mac{2, 2}, friend, now)
	size(2 + maxStrangers)
	flood(friend, now)
	size(1 + maxFromOne + maxStrangers)
	if p, ok := tbl.lookup(own, now); !ok || p != *host {
		t.Error("a known address was driven out")
	}
	tbl.learn(own, addr(120), now) // over its bound, it is not believed
	if p, ok := tbl.lookup(own, now); !ok || p != *host {
		t.Error("a known address was moved to a peer that has too many")
	}
	tbl.learn(own, host, late.Add(-time.Minute)) // seen again
	flood(addr(200), late)
	size(1 + maxFromOne) // the rest was old
	if _, ok := tbl.lookup(own, late); !ok {
		t.Error("an address in use was forgotten")
	}
}

func TestThrottle(t *testing.T) {
	th := &throttle{}
	window := func(copied int) {
		for i := range throttleWindow {
			th.report(i < copied)
		}
	}
	if window(throttleWindow/2 - 1); !th.allow() {
		t.Fatal("shut although less than half are copied")
	}
	for round := range 20 { // never for good
		if round == 0 {
			window(throttleWindow / 2)
		}
		if th.allow() || th.pause > maxPause {
			t.Fatalf("round %d: open during a pause of %v", round, th.pause)
		}
		th.until = time.Time{} // it is over
		n := 0
		for ; th.allow(); n++ {
		}
		if n != throttleProbe {
			t.Fatalf("round %d: %d probes", round, n)
		}
		th.giveBack()
		if !th.allow() {
			t.Fatal("a probe that was refused is not repeated")
		}
		for range throttleProbe {
			th.report(true)
		}
	}
	th.until = time.Time{}
	for range throttleProbe {
		th.allow()
	}
	if th.until = (time.Time{}); !th.allow() {
		t.Error("probes of which nobody hears keep it shut")
	}
	for range throttleProbe {
		th.report(false)
	}
	if !th.allow() || th.state != open || th.pause != 0 {
		t.Errorf("after good probes: %+v", th)
	}
	th = &throttle{always: true}
	if window(throttleWindow); !th.allow() || th.Pauses != 0 {
		t.Error("zerocopy=on was throttled")
	}
}

func TestCompletionNumbers(t *testing.T) {
	s := pageSocket{next: 0xffff_fff0, slots: map[uint32]int{}}
	for i := range 40 { // past the end of the numbers
		s.slots[s.next] = i
		s.next++
	}
	var done []int
	complete := func(lo, hi uint32, want ...int) {
		t.Helper()
		done = nil
		s.complete(sys.Completions{Lo: lo, Hi: hi}, func(slot int) { done = append(done, slot) })
		if !slices.Equal(done, want) {
			t.Errorf("sends %#x to %#x: slots %v, want %v", lo, hi, done, want)
		}
	}
	complete(0xffff_fff1, 0xffff_fff1, 1)
	complete(0xffff_fffe, 1, 14, 15, 16, 17)
	complete(0xffff_fff0, 0xffff_fff2, 0, 2)
	complete(23, 23, 39)
	complete(24, 24) // a send that was refused after all
	if s.next != 25 {
		t.Errorf("the next send is taken for number %d", s.next)
	}
	s.slots[s.next] = 7
	s.next++
	complete(25, 26, 7)
	if s.next != 27 || len(s.slots) != 40-8 {
		t.Errorf("the next send is taken for number %d, %d in flight", s.next, len(s.slots))
	}
}
