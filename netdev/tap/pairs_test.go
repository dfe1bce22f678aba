package tap

import (
	"fmt"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// spread sends frames with many flow hashes into the tap and returns how many arrived at each queue.
func spread(t *testing.T, d *Device, w wire) []int {
	t.Helper()
	const frames = 200
	for i := range frames {
		w.Send(udpFrame(uint16(i)))
	}
	got, total := make([]int, len(d.queues)), 0
	vhosttest.Eventually(t, "every frame", func() bool {
		for i := range d.queues {
			if d.queues[i].detached {
				continue
			}
			g := newGuest(t, 256, plain)
			g.post(256, 128)
			n, idle, err := d.Queue(i).Recv(g.posted, 256)
			must(t, err)
			if !idle {
				t.Errorf("queue %d is not idle after %d frames", i, n)
			}
			got[i], total = got[i]+n, total+n
		}
		return total >= frames
	})
	if total != frames {
		t.Fatalf("%d frames of %d arrived: %v", total, frames, got)
	}
	return got
}

// udpFrame is an IPv4 UDP frame whose flow is the source port.
func udpFrame(port uint16) []byte {
	b := testFrame(60, uint32(port))
	copy(b[12:], []byte{8, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0, 10, 7, 0, 1, 10, 7, 0, 2, byte(port >> 8), byte(port), 0, 9, 0, 26, 0, 0})
	return b
}

// TestSetPairs: the kernel spreads frames over the pairs in use, and over no other.
func TestSetPairs(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0,queues=3")
	w := newWire(t, "t0")
	for _, n := range []int{1, 3, 2, 0, 3, 3, 1, 2} {
		must(t, d.SetPairs(n))
		use := max(n, 1)
		tun := netdevtest.Link(t, "t0").(*netlink.Tuntap)
		if tun.Queues != use || tun.DisabledQueues != 3-use {
			t.Errorf("SetPairs(%d): %d queues attached, %d detached", n, tun.Queues, tun.DisabledQueues)
		}
		for i, got := range spread(t, d, w) {
			if (got > 0) != (i < use) {
				t.Errorf("SetPairs(%d): queue %d received %d frames", n, i, got)
			}
		}
	}
	for _, n := range []int{-1, 4} {
		if err := d.SetPairs(n); err == nil {
			t.Errorf("SetPairs(%d) succeeds with 3 pairs", n)
		}
	}
}

// TestSteering: the kernel answers a flow on the queue that the guest sent it from.
func TestSteering(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0,queues=2")
	w := newWire(t, "t0")
	must(t, d.SetPairs(2))
	for port := uint16(1); port <= 4; port++ {
		for i := range 2 {
			out := udpFrame(port)
			var b buffers
			b.add(virtio.NetHdr{}, out)
			b.sendAll(t, d.Queue(i), zerocopy.Copied)
			back := udpFrame(port)
			copy(back[26:], out[30:34])
			copy(back[30:], out[26:30])
			copy(back[34:], out[36:38])
			copy(back[36:], out[34:36])
			w.Send(back)
			g := newGuest(t, 8, plain)
			g.post(8, 2048)
			wantFrame(t, g.recv(d.Queue(i)).data, back)
		}
	}
}

// TestSetPairsSingle: a tap with one queue has nothing to detach.
func TestSetPairsSingle(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0")
	w := newWire(t, "t0")
	for _, n := range []int{0, 1} {
		must(t, d.SetPairs(n))
		if got := fmt.Sprint(spread(t, d, w)); got != "[200]" {
			t.Errorf("SetPairs(%d): %s frames arrived", n, got)
		}
	}
}

// addMacvtap makes a macvtap called name over one end of a veth pair, and returns the name of the other end.
func addMacvtap(t *testing.T, name string) string {
	t.Helper()
	far := name + "-far"
	near := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name + "-near"}, PeerName: far}
	must(t, netlink.LinkAdd(near))
	must(t, netlink.LinkSetUp(netdevtest.Link(t, near.Name)))
	must(t, netlink.LinkSetUp(netdevtest.Link(t, far)))
	mv := &netlink.Macvtap{Macvlan: netlink.Macvlan{
		LinkAttrs: netlink.LinkAttrs{Name: name, ParentIndex: netdevtest.Link(t, near.Name).Attrs().Index}, Mode: netlink.MACVLAN_MODE_BRIDGE,
	}}
	if err := netlink.LinkAdd(mv); err != nil {
		skipTap(t, "a macvtap cannot be made: %v", err)
	}
	// Not left to the end of the namespace, which comes some time after the test's: the next one's may get the same index, and no node.
	t.Cleanup(func() {
		if link, err := netlink.LinkByName(name); err == nil {
			must(t, netlink.LinkDel(link))
		}
	})
	netdevtest.AwaitRunning(t, near.Name)
	netdevtest.AwaitRunning(t, far)
	return far
}

