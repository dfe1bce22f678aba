package vring

import (
	"testing"

	"github.com/vhostd/vhostd/virtio"
)

// useChains passes chains of n descriptors in all through the ring, published at once.
func (r *rig) useChains(n int) {
	r.Helper()
	var ids []uint16
	for range n {
		ids = append(ids, r.add([]Buf{r.buf(0, 1)}, nil))
		r.dev.Put(r.pop(Popped).Head, 0)
	}
	r.dev.Publish()
	for _, id := range ids {
		r.reap(id, 0)
	}
}

func packedCallFlags(t *testing.T) {
	for _, f := range []virtio.Features{packed, packed | virtio.FEventIdx} {
		r := newRig(t, 7, f)
		for i := range 40 {
			flags := uint32(i % 2)
			r.events(flags, place{uint32(i % 7), uint32(i / 2 % 2)}) // the offset is to be ignored
			r.useChains(1)
			if got := r.dev.NeedsCall(); got != (flags == virtio.EventEnable) {
				t.Errorf("%v: NeedsCall is %v, flags are %d", f, got, flags)
			}
			if r.dev.NeedsCall() {
				t.Error("NeedsCall is true when nothing was published")
			}
		}
	}
}

func packedCallEvent(t *testing.T) {
	const size = 16
	r := newRig(t, size, packed|virtio.FEventIdx)
	r.events(virtio.EventDesc, r.dev.packed.used.plus(5, size))
	r.useChains(1)
	if !r.dev.NeedsCall() {
		t.Error("the first answer is no: a call owed by an earlier back-end is lost")
	}
	for distance := range size { // of the event beyond the used index
		for n := range size + 1 {
			r.events(virtio.EventDesc, r.dev.packed.used.plus(distance, size))
			r.useChains(n)
			if got, want := r.dev.NeedsCall(), n > distance; got != want {
				t.Errorf("event %d ahead, %d used: NeedsCall is %v", distance, n, got)
			}
		}
	}
	for behind := 1; behind < size; behind++ { // long ago
		r.events(virtio.EventDesc, r.dev.packed.used)
		r.useChains(behind)
		r.dev.NeedsCall()
		r.useChains(1)
		if r.dev.NeedsCall() {
			t.Errorf("a call %d descriptors after the event", behind)
		}
	}
	r.events(virtio.EventDesc, r.dev.packed.used.plus(size, size).plus(1, size))
	r.useChains(size)
	r.useChains(1)
	if !r.dev.NeedsCall() {
		t.Error("NeedsCall is false though the ring went all the way round")
	}
	// Of a chain, what counts is the place of its used descriptor's successor: the event may lie within it.
	for inside := range 3 {
		r.events(virtio.EventDesc, r.dev.packed.used.plus(inside, size))
		id := r.add([]Buf{r.buf(0, 1), r.buf(0, 1), r.buf(0, 1)}, nil)
		r.put(r.pop(Popped).Head, 0)
		r.reap(id, 0)
		if !r.dev.NeedsCall() {
			t.Errorf("no call for a chain of 3 with the event at its descriptor %d", inside)
		}
	}
}

func packedCallReserved(t *testing.T) {
	r := newRig(t, 8, packed)
	for i := range 20 {
		r.events(uint32(2+i%2), r.dev.packed.used.plus(5, 8))
		r.useChains(1)
		if !r.dev.NeedsCall() {
			t.Error("no call")
		}
	}
}

func packedKickFlags(t *testing.T) {
	r := newRig(t, 7, packed)
	for range 10 {
		r.dev.DisableKick()
		r.add([]Buf{r.buf(0, 1)}, nil)
		if got := *r.drv.packed.deviceEvent >> 16; got != virtio.EventDisable || r.drv.NeedsKick() {
			t.Errorf("after DisableKick: flags %d, or the driver kicks", got)
		}
		r.put(r.pop(Popped).Head, 0)
		if r.dev.EnableKick() {
			t.Error("EnableKick found chains in an empty ring")
		}
		if got := *r.drv.packed.deviceEvent; got != virtio.EventEnable<<16 {
			t.Errorf("after EnableKick: event suppression %#x", got)
		}
		r.add([]Buf{r.buf(0, 1)}, nil)
		if !r.drv.NeedsKick() {
			t.Error("no kick after EnableKick")
		}
		if !r.dev.EnableKick() {
			t.Error("EnableKick missed a chain")
		}
		r.put(r.pop(Popped).Head, 0)
		for r.drv.Out() > 0 {
			r.drv.Reap()
		}
	}
}

func packedKickEvent(t *testing.T) {
	r := newRig(t, 7, packed|virtio.FEventIdx)
	id := r.add([]Buf{r.buf(0, 1)}, nil)
	if !r.drv.NeedsKick() {
		t.Error("no kick for the first chain")
	}
	beyond := r.cfg.Used[virtio.EventLen:]
	beyond[0], beyond[1] = 0xaa, 0x55
	for range 50 {
		r.put(r.pop(Popped).Head, 0)
		r.reap(id, 0)
		if r.dev.EnableKick() {
			t.Error("EnableKick found chains in an empty ring")
		}
		if got, want := *r.drv.packed.deviceEvent, virtio.EventDesc<<16|uint32(r.dev.Base()); got != want {
			t.Errorf("event suppression %#x, want %#x", got, want)
		}
		id = r.add([]Buf{r.buf(0, 1), r.buf(0, 1)}, nil)
		if !r.drv.NeedsKick() {
			t.Error("no kick after EnableKick")
		}
		r.put(r.pop(Popped).Head, 0)
		r.reap(id, 0)
		id = r.add([]Buf{r.buf(0, 1)}, nil)
		if r.drv.NeedsKick() {
			t.Error("a kick though the event has passed")
		}
		r.put(r.pop(Popped).Head, 0)
		r.reap(id, 0)
		r.dev.DisableKick()
		id = r.add([]Buf{r.buf(0, 1)}, nil)
		if r.drv.NeedsKick() {
			t.Error("a kick after DisableKick")
		}
	}
	if beyond[0] != 0xaa || beyond[1] != 0x55 {
		t.Error("the bytes beyond the structure were written")
	}
}
