package udp_test

import (
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/virtio"
)

// heldGuest is a whole guest whose frames the kernel holds: three of them.
func heldGuest(t *testing.T) (*rig, *vhosttest.Guest, *backend.Backend) {
	t.Helper()
	r := newRig(t, ",zerocopy=on")
	t.Cleanup(func() { must(t, r.dev.Close()) })
	b, err := backend.New(backend.Options{Device: r.dev, DrainTimeout: 50 * time.Millisecond})
	must(t, err)
	g := vhosttest.Start(t, b, vhosttest.Options{SendSize: 10000})
	r.hold("v0")
	for i := range 5 {
		must(t, g.Send(0, virtio.NetHdr{}, netdevtest.Frame(big, uint32(i)), nil))
		if i < 2 {
			r.far.recv()
			must(t, g.Transmitq(0).Settle())
		}
	}
	vhosttest.Eventually(t, "frames in the kernel", func() bool { return r.dev.Stats().InFlight == 3 })
	return r, g, b
}

// TestGuestIsHeld: a sleeping worker and a quiet guest get their chains back when the kernel lets go.
func TestGuestIsHeld(t *testing.T) {
	r, g, b := heldGuest(t)
	if n := g.Transmitq(0).Reap(); n != 0 {
		t.Fatalf("%d chains came back while the kernel has the pages", n)
	}
	r.purge("v0")
	must(t, g.Transmitq(0).Settle())
	if o := b.Stats().Queues[1].Outcomes; o["zerocopied"]+o["copied_anyway"] != 5 || o["zerocopied"] < 3 {
		t.Errorf("outcomes %v", o)
	}
}

// TestStopWithFramesHeld: GET_VRING_BASE, a disconnect and a changed memory table do not wait for the kernel for ever, and the memory stays
// mapped until the kernel has let go.
func TestStopWithFramesHeld(t *testing.T) {
	for name, stop := range map[string]func(g *vhosttest.Guest){
		"stop":         func(g *vhosttest.Guest) { g.Transmitq(0).Stop() },
		"memory table": func(g *vhosttest.Guest) { g.ShareMemory() },
		"disconnect":   func(g *vhosttest.Guest) { g.Hangup() },
	} {
		t.Run(name, func(t *testing.T) {
			r, g, b := heldGuest(t)
			stop(g)
			if name != "disconnect" {
				g.Hangup()
			}
			vhosttest.Eventually(t, "the end of the session", func() bool { return !b.Stats().Connected })
			if st := b.Stats().Queues[1]; st.GivenUp != 3 {
				t.Errorf("%d chains given up, want 3", st.GivenUp)
			}
			region := g.Mem.Regions[len(g.Mem.Regions)-1]
			if region.Mappings(t) == 0 || r.dev.Stats().InFlight != 3 {
				t.Error("memory was unmapped under frames in the kernel")
			}
			r.purge("v0")
			vhosttest.Eventually(t, "memory unmapped", func() bool { return region.Mappings(t) == 0 })
		})
	}
}

// TestHostileDatagrams: what comes from outside is dropped and counted, and good frames come through between.
func TestHostileDatagrams(t *testing.T) {
	l := newLab(t, 1500)
	d := l.device(fmt.Sprintf("vxlan:vni=42,local=%s,remote=%s", hereIP, thereIP))
	defer func() { must(t, d.Close()) }()
	var c net.Conn
	must(t, l.enter(l.there, func() (err error) { c, err = net.Dial("udp4", hereIP+":4789"); return err }))
	defer c.Close()
	b, err := backend.New(backend.Options{Device: d})
	must(t, err)
	g := vhosttest.Start(t, b, vhosttest.Options{})
	good := []byte{8, 0, 0, 0, 0, 0, 42, 0}
	frame := netdevtest.Frame(100, 5)
	const rounds = 50
	for range rounds {
		for _, bad := range [][]byte{{}, {8}, good, append(good[:8:8], 1, 2, 3), append([]byte{0}, good[1:]...), append([]byte{8, 0, 0, 0, 0, 0, 43, 0}, frame...)} {
			if _, err := c.Write(bad); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := c.Write(append(good[:8:8], frame...)); err != nil {
			t.Fatal(err)
		}
		_, got, err := g.Recv(0, patience)
		if err != nil || string(got) != string(frame) {
			t.Fatalf("received %x, %v", got, err)
		}
	}
	vhosttest.Eventually(t, "counters", func() bool {
		st := d.Stats()
		return st.Malformed == 5*rounds && st.OtherVNI == rounds && d.Queue(0).Counters().RecvDropped == 6*rounds
	})
}