func TestMacvtap(t *testing.T) {
	inNetns(t)
	w := newWire(t, addMacvtap(t, "mv0"))
	mac := guestMAC
	d := openMacvtapOrSkip(t, "tap:macvtap=mv0,queues=2,mtu=1400,mac="+mac.String())
	c := d.Capabilities()
	if c.Name != "mv0" || c.MaxPairs != 2 || c.MTU != 1400 || c.FromGuest == 0 || c.ToGuest == 0 {
		t.Errorf("capabilities %+v", c)
	}
	negotiate(t, d, mergeable|largeRecv)
	for i := range 2 {
		want := testFrame(1000+i, uint32(i))
		var b buffers
		b.add(virtio.NetHdr{}, want)
		b.sendAll(t, d.Queue(i), zerocopy.Copied)
		wantFrame(t, w.recv(), want)
	}
	must(t, d.SetPairs(1))
	g := newGuest(t, 64, mergeable)
	g.post(8, 2048)
	want := testFrame(1200, 1)
	copy(want, mac)
	w.Send(want)
	wantFrame(t, g.recv(d.Queue(0)).data, want)
	must(t, d.SetPairs(2))

	must(t, netlink.LinkDel(netdevtest.Link(t, "mv0")))
	var err error
	for i := 0; err == nil && i <= aliveEvery; i++ {
		_, _, err = d.Queue(0).Recv(g.posted, 8)
	}
	if err == nil {
		t.Error("Recv from a macvtap that is gone succeeds")
	}
}

// TestOpenTxQueueLen: an interface whose queue to the guest has no room, as macvtaps made by some programs, gets one.
func TestOpenTxQueueLen(t *testing.T) {
	inNetns(t)
	must(t, open(t, "tap:t0,persist").Close())
	must(t, netlink.LinkSetTxQLen(netdevtest.Link(t, "t0"), 0))
	d := open(t, "tap:t0")
	newWire(t, "t0").Send(testFrame(100, 1))
	g := newGuest(t, 8, plain)
	g.post(1, 2048)
	wantFrame(t, g.recv(d.Queue(0)).data, testFrame(100, 1))
}

// TestMacvtapInherited: the descriptor of a macvtap, and its node by name.
func TestMacvtapInherited(t *testing.T) {
	inNetns(t)
	w := newWire(t, addMacvtap(t, "mv0"))
	node := fmt.Sprintf("/dev/tap%d", netdevtest.Link(t, "mv0").Attrs().Index)
	openMacvtapOrSkip(t, "tap:macvtap=mv0").Close()
	fd, err := unix.Open(node, unix.O_RDWR, 0)
	must(t, err)
	must(t, netlink.LinkSetUp(netdevtest.Link(t, "mv0")))
	for _, d := range []*Device{openWith(t, Options{FDs: []int{fd}}), open(t, "tap:macvtap="+node)} {
		if !d.macvtap || d.Capabilities().Name != "mv0" {
			t.Errorf("taken for %v", d)
		}
		want := testFrame(1000, 1)
		var b buffers
		b.add(virtio.NetHdr{}, want)
		b.sendAll(t, d.Queue(0), zerocopy.Copied)
		wantFrame(t, w.recv(), want)
	}
}
