package vring

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
)

// moved replaces r's device end by a new one that goes on at base and used.
func (r *rig) moved(base, used uint16) {
	r.Helper()
	cfg := r.cfg
	cfg.Base, cfg.UsedBase = base, used
	dev, err := NewDevice(cfg, *r.dev.View())
	if err != nil {
		r.Fatal(err)
	}
	r.dev = dev
}

// TestPackedBaseMovesToAnotherDevice: GET_VRING_BASE of one back-end is SET_VRING_BASE of the next.
func TestPackedBaseMovesToAnotherDevice(t *testing.T) {
	for _, f := range []virtio.Features{packed, packed | virtio.FEventIdx} {
		r := newRig(t, 7, f)
		for round := range 40 {
			a := r.add([]Buf{r.buf(0, 10), r.buf(0, 10)}, nil)
			b := r.add([]Buf{r.buf(0, 20)}, nil)
			r.put(r.pop(Popped).Head, 0)
			r.reap(a, 0)
			r.moved(r.dev.Base(), r.dev.UsedIndex())
			if c := r.pop(Popped); c.Head != b || c.ReadLen != 20 {
				t.Fatalf("round %d: id %d, %d bytes", round, c.Head, c.ReadLen)
			}
			r.put(b, 0)
			if !r.dev.NeedsCall() {
				t.Fatal("the new device does not call")
			}
			r.reap(b, 0)
			r.pop(Empty)
		}
	}
}

// TestPackedUsedBase: what lies between the used and the available base was popped by somebody who never returned it, and is popped again.
func TestPackedUsedBase(t *testing.T) {
	for start := range uint16(7) {
		r := newRigAt(t, 7, packed, start|1<<15)
		r.T = t
		a := r.add([]Buf{r.buf(0, 10), r.buf(0, 10)}, nil)
		b := r.add([]Buf{r.buf(0, 20)}, nil)
		r.pop(Popped)
		r.pop(Popped)
		base, used := r.dev.Base(), r.dev.UsedIndex()
		if base == used || used != start|1<<15 {
			t.Fatalf("base %#x, used %#x", base, used)
		}
		r.moved(base, used)
		if r.dev.Base() != used {
			t.Errorf("goes on at %#x, want %#x", r.dev.Base(), used)
		}
		for _, id := range []uint16{a, b} {
			if c := r.pop(Popped); c.Head != id {
				t.Fatalf("id %d, want %d", c.Head, id)
			}
			r.put(id, 0)
			r.reap(id, 0)
		}
	}
	// A front-end that knows the available index only says that the used one is 0, with wrap counter 0: nothing is available there.
	r := newRigAt(t, 7, packed, 1<<15)
	r.T = t
	for _, full := range []bool{false, true} {
		r.moved(1<<15, 0)
		if r.dev.Base() != 1<<15 || r.dev.UsedIndex() != 1<<15 {
			t.Errorf("full %v: goes on at %#x, %#x", full, r.dev.Base(), r.dev.UsedIndex())
		}
		for r.drv.Free() > 0 {
			r.add([]Buf{r.buf(0, 30)}, nil)
		}
	}
}

func TestPackedUnpop(t *testing.T) {
	r := newRig(t, 13, packed)
	var ids []uint16
	for i := range 5 {
		ids = append(ids, r.add([]Buf{r.buf(0, 10), r.buf(0, 10), r.buf(0, 10)}[:1+i%3], nil))
	}
	start := r.dev.Base()
	for range 3 {
		for range 5 {
			r.pop(Popped)
		}
		r.pop(Empty)
		r.dev.Unpop(4)
		if n := r.dev.Available(); n != 4 || r.dev.Base() == start {
			t.Errorf("%d available, base %#x after Unpop", n, r.dev.Base())
		}
		for _, id := range ids[1:] {
			if c := r.pop(Popped); c.Head != id {
				t.Errorf("popped id %d again, want %d", c.Head, id)
			}
		}
		r.dev.Unpop(5)
		if r.dev.Base() != start {
			t.Errorf("base %#x, was %#x", r.dev.Base(), start)
		}
	}
	r.pop(Popped)
	for _, n := range []int{-1, 2} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("Unpop(%d) with one chain out does not panic", n)
				}
			}()
			r.dev.Unpop(n)
		}()
	}
	r.slots(r.pd(0, 10, 0xffff, 0)) // over the chain that is next
	r.pop(Broken)
	r.dev.Unpop(1)
	r.pop(Broken)
	if r.dev.Base() != start {
		t.Errorf("base %#x after Unpop from a broken ring, want %#x", r.dev.Base(), start)
	}
}

// TestPackedPutOfNothing: what the device does not have cannot be returned; a back-end that does so has a bug.
func TestPackedPutOfNothing(t *testing.T) {
	for name, put := range map[string]func(r *rig){
		"never popped": func(r *rig) { r.put(3, 0) },
		"twice":        func(r *rig) { r.dev.Put(0, 0); r.put(0, 0) },
		"again":        func(r *rig) { r.put(0, 0); r.put(0, 0) },
	} {
		r := newRig(t, 8, packed)
		r.add([]Buf{r.buf(0, 10)}, nil)
		r.pop(Popped)
		func() {
			defer func() {
				if p := recover(); p == nil || !strings.HasPrefix(fmt.Sprint(p), "bug: a chain was put") {
					t.Errorf("%s: panic is %v", name, p)
				}
			}()
			put(r)
		}()
	}
}

