package zerocopy

import (
	"fmt"
	"strings"
	"testing"

	"github.com/vhostd/vhostd/virtio"
)

// mustBeABug runs f, which must panic with a message of ours.
func mustBeABug(t *testing.T, f func()) {
	t.Helper()
	defer func() {
		t.Helper()
		if r := recover(); !strings.HasPrefix(fmt.Sprint(r), "bug: ") {
			t.Errorf("it ended with %v, want a panic that says bug:", r)
		}
	}()
	f()
}

// A device that releases a buffer twice is a bug, which ends the process: pages that nobody guards would be the guest's again while they are sent. Whenever
// the second release comes, it is noticed, and until then the ring has each chain once.
func TestReleasedTwice(t *testing.T) {
	for name, release := range map[string]func(b *Buffer){
		"Release":    func(b *Buffer) { b.Release(ZeroCopied) },
		"ReleaseAll": func(b *Buffer) { ReleaseAll([]*Buffer{b}, Copied) },
	} {
		for when, between := range map[string]func(w *Window){
			"at once":          func(*Window) {},
			"after its return": func(w *Window) { w.Reap() },
			"after the end":    func(w *Window) { w.Reap(); w.Close() },
		} {
			t.Run(name+" "+when, func(t *testing.T) {
				g := newGuest(t, 8, features)
				w := g.window()
				g.send(virtio.NetHdr{}, frame(60, 1))
				b := pop(t, w)[0]
				release(b)
				between(w)
				mustBeABug(t, func() { release(b) })
				w.Reap()
				if ids := g.returned(); len(ids) != 1 {
					t.Errorf("%d chains came back, want 1", len(ids))
				}
			})
		}
	}
}

// The second release comes when the buffer carries another frame already, and cannot be told from that one's. That frame's own release is the one too many.
func TestReleasedTwiceLate(t *testing.T) {
	g := newGuest(t, 8, features)
	w := g.window()
	sent := map[uint16]bool{}
	id, _ := g.send(virtio.NetHdr{}, frame(60, 1))
	sent[id] = true
	first := pop(t, w)[0]
	first.Release(ZeroCopied)
	w.Reap()
	id, _ = g.send(virtio.NetHdr{}, frame(60, 2))
	sent[id] = true
	second := pop(t, w)[0]
	if second != first {
		t.Fatal("the window has another buffer for its next frame: this test has lost its point")
	}
	first.Release(ZeroCopied)
	w.Reap()
	mustBeABug(t, func() { second.Release(ZeroCopied) })
	w.Reap()
	if n := len(g.returned()); n != 2 || w.Pending() != 0 {
		t.Errorf("%d chains came back, want 2; %d are pending", n, w.Pending())
	}
}

// A buffer that was given up at the drain's deadline may be released once, and no more.
func TestReleasedTwiceAfterTheDeadline(t *testing.T) {
	g := newGuest(t, 8, features)
	w := g.window()
	g.send(virtio.NetHdr{}, frame(60, 1))
	b := pop(t, w)[0]
	if n := w.Close(); n != 1 {
		t.Fatalf("%d buffers were given up, want 1", n)
	}
	if n := len(g.returned()); n != 1 {
		t.Errorf("%d chains came back, want 1", n)
	}
	pins := g.table.Pins()
	b.Release(ZeroCopied)
	if g.table.Pins() != pins-1 {
		t.Errorf("%d pins are left, want %d", g.table.Pins(), pins-1)
	}
	mustBeABug(t, func() { b.Release(ZeroCopied) })
	if g.table.Pins() != pins-1 {
		t.Errorf("%d pins are left after the second release, want %d", g.table.Pins(), pins-1)
	}
}
