//go:build linux

package vm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vhostd/vhostd/netdev/l2switch"
	"github.com/vhostd/vhostd/test/vm/rpc"
	"github.com/vhostd/vhostd/virtio"
)

// plugged is a guest on a switch.
type plugged struct {
	*end
	s    *l2switch.Switch
	port l2switch.PortConfig
	mac  l2switch.MAC
}

// plug boots two guests on one switch, whose back-ends run in the test's own process.
func plug(t *testing.T) (a, b *plugged) {
	t.Helper()
	needVhostd(t)
	s, err := l2switch.New(l2switch.Config{})
	must(t, err)
	all := []*plugged{
		{end: newEnd(t, "a", "10.89.0.1", "52:54:00:12:35:0a")},
		{end: newEnd(t, "b", "10.89.0.2", "52:54:00:12:35:0b")},
	}
	for _, p := range all {
		p.s, p.port.Name = s, p.mopts.Name
		hw, err := net.ParseMAC(p.mopts.MAC)
		must(t, err)
		p.mac = l2switch.MAC(hw)
		d, err := s.AddPort(p.port)
		must(t, err)
		t.Cleanup(func() {
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
		p.serve(d)
		p.startMachine()
	}
	for _, p := range all {
		p.waitBoot()
		p.configure()
		must(t, p.vm.Watch(p.ctx, "eth0"))
	}
	return all[0], all[1]
}

// set changes the guest's port while it runs.
func (p *plugged) set(change func(c *l2switch.PortConfig)) {
	p.t.Helper()
	c := l2switch.PortConfig{Name: p.port.Name}
	if change != nil {
		change(&c)
	}
	must(p.t, p.s.Update(c))
}

// drops is how many frames of the guest's were dropped for a reason, at its port.
func (p *plugged) drops(why l2switch.Reason) uint64 {
	p.t.Helper()
	for _, st := range p.s.Stats().Ports {
		if st.Name == p.port.Name {
			return st.Drops[why.String()]
		}
	}
	p.t.Fatalf("no port %s", p.port.Name)
	return 0
}

// mark is in all frames that the guests send past their stacks.
const mark = "vhostd switch test"

// frame is one that carries the mark and a text.
func (p *plugged) frame(dst, src l2switch.MAC, kind uint16, head []byte, text string) []byte {
	f := append(append([]byte{}, dst[:]...), src[:]...)
	f = append(binary.BigEndian.AppendUint16(f, kind), head...)
	return append(f, fmt.Sprintf("%s: %-40s", mark, text)...)
}

// experiment is an Ethernet type that no stack looks at (IEEE 802).
const experiment = 0x88b5

var everybody = l2switch.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// arrives checks that of frames that p sends, to gets those that are wanted and nothing else with the mark.
func (p *plugged) arrives(to *plugged, frames [][]byte, want ...[]byte) {
	p.t.Helper()
	to.watch()
	p.sends(frames...)
	to.gets(want...)
}

// watch has the guest listen from here on: its socket has room for a few frames, and not for all of the traffic before.
func (p *plugged) watch() { must(p.t, p.vm.Watch(p.ctx, "eth0")) }

// sends sends frames past the guest's stack. They may be on their way when it returns.
func (p *plugged) sends(frames ...[]byte) {
	p.t.Helper()
	_, err := p.vm.Frames(p.ctx, rpc.FramesArgs{Link: "eth0", Send: frames})
	must(p.t, err)
}

// gets checks that of the frames with the mark that have come since watch, up to the last of want, these are all.
func (p *plugged) gets(want ...[]byte) {
	p.t.Helper()
	got, err := p.vm.Frames(p.ctx, rpc.FramesArgs{Link: "eth0", Mark: []byte(mark), Until: want[len(want)-1][14:], Timeout: 30 * time.Second})
	must(p.t, err)
	if len(got) != len(want) {
		p.t.Fatalf("%d frames came, want %d: %q", len(got), len(want), got)
	}
	for i := range want {
		if !bytes.Equal(got[i], want[i]) {
			p.t.Fatalf("frame %d came as\n%x, want\n%x", i, got[i], want[i])
		}
	}
}

// reaches tells whether p can ping to.
func (p *plugged) reaches(to *plugged, want bool) {
	p.t.Helper()
	a := rpc.PingArgs{Addr: to.ip, Size: 56, Count: 2, Timeout: 300 * time.Millisecond}
	if want {
		a.Timeout = 10 * time.Second
	}
	r, err := p.vm.Ping(p.ctx, a)
	if want && (err != nil || r.Received != r.Sent || r.Sent == 0) || !want && r.Received > 0 {
		p.t.Errorf("guest %s pings %s: %+v, %v; want answers: %v", p.mopts.Name, to.mopts.Name, r, err, want)
	}
}

// TestSwitch has two kernels talk over a switch, and one try to talk where it must not.
func TestSwitch(t *testing.T) {
	a, b := plug(t)
	for _, c := range []struct {
		name string
		run  func(a, b *plugged)
	}{
		{"Traffic", switchTraffic}, {"VLAN", switchVLAN}, {"Spoofing", switchSpoofing}, {"Isolation", switchIsolation},
	} {
		if !t.Run(c.name, func(t *testing.T) {
			for _, p := range []*plugged{a, b} {
				p.t = t
				p.set(nil)
			}
			c.run(a, b)
			t.Logf("a %v, b %v", a.s.Stats().Ports[0].Drops, a.s.Stats().Ports[1].Drops)
		}) {
			break
		}
	}
	a.t, b.t = t, t
	a.faultless(0)
	b.faultless(0)
}

func switchTraffic(a, b *plugged) {
	a.features(virtio.FNetCsum|virtio.FNetGuestCsum|virtio.FNetHostTSO4|virtio.FNetGuestTSO4, 0)
	a.reaches(b, true)
	a.transfer(b.end, smallSize)
	sent, received := a.be.Stats().Queues[1].Frames, b.be.Stats().Queues[0].Frames
	if received > 2*sent {
		a.t.Errorf("a sent %d frames and b received %d: they were cut on the way", sent, received)
	}
	if n := len(a.s.Table()); n != 2 {
		a.t.Errorf("learned %v", a.s.Table())
	}
}

func switchVLAN(a, b *plugged) {
	a.set(func(c *l2switch.PortConfig) { c.VLAN.Access = 10 })
	b.set(func(c *l2switch.PortConfig) { c.VLAN.Access = 20 })
	a.reaches(b, false)
	b.set(func(c *l2switch.PortConfig) { c.VLAN.Access = 10 })
	a.reaches(b, true)
	b.set(func(c *l2switch.PortConfig) { c.VLAN.Trunk = []l2switch.VLANRange{{First: 10, Last: 11}} })
	plain := a.frame(everybody, a.mac, experiment, nil, "a's, untagged at its port")
	tagged := tagFrame(plain, 10)
	a.arrives(b, [][]byte{
		tagFrame(a.frame(everybody, a.mac, experiment, nil, "a hops by a tag"), 11),
		tagFrame(tagFrame(a.frame(everybody, a.mac, experiment, nil, "a hops by two"), 11), 10),
		plain,
	}, tagged)
	if n := a.drops(l2switch.DropVLAN); n != 2 {
		a.t.Errorf("%d frames were dropped for their tags, want 2", n)
	}
	plain = b.frame(everybody, b.mac, experiment, nil, "b's, tagged at its port")
	b.arrives(a, [][]byte{tagFrame(b.frame(everybody, b.mac, experiment, nil, "of another VLAN"), 11), tagFrame(plain, 10)}, plain)
}

// tagFrame inserts a VLAN tag.
func tagFrame(f []byte, vid uint16) []byte {
	out := append(append([]byte{}, f[:12]...), 0x81, 0)
	return append(binary.BigEndian.AppendUint16(out, vid), f[12:]...)
}

// switchSpoofing has a pretend to be others, in frames and to b's kernel.
func switchSpoofing(a, b *plugged) {
	a.set(func(c *l2switch.PortConfig) {
		c.Guard = l2switch.Guard{
			MACs: []l2switch.MAC{a.mac}, IPs: []netip.Prefix{netip.MustParsePrefix(a.ip + "/32")}, NoDHCPServer: true, NoRouter: true,
		}
	})
	other := l2switch.MAC{0x52, 0x54, 0, 0x66, 0x66, 0x66}
	arp := func(sha l2switch.MAC, ip string) []byte {
		m := append([]byte{0, 1, 8, 0, 6, 4, 0, 2}, sha[:]...)
		m = append(append(m, netip.MustParseAddr(ip).AsSlice()...), b.mac[:]...)
		return append(m, netip.MustParseAddr(b.ip).AsSlice()...)
	}
	ip := func(src string, proto byte, payload ...byte) []byte {
		h := make([]byte, 20)
		h[0], h[3], h[8], h[9] = 0x45, byte(20+len(payload)), 64, proto
		copy(h[12:], netip.MustParseAddr(src).AsSlice())
		copy(h[16:], netip.MustParseAddr(b.ip).AsSlice())
		return append(h, payload...)
	}
	bad := []struct {
		f   []byte
		why l2switch.Reason
	}{
		{a.frame(b.mac, other, 0x0800, ip(a.ip, 253), "another's MAC"), l2switch.DropMAC},
		{a.frame(b.mac, a.mac, 0x0800, ip("10.89.0.66", 253), "another's IP"), l2switch.DropIP},
		{a.frame(b.mac, a.mac, 0x0806, arp(a.mac, "10.89.0.66"), "ARP, another's IP"), l2switch.DropARP},
		{a.frame(b.mac, a.mac, 0x0806, arp(other, a.ip), "ARP, another's MAC"), l2switch.DropARP},
		{a.frame(everybody, a.mac, 0x0800, ip(a.ip, 17, 0, 67, 0, 68, 0, 20, 0, 0), "DHCP server"), l2switch.DropDHCP},
		{a.frame(b.mac, a.mac, experiment, nil, "another protocol"), l2switch.DropProtocol},
	}
	var send [][]byte
	want := map[l2switch.Reason]uint64{}
	before := map[l2switch.Reason]uint64{}
	for _, x := range bad {
		send = append(send, x.f)
		want[x.why]++
		before[x.why] = a.drops(x.why)
	}
	honest := a.frame(b.mac, a.mac, 0x0800, ip(a.ip, 253), "its own")
	a.arrives(b, append(send, honest), honest)
	for why, n := range want {
		// The guest's own stack may have spoken a protocol that is not for it: of these there may be more.
		if got := a.drops(why) - before[why]; got < n || got > n && why != l2switch.DropProtocol && why != l2switch.DropIP {
			a.t.Errorf("%d frames were dropped for %v, want %d", got, why, n)
		}
	}
	if out := b.exec("cat", "/proc/net/arp"); bytes.Contains([]byte(out), []byte("10.89.0.66")) || bytes.Contains([]byte(out), []byte("66:66:66")) {
		b.t.Errorf("b believed it:\n%s", out)
	}
	a.reaches(b, true)
	a.link(rpc.LinkArgs{Name: "eth0", Addrs: []string{"10.89.0.77/24"}})
	b.reaches(a, true)
	if r, err := b.vm.Ping(b.ctx, rpc.PingArgs{Addr: "10.89.0.77", Size: 56, Count: 2, Timeout: 300 * time.Millisecond}); r.Received > 0 {
		b.t.Errorf("a answers at an address that is not its own: %+v, %v", r, err)
	}
}

func switchIsolation(a, b *plugged) {
	isolate := func(c *l2switch.PortConfig) { c.Isolated = true }
	a.set(isolate)
	a.reaches(b, true) // b is not
	b.set(isolate)
	a.reaches(b, false)
	isolated, reserved := a.drops(l2switch.DropIsolated), a.drops(l2switch.DropReserved)
	b.watch()
	a.sends(a.frame(b.mac, a.mac, experiment, nil, "to b"), a.frame(everybody, a.mac, experiment, nil, "to all"),
		a.frame(l2switch.MAC{1, 0x80, 0xc2}, a.mac, experiment, nil, "to no port"))
	eventually(a.t, time.Minute, "the switch has seen the last of them", func() bool { return a.drops(l2switch.DropReserved) > reserved })
	b.set(nil)
	again := a.frame(b.mac, a.mac, experiment, nil, "again")
	a.sends(again)
	b.gets(again)
	if a.drops(l2switch.DropIsolated) == isolated {
		a.t.Error("no frame was dropped between isolated ports")
	}
}
