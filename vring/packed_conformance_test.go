package vring

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vhostd/vhostd/virtio"
)

// TestPackedDeviceConformance has a subtest for each clause of virtio-v1.2 §2.8 that binds a device.
func TestPackedDeviceConformance(t *testing.T) {
	for _, c := range []struct {
		clause string
		test   func(*testing.T)
	}{
		{"2.8/queue size up to 32768, not only powers of two", packedSizes},
		{"2.8.1/wrap counters: round the ring, at any size", packedWrap},
		{"2.8.1/available only if AVAIL is the wrap counter and USED is not", packedPhase},
		{"2.8.2/only the next descriptor is polled", packedPolls},
		{"2.8.3/WRITE of a used descriptor tells whether anything was written", packedWriteFlag},
		{"2.8.6/chains: id in the last descriptor, one used descriptor", packedChain},
		{"2.8.6/no assumption about the arrangement of descriptors", packedFraming},
		{"2.8.7/indirect tables: one after the other, all flags but WRITE ignored", packedIndirect},
		{"2.8.8/IN_ORDER: used in the order made available", packedInOrder},
		{"2.8.9/of a batch, the first used descriptor is written last", packedFirstLast},
		{"2.8.10/flags ENABLE and DISABLE", packedCallFlags},
		{"2.8.10/DESC: when the descriptor at the offset is used", packedCallEvent},
		{"2.8.10/DESC without EVENT_IDX, and the reserved value, do not suppress", packedCallReserved},
		{"2.8.10/device event suppression, flags", packedKickFlags},
		{"2.8.10/device event suppression, EVENT_IDX", packedKickEvent},
		{"2.8.10.1/parts have their alignment and size", packedAlignment},
		{"2.8.12/used descriptors in the order of completion", packedCompletion},
		{"2.8.15/device writes neither readable buffers nor tables", packedNoWrites},
		{"2.8.15/zero-initialized ring has nothing available", packedZero},
	} {
		t.Run(c.clause, c.test)
	}
}

func packedSizes(t *testing.T) {
	for _, size := range []int{1, 2, 3, 5, 255, 256, 257, 1000, 32767, 32768} {
		r := newRig(t, size, packed)
		if r.dev.Size() != size || r.drv.Size() != size {
			t.Errorf("sizes %d and %d, want %d", r.dev.Size(), r.drv.Size(), size)
		}
		for i := range 40 {
			id := r.add([]Buf{r.buf(i, 64)}, nil)
			if c := r.pop(Popped); c.Segs[0].Addr != r.buf(i, 64).GPA {
				t.Fatalf("chain %d is at %#x", i, c.Segs[0].Addr)
			}
			r.put(r.chain.Head, 0)
			r.reap(id, 0)
		}
	}
	r := newRig(t, 256, packed)
	for _, size := range []int{-1, 0, 32769, 65536} {
		cfg := r.cfg
		cfg.Size = size
		if _, err := NewDevice(cfg, *r.dev.View()); err == nil || !strings.Contains(err.Error(), "1 to 32768") {
			t.Errorf("queue size %d: %v", size, err)
		}
	}
	for _, base := range []place{{256, 0}, {257, 1}, {32767, 1}} {
		for _, to := range []func(*Config, uint16){
			func(c *Config, v uint16) { c.Base = v }, func(c *Config, v uint16) { c.UsedBase = v },
		} {
			cfg := r.cfg
			to(&cfg, base.offWrap())
			if _, err := NewDevice(cfg, *r.dev.View()); err == nil || !strings.Contains(err.Error(), "queue size 256") {
				t.Errorf("base %+v: %v", base, err)
			}
		}
	}
}

