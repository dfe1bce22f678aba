//go:build linux

package main

import (
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/zerocopy"
)

// The test's binary is the guest's, too.
func TestMain(m *testing.M) {
	if os.Getenv(guestEnv) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// TestTurns takes the shortest of turns on every path and looks at what the counters say, not at how long it took.
func TestTurns(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: what is tested are other processes, and -short has them elsewhere")
	}
	require.Root(t, "netns")
	vhostd := filepath.Join(t.TempDir(), "vhostd")
	if out, err := exec.Command("go", "build", "-o", vhostd, "github.com/vhostd/vhostd/cmd/vhostd").CombinedOutput(); err != nil {
		t.Fatalf("building vhostd: %v: %s", err, out)
	}
	c := config{
		vhostd: vhostd, tunnel: "dgram", pairs: 1, seconds: 0.01, backCPU: 0, guestCPU: 1,
		guest: guestOptions{Span: 32 << 20, Ring: 256, Window: 256, Piece: 32768},
	}
	c.sizes, c.paths, c.modes = []int{1500, 65000}, []string{"ifb"}, []mode{parseMode("off"), parseMode("auto"), parseMode("on")}
	t.Run("direct", func(t *testing.T) { testTurns(t, c) })
	c.sizes, c.paths, c.modes = []int{65000}, []string{"bridge", "forward"}, []mode{parseMode("off"), parseMode("on")}
	t.Run("through", func(t *testing.T) { testTurns(t, c) })
}

func testTurns(t *testing.T, c config) {
	r, err := measure(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	if want := len(c.paths) * len(c.sizes) * len(c.modes); len(r.Turns) != want {
		t.Fatalf("%d turns, want %d", len(r.Turns), want)
	}
	for _, turn := range r.Turns {
		want := zerocopy.ZeroCopied
		switch {
		case turn.Mode == "off":
			want = zerocopy.Copied
		case turn.Mode == "auto" && turn.Size == 1500:
			want = zerocopy.CopiedSmall
		}
		if turn.Unproven != "" || turn.share(want) != 1 || turn.Arrived < turn.Frames || turn.CPUNs <= 0 {
			t.Errorf("%s, %d bytes, %s: want all frames %s, have %+v", turn.Path, turn.Size, turn.Mode, want, turn)
		}
	}
	for _, l := range r.lines() {
		if l.Ratio <= 0 || l.Mode == "off" && l.Ratio != 1 {
			t.Errorf("%s, %d bytes, %s: ratio %v", l.Path, l.Size, l.Mode, l.Ratio)
		}
	}
	for _, asJSON := range []bool{false, true} {
		if err := r.print(io.Discard, asJSON); err != nil {
			t.Error(err)
		}
	}
}

// TestDoubt: turns that are not what their mode says are found out.
func TestDoubt(t *testing.T) {
	for _, c := range []struct {
		name, mode string
		outcomes   map[string]uint64
		arrived    uint64
		good       bool
	}{
		{"copied", "off", map[string]uint64{"copied": 1000}, 1000, true},
		{"sent from the pages though off", "off", map[string]uint64{"zerocopied": 1000}, 1000, false},
		{"zero-copy", "on", map[string]uint64{"zerocopied": 1000}, 1000, true},
		{"the kernel copied", "on", map[string]uint64{"copied_anyway": 1000}, 1000, false},
		{"a few did not go so", "auto", map[string]uint64{"zerocopied": 990, "copied_fallback": 10}, 1000, false},
		{"above the cap", "on+zerocopy-pending=4", map[string]uint64{"zerocopied": 500, "copied_cap": 500}, 1000, true},
		{"small", "auto", map[string]uint64{"copied_small": 1000}, 1000, true},
		{"lost", "off", map[string]uint64{"copied": 1000}, 900, false},
		{"not counted", "off", map[string]uint64{"copied": 900}, 1000, false},
	} {
		turn, all := turn{Frames: 1000, Outcomes: c.outcomes, Arrived: c.arrived}, uint64(0)
		for _, n := range c.outcomes {
			all += n
		}
		if doubt := turn.doubt(parseMode(c.mode), all); (doubt == "") != c.good {
			t.Errorf("%s: doubt %q", c.name, doubt)
		}
	}
}
