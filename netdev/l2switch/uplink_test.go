package l2switch_test

import (
	"sync"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/l2switch"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/pair"
	"github.com/vhostd/vhostd/virtio"
)

// uplink gives a switch an uplink, and returns the other end of its cable.
func uplink(t testing.TB, s *l2switch.Switch, o pair.Options, c l2switch.PortConfig) *pair.Device {
	t.Helper()
	near, far, err := pair.New(o)
	if err != nil {
		t.Fatal(err)
	}
	c.Name = "uplink"
	if err := s.Uplink(near, c); err != nil {
		t.Fatal(err)
	}
	return far
}

// TestUplinkDevice: a port passes the suite through an uplink.
func TestUplinkDevice(t *testing.T) {
	for _, o := range []pair.Options{{}, {Hold: true}, {Slots: 16}} {
		netdevtest.Run(t, func(t *testing.T) netdevtest.Harness {
			s := newSwitch(t, l2switch.Config{})
			far := uplink(t, s, o, l2switch.PortConfig{})
			peer := netdevtest.NewPeer(t, far)
			inject := func(f []byte) { // the suite has frames be there when it goes on
				before := s.Stats().Ports[0].FromGuest.Frames
				peer.Inject(f)
				vhosttest.Eventually(t, "the frame on the switch", func() bool {
					st := s.Stats()
					return st.Ports[0].FromGuest.Frames > before && uint64(st.Ports[1].Waiting)+st.Ports[1].ToGuest.Frames > before
				})
			}
			return netdevtest.Harness{
				Device: addPort(t, s, l2switch.PortConfig{Name: "a"}), MaxFrame: virtio.MaxFrame - 4, Capture: peer.Capture, Inject: inject,
				SendAllocates: true, RecvAllocates: true, // nobody has the Door, and an uplink makes a buffer of each frame
				Close: func() {
					if err := s.Close(); err != nil {
						t.Error(err)
					}
					if err := far.Close(); err != nil {
						t.Error(err)
					}
				},
			}
		})
	}
}

// TestUplinkJoinsSwitches: guests of two switches talk over a cable between them, in order and without loss.
func TestUplinkJoinsSwitches(t *testing.T) {
	vhosttest.NoLeaks(t)
	near, far, err := pair.New(pair.Options{Slots: 512})
	if err != nil {
		t.Fatal(err)
	}
	var g [2]vm
	for i, d := range []netdev.Device{near, far} {
		s := newSwitch(t, l2switch.Config{Hold: time.Minute})
		if err := s.Uplink(d, l2switch.PortConfig{Name: "uplink"}); err != nil {
			t.Fatal(err)
		}
		g[i] = start(t, s, l2switch.PortConfig{Name: "guest"}, vhosttest.Options{QueueSize: 64})
	}
	g[0].meet(t, 0, g[1])
	g[1].meet(t, 1, g[0])
	const frames = 5000
	var wg sync.WaitGroup
	for i := range g {
		wg.Add(2)
		go func() { defer wg.Done(); flood(t, g[i], mac(1-i), mac(i), frames) }()
		go func() { defer wg.Done(); inOrder(t, g[i], frames) }()
	}
	wg.Wait()
}

// TestUplinkThatTakesNothingKeepsNoPages: a device that is full for good has copies, and the sender its pages.
func TestUplinkThatTakesNothingKeepsNoPages(t *testing.T) {
	vhosttest.NoLeaks(t)
	s := newSwitch(t, l2switch.Config{})
	far := uplink(t, s, pair.Options{Slots: 4}, l2switch.PortConfig{})
	g := start(t, s, l2switch.PortConfig{Name: "guest"}, vhosttest.Options{})
	for i := range uint64(100) {
		g.send(t, frame(mac(1), mac(0), i, 1000))
	}
	if err := g.Transmitq(0).Settle(); err != nil {
		t.Fatal(err)
	}
	peer := netdevtest.NewPeer(t, far)
	for i := range uint64(100) {
		if _, f := peer.Capture(); true {
			if seq, err := number(f); seq != i || err != nil {
				t.Fatalf("frame %d in place %d, %v", seq, i, err)
			}
		}
	}
	if err := s.RemovePort("uplink"); err != nil {
		t.Fatal(err)
	}
	if err := far.Close(); err != nil {
		t.Fatal(err)
	}
}