func packedWrap(t *testing.T) {
	for _, size := range []int{1, 2, 7, 8, 61} {
		r := newRig(t, size, packed)
		was := r.dev.Base()
		for lap := range 4 {
			for i := range size {
				id := r.add(nil, []Buf{r.buf(i, 100)})
				if got := r.pop(Popped).Segs[0].Addr; got != r.buf(i, 100).GPA {
					t.Fatalf("size %d, lap %d: chain %d is at %#x", size, lap, i, got)
				}
				r.put(id, uint32(i))
				r.reap(id, uint32(i))
			}
			if got, want := r.dev.Base()>>15, was>>15^uint16(lap+1)&1; got != want || r.dev.UsedIndex() != r.dev.Base() {
				t.Errorf("size %d: wrap counter %d after lap %d; base %#x, used %#x", size, got, lap, r.dev.Base(), r.dev.UsedIndex())
			}
		}
		if r.dev.Base() != was {
			t.Errorf("size %d: base %#x after whole laps, was %#x", size, r.dev.Base(), was)
		}
	}
}

func packedPhase(t *testing.T) {
	for _, wrap := range []uint32{0, 1} {
		r := newRigAt(t, 8, packed, place{3, wrap}.offWrap())
		r.T = t
		for _, flags := range []uint16{0, virtio.DescAvail, virtio.DescUsed, phaseFlags} {
			if flags == (place{3, wrap}).available() {
				continue
			}
			for _, more := range []uint16{0, next, write, indirect} {
				r.drv.RawPacked()[3] = r.pd(0, 10, 0, flags|more)
				r.pop(Empty)
				if r.dev.Available() != 0 || r.dev.EnableKick() {
					t.Errorf("wrap counter %d, flags %#x: available", wrap, flags|more)
				}
			}
		}
		r.drv.RawPacked()[3] = r.pd(0, 10, 0, (place{3, wrap}).available())
		if !r.dev.EnableKick() || r.dev.Available() != 1 {
			t.Error("an available descriptor was missed")
		}
		r.pop(Popped)
	}
}

func packedPolls(t *testing.T) {
	r := newRig(t, 8, packed)
	at := r.dev.packed.next
	for i := 1; i < 8; i++ { // all but the next one
		p := at.plus(i, 8)
		r.drv.RawPacked()[p.slot] = r.pd(0, 10, uint16(i), p.available())
	}
	r.pop(Empty)
	if r.dev.Available() != 0 || r.dev.EnableKick() {
		t.Error("a descriptor behind one that is not available counts")
	}
	r.slots(r.pd(0, 10, 0, 0))
	if n := r.dev.Available(); n != 8 {
		t.Errorf("%d chains available, want 8", n)
	}
	for i := range uint16(8) {
		if c := r.pop(Popped); c.Head != i {
			t.Errorf("id %d, want %d", c.Head, i)
		}
	}
	r.pop(Empty)
}

func packedWriteFlag(t *testing.T) {
	r := newRig(t, 8, packed)
	for _, written := range []uint32{0, 1, 100} {
		at := r.dev.packed.used
		id := r.add(nil, []Buf{r.buf(0, 100)})
		r.put(r.pop(Popped).Head, written)
		got := r.drv.RawPacked()[at.slot]
		if got.Flags&write != 0 != (written > 0) || got.Len != written || got.Flags&phaseFlags != at.used() {
			t.Errorf("%d bytes written: %+v", written, got)
		}
		r.reap(id, written)
	}
}

