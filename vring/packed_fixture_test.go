package vring

import (
	"strings"
	"sync/atomic"
	"testing"

	"github.com/vhostd/vhostd/virtio"
)

const packed = virtio.FRingPacked

// slots writes descriptors from the place where the device goes on, with the flags that make them available there, and returns the id of
// the last one. The first becomes available last.
func (r *rig) slots(descs ...virtio.PackedDesc) {
	at := r.dev.packed.next
	for _, d := range descs {
		d.Flags |= at.available()
		r.drv.RawPacked()[at.slot] = d
		at.advance(1, uint32(r.dev.Size()))
	}
}

// pd is a descriptor of n bytes of the data area.
func (r *rig) pd(off int, n uint32, id, flags uint16) virtio.PackedDesc {
	return virtio.PackedDesc{Addr: uint64(r.data) + uint64(off), Len: n, ID: id, Flags: flags}
}

// brokenPacked pops, expects Broken with an Err that has every one of words, and that the ring stays so.
func (r *rig) brokenPacked(words ...string) {
	r.Helper()
	base := r.dev.Base()
	r.pop(Broken)
	for _, w := range words {
		if !strings.Contains(r.dev.Err().Error(), w) {
			r.Errorf("Err is %q, without %q", r.dev.Err(), w)
		}
	}
	r.slots(r.pd(0, 10, 0, 0))
	r.pop(Broken)
	if r.dev.Available() != 0 || r.dev.EnableKick() || r.dev.Base() != base {
		r.Error("a broken ring goes on")
	}
}

// malformedPacked pops, expects Malformed for id, that it goes back over all its n descriptors, and that the ring goes on.
func (r *rig) malformedPacked(id uint16, n uint32) {
	r.Helper()
	at := r.dev.packed.next
	if c := r.pop(Malformed); c.Head != id {
		r.Errorf("id of the malformed chain is %d, want %d", c.Head, id)
	}
	r.put(id, 0)
	want := virtio.PackedDesc{ID: id, Flags: at.used()}
	got := r.drv.RawPacked()[at.slot]
	if got.Addr = 0; got != want {
		r.Errorf("used descriptor %+v, want %+v", got, want)
	}
	at.advance(n, uint32(r.dev.Size()))
	if r.dev.packed.used != at || r.dev.packed.next != at {
		r.Errorf("the device goes on at %+v and %+v, want %+v", r.dev.packed.next, r.dev.packed.used, at)
	}
	r.slots(r.pd(0, 10, 0, 0))
	r.pop(Popped)
	r.put(0, 0)
}

// events sets what the driver wants to be called for.
func (r *rig) events(flags uint32, at place) {
	atomic.StoreUint32(r.drv.packed.driverEvent, flags<<16|uint32(at.offWrap()))
}

func (p place) plus(n, size int) place {
	p.advance(uint32(n), uint32(size))
	return p
}

// TestPlace: a place goes round and comes back.
func TestPlace(t *testing.T) {
	for _, size := range []uint32{1, 2, 3, 255, 256, 32768} {
		for _, n := range []uint32{1, size/2 + 1, size} {
			p := place{slot: size - 1, wrap: 1}
			was := p
			laps := 2 * size // steps: n times twice round the ring
			for range laps {
				before := p
				p.advance(n, size)
				if p.slot >= size || p.wrap > 1 || placeOf(p.offWrap()) != p {
					t.Fatalf("size %d: %+v after %+v", size, p, before)
				}
				if p.available()|p.used() == 0 || p.available() == p.used() || p.available()&^phaseFlags != 0 {
					t.Fatalf("flags %#x and %#x at %+v", p.available(), p.used(), p)
				}
				back := p
				if back.retreat(n, size); back != before {
					t.Fatalf("size %d: %+v less %d is %+v, not %+v", size, p, n, back, before)
				}
			}
			if p != was {
				t.Errorf("size %d: %+v after %d steps of %d, not %+v", size, p, laps, n, was)
			}
		}
	}
}
