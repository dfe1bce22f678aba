//go:build linux

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/require"
)

func build(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		t.Skip("skipped: what is tested is another process, and -short has it elsewhere")
	}
	require.Root(t, "proc") // what a daemon holds is told to root alone
	vhostd := filepath.Join(t.TempDir(), "vhostd")
	cmd := exec.Command("go", "build", "-o", vhostd, "github.com/vhostd/vhostd/cmd/vhostd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building vhostd: %v: %s", err, out)
	}
	return vhostd
}

// TestFiftyGuests come, send, leave and come back. None of it takes more memory than it may, and nothing is left but what Go's heap keeps for the next.
func TestFiftyGuests(t *testing.T) {
	const n = 50
	r, err := scale(config{vhostd: build(t), size: 256, idle: 100 * time.Millisecond, rounds: 4}, n)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", *r)
	const most = 1536 // KiB for a guest; the bar is 1024, and half as much again for Go's heap between two collections
	if kib := r.each(r.Busy.Private, r.Start.Private); kib > most {
		t.Errorf("%.0f KiB for each guest, at most %d", kib, most)
	}
	if r.Idle.Threads < 2*n || r.Idle.FDs < r.Start.FDs+n {
		t.Errorf("%d threads and %d descriptors with %d guests: they are not all there", r.Idle.Threads, r.Idle.FDs, n)
	}
	if r.Again.FDs > r.Start.FDs+5 {
		t.Errorf("%d descriptors before anybody came and %d at the end", r.Start.FDs, r.Again.FDs)
	}
	if r.Again.Shared > 256 {
		t.Errorf("%d KiB of guest memory are mapped when all guests have left", r.Again.Shared)
	}
	if limit := max(2*r.Left.Private, r.Start.Private+n*most); r.Again.Private > limit {
		t.Errorf("%d KiB when all guests have left for the %dth time, %d for the first time", r.Again.Private, 5, r.Left.Private)
	}
}

// TestFairness: nobody who trickles loses a frame beside one that floods, at ports of their own and at one switch.
func TestFairness(t *testing.T) {
	c := config{vhostd: build(t), size: 64}
	for _, network := range []string{echoing, switched} {
		f, err := fairly(c, network, 5, time.Second)
		if err != nil {
			t.Fatalf("%s: %v", network, err)
		}
		if t.Logf("%+v", *f); f.Sent == 0 || f.Flooded == 0 {
			t.Errorf("%s: nothing was sent", network)
		}
	}
}
