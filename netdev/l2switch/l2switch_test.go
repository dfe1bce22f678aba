package l2switch_test

import (
	"sync"
	"testing"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/l2switch"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/virtio"
)

func newSwitch(t testing.TB, c l2switch.Config) *l2switch.Switch {
	t.Helper()
	s, err := l2switch.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func addPort(t testing.TB, s *l2switch.Switch, c l2switch.PortConfig) netdev.Device {
	t.Helper()
	d, err := s.AddPort(c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDevice(t *testing.T) {
	for name, guard := range map[string]l2switch.Guard{"plain": {}, "guarded": {NoDHCPServer: true}} {
		t.Run(name, func(t *testing.T) {
			netdevtest.Run(t, func(t *testing.T) netdevtest.Harness {
				s := newSwitch(t, l2switch.Config{})
				a, b := addPort(t, s, l2switch.PortConfig{Name: "a", Guard: guard}), addPort(t, s, l2switch.PortConfig{Name: "b", Guard: guard})
				peer := netdevtest.NewPeer(t, b)
				return netdevtest.Harness{
					Device: a, MaxFrame: virtio.MaxFrame - 4, Capture: peer.Capture, Inject: peer.Inject,
					SendAllocates: true, RecvAllocates: true, // nobody has the Door: every frame waits in a lane
					Close: func() {
						if err := b.Close(); err != nil {
							t.Error(err)
						}
					},
				}
			})
		})
	}
}

// TestPortThatLeftIsRung: a sweep rang a receiver whose port had just been closed. By then its descriptor could have been another's.
func TestPortThatLeftIsRung(t *testing.T) {
	s := newSwitch(t, l2switch.Config{})
	d, err := s.AddPort(l2switch.PortConfig{Name: "a", Pairs: 2})
	if err != nil {
		t.Fatal(err)
	}
	var ringing sync.WaitGroup
	ringing.Go(func() {
		for range 1000 {
			l2switch.RingLate(d)
		}
	})
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	ringing.Wait()
	l2switch.RingLate(d)
}