func packedChain(t *testing.T) {
	r := newRig(t, 8, packed)
	for range 40 {
		at := r.dev.packed.next
		r.slots(r.pd(0, 10, 71, next), r.pd(20, 20, 72, next), r.pd(60, 30, 5, write))
		want := shape{
			Head: 5, Segs: []Buf{r.buf(0, 10), r.buf(20, 20), r.buf(60, 30)}, Readable: 2, ReadLen: 30, WriteLen: 30,
		}
		if diff := cmp.Diff(want, shapeOf(r.pop(Popped))); diff != "" {
			t.Fatal(diff)
		}
		rest := [2]virtio.PackedDesc{r.drv.RawPacked()[at.plus(1, 8).slot], r.drv.RawPacked()[at.plus(2, 8).slot]}
		r.put(5, 7)
		if got := r.drv.RawPacked()[at.slot]; got.ID != 5 || got.Len != 7 || got.Flags != at.used()|write {
			t.Fatalf("used descriptor %+v", got)
		}
		if rest != [2]virtio.PackedDesc{r.drv.RawPacked()[at.plus(1, 8).slot], r.drv.RawPacked()[at.plus(2, 8).slot]} {
			t.Fatal("more than one descriptor was written")
		}
		if got := r.dev.packed.used; got != at.plus(3, 8) {
			t.Fatalf("the next used descriptor is at %+v, after a chain of 3 at %+v", got, at)
		}
	}
}

func packedFraming(t *testing.T) {
	for _, f := range []virtio.Features{packed, packed | virtio.FIndirectDesc} {
		r := newRig(t, 61, f)
		for readable := range 20 {
			for writable := range 20 {
				if readable+writable == 0 {
					continue
				}
				var bufs []Buf
				for i := range readable + writable {
					bufs = append(bufs, r.buf(1000*i, uint32(1+i*7)))
				}
				in, out := bufs[:readable], bufs[readable:]
				want := shape{Head: r.add(in, out), Segs: bufs, Readable: readable}
				for _, b := range in {
					want.ReadLen += b.Len
				}
				for _, b := range out {
					want.WriteLen += b.Len
				}
				if diff := cmp.Diff(want, shapeOf(r.pop(Popped))); diff != "" {
					t.Fatalf("%v, %d readable, %d writable:\n%s", f, readable, writable, diff)
				}
				r.put(want.Head, want.WriteLen)
				r.reap(want.Head, want.WriteLen)
			}
		}
		if r.drv.Free() != 61 {
			t.Errorf("%d descriptors free, want 61", r.drv.Free())
		}
	}
}

func packedIndirect(t *testing.T) {
	r := newRig(t, 16, packed|virtio.FIndirectDesc)
	id := r.add([]Buf{r.buf(0, 10), r.buf(100, 10)}, []Buf{r.buf(10, 20)})
	for i := range 3 {
		e := &r.drv.RawTable(id)[i]
		e.Flags = 0xffff          // the buffer id
		e.Next |= 0xffff &^ write // the flags
	}
	r.drv.RawPacked()[0].Flags |= write // ignored, as the spec says
	want := shape{
		Head: id, Segs: []Buf{r.buf(0, 10), r.buf(100, 10), r.buf(10, 20)}, Readable: 2, ReadLen: 20, WriteLen: 20,
	}
	if diff := cmp.Diff(want, shapeOf(r.pop(Popped))); diff != "" {
		t.Error(diff)
	}
	r.put(id, 20)
	r.reap(id, 20)
}

func packedInOrder(t *testing.T) {
	r := newRig(t, 7, packed|virtio.FInOrder)
	for round := range 100 {
		var ids []uint16
		for i := range 1 + round%4 {
			ids = append(ids, r.add([]Buf{r.buf(0, 4), r.buf(8, 4)}[:1+i%2], nil))
		}
		for _, id := range ids {
			if c := r.pop(Popped); c.Head != id {
				t.Fatalf("popped id %d, want %d", c.Head, id)
			}
			r.dev.Put(id, 0)
		}
		r.dev.Publish()
		for _, id := range ids {
			r.reap(id, 0) // the Driver checks the order
		}
	}
}

