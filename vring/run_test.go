package vring

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vhostd/vhostd/virtio"
)

// room is n chains that a run can be popped into.
func room(n int) []Chain {
	chains := make([]Chain, n)
	for i := 0; i < n; i += 2 {
		chains[i].Segs = make([]Seg, 0, 1) // the others have no memory yet
	}
	return chains
}

// popRun pops a run into room for most, and compares it with buffers of the chains that were added.
func (r *rig) popRun(most int, want ...Buf) {
	r.Helper()
	chains := room(most)
	n := r.dev.PopRun(chains)
	var got []Buf
	for _, c := range chains[:n] {
		if len(c.Segs) != 1 || c.Descs != 1 || c.ReadLen+c.WriteLen != uint32(len(c.Segs[0].Mem)) || c.Readable == 1 != (c.ReadLen > 0) {
			r.Fatalf("chain %+v", c)
		}
		got = append(got, Buf{GPA: c.Segs[0].Addr, Len: uint32(len(c.Segs[0].Mem))})
	}
	if diff := cmp.Diff(want, got); diff != "" {
		r.Fatalf("run of %d:\n%s", n, diff)
	}
	for _, c := range chains[:n] {
		r.dev.Put(c.Head, c.WriteLen)
	}
	r.dev.Publish()
	for range n {
		if _, _, ok := r.drv.Reap(); !ok {
			r.Fatalf("not used: %v", r.drv.Err())
		}
	}
}

// TestPopRun: a run ends where a chain is of another kind, and goes on behind it.
func TestPopRun(t *testing.T) {
	for name, f := range map[string]virtio.Features{"split": virtio.FIndirectDesc, "packed": virtio.FRingPacked | virtio.FIndirectDesc} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 32, f)
			a, b, c := r.buf(0, 100), r.buf(1000, 200), r.buf(2000, 300)
			elsewhere := Buf{GPA: farBase, Len: 60}
			r.popRun(8)
			r.add([]Buf{a}, nil)
			r.pop(Popped) // the first finds the memory region
			r.put(r.chain.Head, 0)
			r.reap(r.chain.Head, 0)
			for range 3 {
				r.add([]Buf{a}, nil)
				r.add(nil, []Buf{b})
				r.add([]Buf{c}, nil)
				r.add([]Buf{a, b}, nil) // in an indirect table
				r.add([]Buf{c}, nil)
				r.add([]Buf{elsewhere}, nil)
				r.popRun(0)
				r.popRun(1, a)
				r.popRun(8, b, c)
				r.popRun(8)
				for range 2 { // the table, which lies in the same region, and c behind it
					r.pop(Popped)
					r.put(r.chain.Head, 0)
					r.reap(r.chain.Head, 0)
				}
				r.popRun(8)
				r.pop(Popped) // and back again
				r.put(r.chain.Head, 0)
				r.reap(r.chain.Head, 0)
				r.popRun(8)
				r.add([]Buf{a}, nil)
				r.pop(Popped)
				r.put(r.chain.Head, 0)
				r.reap(r.chain.Head, 0)
			}
		})
	}
}

// TestPopRunUnpop: what is given back of a run is popped again, and only that.
func TestPopRunUnpop(t *testing.T) {
	for name, f := range map[string]virtio.Features{"split": 0, "packed": virtio.FRingPacked} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 32, f)
			var want []Buf
			for i := range 32 {
				b := r.buf(i*64, uint32(1+i))
				want = append(want, b)
				r.add([]Buf{b}, nil)
			}
			r.pop(Popped)
			r.put(r.chain.Head, 0)
			r.reap(r.chain.Head, 0)
			if n := r.dev.PopRun(room(20)); n != 20 {
				t.Fatalf("run of %d, want 20", n)
			}
			r.dev.Unpop(15)
			r.dev.Unpop(5)
			r.popRun(64, want[1:]...)
			r.popRun(64)
		})
	}
}

// TestPopRunBroken: what only a broken ring can have is never in a run.
func TestPopRunBroken(t *testing.T) {
	for name, spoil := range map[string]func(r *rig){
		"head":           func(r *rig) { r.rawHead(16) },
		"index":          func(r *rig) { r.drv.RawSetAvailIndex(r.dev.Base() + 17) },
		"empty buffer":   func(r *rig) { r.raw(r.desc(0, 0, 0, 0)) },
		"no such memory": func(r *rig) { r.raw(virtio.Desc{Addr: uint64(farBase - 1), Len: 1}) },
		"end of memory":  func(r *rig) { r.raw(virtio.Desc{Addr: uint64(r.high) - 1, Len: 2}) },
		"a link":         func(r *rig) { r.raw(r.desc(0, 10, virtio.DescNext, 3)) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 16, 0)
			r.dev.View().Slice(lowBase, 1)
			spoil(r)
			if n := r.dev.PopRun(room(4)); n != 0 {
				t.Fatalf("run of %d", n)
			}
		})
	}
	t.Run("an id twice", func(t *testing.T) {
		r := newRig(t, 16, virtio.FRingPacked)
		r.dev.View().Slice(lowBase, 1)
		at := r.dev.packed.next
		for range 3 {
			r.dev.packed.ring[at.slot] = slot{addr: uint64(r.data), word: packWord(10, 7, at.available())}
			at.advance(1, 16)
		}
		if n := r.dev.PopRun(room(4)); n != 1 {
			t.Fatalf("run of %d, want 1", n)
		}
		r.pop(Broken)
		if n := r.dev.PopRun(room(4)); n != 0 {
			t.Fatalf("run of %d of a broken ring", n)
		}
	})
}
