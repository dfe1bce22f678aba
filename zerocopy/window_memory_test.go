package zerocopy

import (
	"slices"
	"testing"
)

// TestWindowKeepsNoLongChains: what a long frame took of host memory is given up with its chain, by every slot, however the device has looked at the frame.
func TestWindowKeepsNoLongChains(t *testing.T) {
	const size = 4 * keepSegs
	g := newGuest(t, size, features)
	w := g.window()
	defer w.Close()
	lens := slices.Repeat([]int{1}, keepSegs+20)
	var last *Buffer
	for range size {
		g.sendParts(frame(60, 1), lens...)
		b := pop(t, w)[0]
		b.Frags()
		if last != nil {
			last.Release(Copied) // so the next one takes another slot
		}
		last = b
		w.Reap()
		g.returned()
	}
	last.Release(Copied)
	w.Reap()
	for i := range w.slots {
		if b := w.slots[i].buf; cap(w.chains[i].Segs) > keepSegs || cap(b.segs) > keepSegs || cap(b.bufs) > keepSegs {
			t.Fatalf("slot %d keeps memory for %d, %d and %d segments, want %d at most",
				i, cap(w.chains[i].Segs), cap(b.segs), cap(b.bufs), keepSegs)
		}
	}
}