// packedFirstLast cannot see the order of stores, but what a fault in the middle of them leaves: nothing that the driver would look at.
func packedFirstLast(t *testing.T) {
	r := newRig(t, 8, packed)
	var ids []uint16
	for range 3 {
		ids = append(ids, r.add([]Buf{r.buf(0, 1)}, nil))
		r.pop(Popped)
	}
	for _, id := range ids {
		r.dev.Put(id, 0)
	}
	whole := r.dev.packed.ring
	r.dev.packed.ring = whole[:len(whole)-6] // the last of the three is beyond it
	func() {
		defer func() { _ = recover() }()
		r.dev.Publish()
	}()
	if _, _, ok := r.drv.Reap(); ok || r.drv.Err() != nil {
		t.Fatalf("the driver saw a batch that was not complete: %v", r.drv.Err())
	}
	r.dev.packed.ring = whole
	r.dev.Publish()
	for _, id := range ids {
		r.reap(id, 0)
	}
}

func packedAlignment(t *testing.T) {
	r := newRig(t, 255, packed)
	for name, change := range map[string]func(*Config){
		"descriptor ring is not aligned to 16":         func(c *Config) { c.Desc = c.Desc[8:] },
		"driver event suppression is not aligned to 4": func(c *Config) { c.Avail = c.Avail[2:] },
		"device event suppression is not aligned to 4": func(c *Config) { c.Used = c.Used[2:] },
		"descriptor ring of 4079 bytes":                func(c *Config) { c.Desc = c.Desc[:16*255-1] },
		"driver event suppression of 3 bytes":          func(c *Config) { c.Avail = c.Avail[:3] },
		"device event suppression of 3 bytes":          func(c *Config) { c.Used = c.Used[:3] },
	} {
		cfg := r.cfg
		change(&cfg)
		if _, err := NewDevice(cfg, *r.dev.View()); err == nil || !strings.HasPrefix(err.Error(), name) {
			t.Errorf("%q, want %q", err, name)
		}
		if err := r.dev.Rebind(cfg.Desc, cfg.Avail, cfg.Used); err == nil {
			t.Errorf("Rebind: no error, want %q", name)
		}
	}
}

func packedCompletion(t *testing.T) {
	r := newRig(t, 16, packed)
	bufs := []Buf{r.buf(0, 1), r.buf(0, 1), r.buf(0, 1)}
	for range 50 {
		a, b, c := r.add(bufs[:1], nil), r.add(bufs[:3], nil), r.add(bufs[:2], nil)
		for range 3 {
			r.pop(Popped)
		}
		r.dev.Put(c, 0)
		r.dev.Put(a, 0)
		r.dev.Publish()
		r.put(b, 0)
		r.reap(c, 0)
		r.reap(a, 0)
		r.reap(b, 0)
	}
}

func packedNoWrites(t *testing.T) {
	r := newRig(t, 16, packed|virtio.FIndirectDesc)
	before := r.mem(r.buf(0, 300))
	for i := range before {
		before[i] = byte(i)
	}
	a := r.add([]Buf{r.buf(0, 100), r.buf(100, 100)}, []Buf{r.buf(200, 100)})
	table := append([]virtio.Desc(nil), r.drv.RawTable(a)...)
	r.pop(Popped)
	r.put(a, 0)
	r.dev.EnableKick()
	if diff := cmp.Diff(table, r.drv.RawTable(a)); diff != "" {
		t.Errorf("indirect table changed:\n%s", diff)
	}
	for i, v := range before {
		if v != byte(i) {
			t.Fatalf("byte %d of a buffer changed", i)
		}
	}
}

func packedZero(t *testing.T) {
	for slot := range uint32(5) {
		for _, wrap := range []uint32{0, 1} {
			r := newRigAt(t, 5, packed, place{slot, wrap}.offWrap())
			r.T = t
			for range 100 { // a kick without a chain is a Pop of an empty ring
				r.pop(Empty)
			}
			r.dev.Publish()
			if r.dev.NeedsCall() || r.dev.Available() != 0 {
				t.Error("an empty ring led to a call, or has chains")
			}
			if _, _, ok := r.drv.Reap(); ok {
				t.Error("an empty ring has used descriptors")
			}
		}
	}
}
