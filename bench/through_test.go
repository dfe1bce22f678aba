package bench_test

import (
	"context"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/bench"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/l2switch"
	"github.com/vhostd/vhostd/vhostuser"
)

// TestThroughSwitch: what goes into one port comes out of the other, and of nowhere else.
func TestThroughSwitch(t *testing.T) {
	s, err := l2switch.New(l2switch.Config{Hold: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var served sync.WaitGroup
	defer served.Wait()
	defer cancel()
	dir := vhosttest.ShortDir(t)
	for _, name := range []string{"a", "b"} {
		d, err := s.AddPort(l2switch.PortConfig{Name: name})
		if err != nil {
			t.Fatal(err)
		}
		b, err := backend.New(backend.Options{Device: d})
		if err != nil {
			t.Fatal(err)
		}
		l, err := vhostuser.Listen(filepath.Join(dir, name), vhostuser.ListenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		served.Add(1)
		go func() {
			defer served.Done()
			if err := b.Serve(ctx, l); err != nil {
				t.Error(err)
			}
			_ = l.Close()
			_ = d.Close()
		}()
	}
	c := bench.DefaultConfig()
	c.Path, c.To, c.Direction, c.Duration, c.WarmUp = filepath.Join(dir, "a"), filepath.Join(dir, "b"), bench.Through, 200*time.Millisecond, 0
	c.LostAfter, c.Patience = vhosttest.Patience, 2*vhosttest.Patience // no machine is so busy
	closed := c
	closed.Window, closed.Verify, closed.Frames = 6, true, []int{60, 1514, 65535, 2037}
	r, err := bench.Run(t.Context(), closed)
	if err != nil {
		t.Fatal(err)
	}
	sent, came := r.GuestToHost.Frames, r.HostToGuest.Frames // of some the one was before what is measured, and the other within
	if came == 0 || max(sent, came)-min(sent, came) > uint64(closed.Window) || r.Lost > 0 || r.Foreign > 0 || r.Latency == nil {
		t.Errorf("with 6 under way: %+v", r)
	}
	r, err = bench.Run(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	ports := s.Stats().Ports
	if r.HostToGuest.Frames == 0 || ports[1].ToGuest.Frames < r.HostToGuest.Frames || ports[0].ToGuest.Frames > 2 || len(ports[1].Drops) > 0 {
		t.Errorf("%d frames sent, %d received; %+v", r.GuestToHost.Frames, r.HostToGuest.Frames, ports)
	}
	c.To = ""
	if c.Check() == nil {
		t.Error("a second port is not missed")
	}
}