// TestPackedWaitsForMoreThanItGot: as TestDeviceWaitsForMoreThanItGot.
func TestPackedWaitsForMoreThanItGot(t *testing.T) {
	for _, f := range []virtio.Features{packed, packed | virtio.FEventIdx} {
		r := newRig(t, 7, f)
		r.add(nil, []Buf{r.buf(0, 10), r.buf(0, 10)})
		r.add(nil, []Buf{r.buf(0, 10)})
		r.drv.NeedsKick()
		r.pop(Popped)
		r.pop(Popped)
		r.pop(Empty)
		r.dev.Unpop(2)
		before := r.dev.Available()
		if !r.dev.EnableKick() || r.dev.Available() != before {
			t.Errorf("%v: %d available before EnableKick, %d after", f, before, r.dev.Available())
		}
		r.add(nil, []Buf{r.buf(0, 10)})
		if !r.drv.NeedsKick() {
			t.Errorf("%v: no kick for the third chain", f)
		}
		if n := r.dev.Available(); n != 3 {
			t.Errorf("%v: %d available, want 3", f, n)
		}
	}
}

func TestPackedRebind(t *testing.T) {
	r := newRig(t, 7, packed)
	a := r.add([]Buf{r.buf(0, 10)}, nil)
	r.pop(Popped)
	b := r.add([]Buf{r.buf(0, 20)}, nil)
	whole := r.table.Regions()[0].Bytes()
	fresh := heapRegion(t, lowBase, len(whole)) // the same guest memory, mapped anew
	copy(fresh.Bytes(), whole)
	part := func(old []byte) []byte { return fresh.Bytes()[len(whole)-len(old):] }
	if err := r.dev.Rebind(part(r.cfg.Desc), part(r.cfg.Avail), part(r.cfg.Used)); err != nil {
		t.Fatal(err)
	}
	if c := r.pop(Popped); c.Head != b {
		t.Errorf("id %d, want %d", c.Head, b)
	}
	r.dev.Put(a, 0)
	r.dev.Put(b, 0)
	r.dev.Publish()
	for i, id := range []uint16{a, b} {
		if got := view[virtio.PackedDesc](part(r.cfg.Desc), 7)[i]; got.ID != id || got.Flags != phaseFlags {
			t.Errorf("used descriptor %d in the new mapping is %+v", i, got)
		}
	}
	if _, _, ok := r.drv.Reap(); ok {
		t.Error("the old mapping was written")
	}
}

func TestPackedDirtyLog(t *testing.T) {
	r := newRigAt(t, 5, packed|virtio.FEventIdx, 3|1<<15)
	r.T = t
	log := &recorder{}
	r.cfg.LogUsed, r.cfg.DescLogAddr, r.cfg.UsedLogAddr = true, 0x5000, 0x9000
	dev, err := NewDevice(r.cfg, guestmem.NewView(r.table, log))
	if err != nil {
		t.Fatal(err)
	}
	r.dev = dev
	for i := range 3 {
		r.add([]Buf{r.buf(0, 1), r.buf(0, 1)}[:1+i%2], nil)
		r.dev.Put(r.pop(Popped).Head, 0)
	}
	r.dev.Publish() // descriptors 3, 4 (which takes 0 as well) and 1
	r.dev.Publish() // nothing
	want := []Buf{{0x5000 + 3*16, 16}, {0x5000 + 4*16, 16}, {0x5000 + 1*16, 16}}
	if diff := cmp.Diff(want, log.writes); diff != "" {
		t.Errorf("Publish logged:\n%s", diff)
	}
	log.writes = nil
	r.dev.DisableKick()
	r.dev.DisableKick() // it is
	r.dev.EnableKick()
	if diff := cmp.Diff([]Buf{{0x9000, 4}, {0x9000, 4}}, log.writes); diff != "" {
		t.Errorf("DisableKick and EnableKick logged:\n%s", diff)
	}
}

func TestPackedAllocatesNothing(t *testing.T) {
	for _, f := range []virtio.Features{packed, packed | virtio.FEventIdx, packed | virtio.FIndirectDesc} {
		for _, buffers := range []int{1, 4} {
			t.Run(fmt.Sprintf("%v/chain=%d", f, buffers), func(t *testing.T) {
				r := newRig(t, 255, f)
				bufs := make([]Buf, buffers)
				for i := range bufs {
					bufs[i] = r.buf(2000*i, 1500)
				}
				bufs[0] = Buf{r.high - 10, 20} // two regions
				n := testing.AllocsPerRun(1000, func() {
					for range 8 {
						r.drv.Add(bufs, nil)
					}
					r.drv.Publish()
					for r.dev.Pop(&r.chain) == Popped {
						r.dev.Put(r.chain.Head, 0)
					}
					r.dev.Publish()
					r.dev.NeedsCall()
					r.dev.EnableKick()
					for _, _, ok := r.drv.Reap(); ok; _, _, ok = r.drv.Reap() {
					}
				})
				if n != 0 || r.drv.Err() != nil || r.drv.Free() != 255 {
					t.Errorf("%v allocations, %d descriptors free, %v", n, r.drv.Free(), r.drv.Err())
				}
			})
		}
	}
}
