package l2switch_test

import (
	"testing"
	"time"

	"github.com/vhostd/vhostd/netdev/l2switch"
	"github.com/vhostd/vhostd/virtio"
)

// between is a lab in which something can be done while a port's frame is on its way in: behind the look at the ports, and before the frame is decided on.
func between(t *testing.T, ports ...string) (l *lab, do func(f func())) {
	var once func()
	l = newLab(t, l2switch.Config{})
	l.s.SetClock(func() time.Duration {
		if f := once; f != nil {
			once = nil
			f()
		}
		return 0
	})
	for _, p := range ports {
		l.add(l2switch.PortConfig{Name: p})
	}
	return l, func(f func()) { once = f }
}

// TestPortThatLeftSendsNothing: what the Device of a port that was removed is asked to send reaches nobody, and teaches nothing of the port that has its place.
func TestPortThatLeftSendsNothing(t *testing.T) {
	l := newLab(t, l2switch.Config{}, l2switch.PortConfig{Name: "a"}, l2switch.PortConfig{Name: "b"})
	if err := l.s.RemovePort("a"); err != nil {
		t.Fatal(err)
	}
	l.add(l2switch.PortConfig{Name: "c"})
	l.send("a", virtio.NetHdr{}, ether(everybody, mac(1), 0x88b5))
	l.nothing("b")
	l.nothing("c")
	if all := l.s.Table(); len(all) > 0 {
		t.Errorf("learned %v", all)
	}
	if n := l.ports["a"].Queue(0).Counters().SendDropped; n != 1 {
		t.Errorf("%d frames were dropped, want 1", n)
	}
}

// TestAddressOwnedMeanwhile: an address gets an owner while another port's frame from it is on its way in. It is the owner's all the same, though it has not spoken.
func TestAddressOwnedMeanwhile(t *testing.T) {
	l, do := between(t, "thief", "other")
	do(func() { l.add(l2switch.PortConfig{Name: "owner", Guard: l2switch.Guard{MACs: []l2switch.MAC{mac(7)}}}) })
	l.send("thief", virtio.NetHdr{}, ether(mac(2), mac(7), 0x88b5))
	l.passes("other", "owner", ether(mac(7), mac(2), 0x88b5), nil)
	l.nothing("thief")
	if entries, counted, shares := l.s.FullCheck(); entries != counted || counted != shares {
		t.Errorf("%d addresses, %d counted, %d by ports", entries, counted, shares)
	}
}

// TestPortLeavesMeanwhile: a port is removed, and another gets its place, while a frame of it is on its way in. Nothing is learned of the new one.
func TestPortLeavesMeanwhile(t *testing.T) {
	l, do := between(t, "a", "b")
	do(func() {
		if err := l.s.RemovePort("a"); err != nil {
			t.Error(err)
		}
		l.add(l2switch.PortConfig{Name: "c"})
	})
	l.send("a", virtio.NetHdr{}, ether(mac(2), mac(1), 0x88b5))
	if all := l.s.Table(); len(all) > 0 {
		t.Errorf("learned %v", all)
	}
	if entries, counted, shares := l.s.FullCheck(); entries != counted || counted != shares {
		t.Errorf("%d addresses, %d counted, %d by ports", entries, counted, shares)
	}
}

// TestVLANChangesMeanwhile: a port is put into another VLAN while a frame of it is on its way in. Nothing is learned in the one that it is not in any more.
func TestVLANChangesMeanwhile(t *testing.T) {
	l, do := between(t, "a", "b")
	do(func() {
		if err := l.s.Update(l2switch.PortConfig{Name: "a", VLAN: l2switch.VLAN{Access: 2}}); err != nil {
			t.Error(err)
		}
	})
	l.send("a", virtio.NetHdr{}, ether(mac(2), mac(1), 0x88b5))
	if all := l.s.Table(); len(all) > 0 {
		t.Errorf("learned %v", all)
	}
	if entries, counted, shares := l.s.FullCheck(); entries != counted || counted != shares {
		t.Errorf("%d addresses, %d counted, %d by ports", entries, counted, shares)
	}
}

// TestRefusedUpdateIsNotSeen: a change that is refused, for an address that is another port's, was at no time in force, so that nothing can have been learned by it.
func TestRefusedUpdateIsNotSeen(t *testing.T) {
	l := newLab(t, l2switch.Config{}, l2switch.PortConfig{Name: "a"}, l2switch.PortConfig{Name: "b", Guard: l2switch.Guard{MACs: []l2switch.MAC{mac(2)}}})
	before := l2switch.Published(l.s)
	err := l.s.Update(l2switch.PortConfig{Name: "a", VLAN: l2switch.VLAN{Access: 2}, Guard: l2switch.Guard{MACs: []l2switch.MAC{mac(2)}}})
	if err == nil {
		t.Fatal("two ports own one address")
	}
	if l2switch.Published(l.s) != before {
		t.Error("something was published")
	}
	l.passes("a", "b", ether(mac(2), mac(1), 0x88b5), nil)
}
