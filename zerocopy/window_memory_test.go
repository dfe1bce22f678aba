package zerocopy

import (
	"slices"
	"testing"

	"github.com/vhostd/vhostd/virtio"
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

// TestPostedKeepsNoLongChains: nor does a receiveq, whose long chains are returned because of a malformed one, and none of them is lent.
func TestPostedKeepsNoLongChains(t *testing.T) {
	const size = 4 * keepSegs
	g := newPosts(t, size)
	p := NewPosted(g.ring, features)
	long := slices.Repeat([]int{20}, keepSegs+1)
	g.add(20*len(long) + 100)
	g.add(long...)
	g.add(100)
	if _, ok := p.Lend(20 * keepSegs); !ok {
		t.Fatal("the first chain is not lent")
	}
	for range 3 {
		if _, ok := p.Lend(20 * keepSegs); ok {
			t.Fatal("a long chain is lent")
		}
	}
	p.UseLent(60)
	g.add(5) // too short for a header
	if r := p.Write(virtio.NetHdr{}, [][]byte{frame(20*len(long)+200, 1)}); r != NoRoom || p.Stats.Malformed != 1 {
		t.Fatalf("%v, %+v", r, p.Stats)
	}
	for i, c := range p.chains {
		if cap(c.Segs) > keepSegs {
			t.Errorf("slot %d keeps memory for %d segments", i, cap(c.Segs))
		}
	}
}

// TestPostedKeepsNoMalformedChains: nor does it keep the memory of a malformed one, which is seen behind those that are held or lent.
func TestPostedKeepsNoMalformedChains(t *testing.T) {
	for name, meet := range map[string]func(p *Posted) bool{
		"written": func(p *Posted) bool {
			return p.Write(virtio.NetHdr{}, [][]byte{frame(1000, 1)}) == NoRoom && p.Stats.Malformed == 1
		},
		"lent": func(p *Posted) bool {
			for range 3 {
				if _, ok := p.Lend(60); !ok {
					return false
				}
			}
			_, ok := p.Lend(60)
			return !ok && p.Stats.Malformed == 0
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := newPosts(t, 4*keepSegs)
			p := NewPosted(g.ring, features)
			for range 3 {
				g.add(40, 60)
			}
			g.sendParts(frame(60, 1), slices.Repeat([]int{1}, keepSegs+8)...) // readable
			if !meet(p) {
				t.Fatalf("%+v", p.Stats)
			}
			for i, c := range p.chains {
				if cap(c.Segs) > keepSegs {
					t.Errorf("slot %d keeps memory for %d segments", i, cap(c.Segs))
				}
			}
		})
	}
}
