package udp_test

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// heldGuest is a whole guest whose frames the kernel holds: three of them.
func heldGuest(t *testing.T, engine string) (*rig, *vhosttest.Guest, *backend.Backend) {
	t.Helper()
	r := newRig(t, engine+",zerocopy=on")
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
	eachEngine(t, testGuestIsHeld)
	t.Run("registered", func(t *testing.T) { testGuestIsHeld(t, ",no-balloon=on") })
}

func testGuestIsHeld(t *testing.T, engine string) {
	r, g, b := heldGuest(t, engine)
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
	eachEngine(t, testStopWithFramesHeld)
	t.Run("registered", func(t *testing.T) { testStopWithFramesHeld(t, ",no-balloon=on") })
}

func testStopWithFramesHeld(t *testing.T, engine string) {
	for name, stop := range map[string]func(g *vhosttest.Guest){
		"stop":         func(g *vhosttest.Guest) { g.Transmitq(0).Stop() },
		"memory table": func(g *vhosttest.Guest) { g.ShareMemory() },
		"disconnect":   func(g *vhosttest.Guest) { g.Hangup() },
	} {
		t.Run(name, func(t *testing.T) {
			r, g, b := heldGuest(t, engine)
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

// TestPeers: frames for all go to every peer, and those for an address go where it was last seen; flows use several source ports.
func TestPeers(t *testing.T) {
	l := newLab(t, 1500)
	l.Run("ip -n " + l.There + " address add 10.9.0.3/24 dev v0")
	l.Run("ip -n " + l.Here + " neighbour replace 10.9.0.3 lladdr 02:00:00:00:00:02 dev v0")
	peers := map[string]*far{}
	for _, ip := range []string{thereIP, "10.9.0.3"} {
		f := &far{TB: t, to: netip.MustParseAddrPort(hereIP + ":4789")}
		l.In(l.There, func() (err error) {
			f.conn, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(ip), Port: 4789})
			return err
		})
		defer f.conn.Close()
		peers[ip] = f
	}
	d := l.device("vxlan:vni=42,local=" + hereIP + ",remote=10.9.0.2;10.9.0.3,zerocopy-min=50")
	defer func() { must(t, d.Close()) }()
	q, s := d.Queue(0), newSent()
	header := []byte{8, 0, 0, 0, 0, 0, 42, 0}
	frame := netdevtest.Frame(100, 1)
	send := func(want zerocopy.Outcome) {
		t.Helper()
		if q.Send([]*zerocopy.Buffer{s.buffer(frame)}) != 1 {
			t.Fatal("not taken")
		}
		if o := s.next(t); o != want {
			t.Errorf("released as %v, want %v", o, want)
		}
	}
	wants := func(ip string) {
		t.Helper()
		if got := peers[ip].recv(); !bytes.Equal(got, append(header[:8:8], frame...)) {
			t.Fatalf("%s got %x", ip, got)
		}
	}
	send(zerocopy.CopiedFallback) // broadcast
	wants(thereIP)
	wants("10.9.0.3")
	copy(frame, []byte{2, 7, 7, 7, 7, 7})
	send(zerocopy.CopiedFallback) // unknown
	wants(thereIP)
	wants("10.9.0.3")

	answer := netdevtest.Frame(60, 2)
	copy(answer[6:], frame[:6])
	peers["10.9.0.3"].send(append(header[:8:8], answer...))
	const f = virtio.FVersion1 | virtio.FNetMrgRxbuf
	g := netdevtest.NewGuest(t, 16, f)
	g.Post(2, 2000)
	p := zerocopy.NewPosted(g.Ring, f)
	vhosttest.Eventually(t, "the answer", func() bool {
		_, _, err := q.Recv(p, 1)
		must(t, err)
		_, b := g.Take()
		return bytes.Equal(b, answer)
	})
	send(zerocopy.CopiedAnyway) // to one, and so by page
	wants("10.9.0.3")
	if n := d.Stats().Flooded; n != 2 {
		t.Errorf("%d frames flooded", n)
	}

	ports := map[uint16]bool{}
	for i := range byte(100) {
		frame[11] = i // another source: another flow
		send(zerocopy.CopiedAnyway)
		buf := make([]byte, 200)
		_, from, err := peers["10.9.0.3"].conn.ReadFromUDPAddrPort(buf)
		must(t, err)
		ports[from.Port()] = true
		if i >= 20 {
			break // before the throttle has its say
		}
	}
	if len(ports) < 3 {
		t.Errorf("20 flows use %d source ports", len(ports))
	}
}

// TestHostileDatagrams: what comes from outside is dropped and counted, and good frames come through between.
func TestHostileDatagrams(t *testing.T) {
	l := newLab(t, 1500)
	d := l.device(fmt.Sprintf("vxlan:vni=42,local=%s,remote=%s", hereIP, thereIP))
	t.Cleanup(func() { must(t, d.Close()) }) // after the guest's end
	var c net.Conn
	must(t, l.Enter(l.There, func() (err error) { c, err = net.Dial("udp4", hereIP+":4789"); return err }))
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
	// As many as fill several of the worker's batches, and the good one behind them: it does not wait for another datagram.
	for bad := 31; bad < 130; bad += 8 {
		g.Receiveq(0).Enable(false)
		for range bad {
			_, err := c.Write([]byte{8})
			must(t, err)
		}
		_, err := c.Write(append(good[:8:8], frame...))
		must(t, err)
		g.Receiveq(0).Enable(true)
		if _, got, err := g.Recv(0, patience); err != nil || string(got) != string(frame) {
			t.Fatalf("behind %d: received %x, %v", bad, got, err)
		}
	}
}

// TestRecvTooBig: a frame that the guest's buffers can never take is lost and counted, the next one arrives.
func TestRecvTooBig(t *testing.T) {
	l := newLab(t, 1500)
	d := l.device(fmt.Sprintf("vxlan:vni=42,local=%s,remote=%s", hereIP, thereIP))
	defer func() { must(t, d.Close()) }()
	var c net.Conn
	must(t, l.Enter(l.There, func() (err error) { c, err = net.Dial("udp4", hereIP+":4789"); return err }))
	defer c.Close()
	netdevtest.RecvTooBig(t, d.Queue(0), func(frame []byte) {
		_, err := c.Write(append([]byte{8, 0, 0, 0, 0, 0, 42, 0}, frame...))
		must(t, err)
	})
}
