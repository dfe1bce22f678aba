package vring

import (
	"math"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// TestG01PackedMoreThanTheRing: a driver that makes available what it never got back.
func TestG01PackedMoreThanTheRing(t *testing.T) {
	for _, size := range []int{1, 3, 8} {
		r := newRig(t, size, packed)
		for i := range size {
			r.slots(r.pd(0, 10, uint16(i), 0))
			r.pop(Popped)
		}
		r.pop(Empty)
		r.slots(r.pd(0, 10, 0, 0))
		if !r.dev.EnableKick() { // whoever sleeps now never learns of it
			t.Error("EnableKick keeps quiet")
		}
		r.brokenPacked("of the queue are the device's")
	}
}

func TestG02PackedIDBeyondQueue(t *testing.T) {
	for _, size := range []int{8, 255} {
		for _, id := range []int{size, size + 1, 0x8000, 0xffff} {
			r := newRig(t, size, packed)
			r.slots(r.pd(0, 10, uint16(id), 0))
			r.brokenPacked("buffer id ", "queue size ")
			r = newRig(t, size, packed)
			r.slots(r.pd(0, 10, 0, next), r.pd(0, 0, uint16(id), 0)) // bad for two reasons: the id counts
			r.brokenPacked("buffer id ", "queue size ")
		}
	}
}

// TestG15PackedDuplicateID: the device has the id already, published or not.
func TestG15PackedDuplicateID(t *testing.T) {
	r := newRig(t, 8, packed)
	r.slots(r.pd(0, 10, 3, 0), r.pd(0, 10, 3, 0))
	r.pop(Popped)
	r.brokenPacked("buffer id 3", "already")

	r = newRig(t, 8, packed)
	r.slots(r.pd(0, 10, 3, 0), r.pd(0, 10, 3, 0))
	r.dev.Put(r.pop(Popped).Head, 0) // the driver cannot know yet
	r.brokenPacked("buffer id 3", "already")

	r = newRig(t, 8, packed)
	for range 20 { // the same once it has come back is legal
		r.slots(r.pd(0, 10, 3, 0))
		r.put(r.pop(Popped).Head, 0)
	}
	r.slots(r.pd(0, 10, 3, 0))
	r.pop(Popped)
	r.dev.Unpop(1)
	if c := r.pop(Popped); c.Head != 3 {
		t.Errorf("id %d popped after Unpop", c.Head)
	}
}

func TestG15PackedChainLongerThanRing(t *testing.T) {
	for _, taken := range []int{0, 1, 3} { // by another chain
		for _, n := range []uint32{0, 10} { // the length of every buffer: it makes no difference
			const size = 7
			r := newRig(t, size, packed)
			for i := range taken {
				r.slots(r.pd(0, 10, uint16(i), 0))
				r.pop(Popped)
			}
			at := r.dev.packed.next
			for range size {
				d := r.pd(0, n, 5, next|at.available())
				r.drv.RawPacked()[at.slot] = d
				at.advance(1, size)
			}
			if s := r.dev.Pop(&r.chain); s != Broken || r.dev.Err() == nil {
				t.Fatalf("%d taken: Pop is %v", taken, s)
			}
			r.brokenPacked("goes on after")
		}
	}
	r := newRig(t, 7, packed) // one as long as the ring is legal
	var descs []virtio.PackedDesc
	for i := range 7 {
		descs = append(descs, r.pd(i, 1, 6, next))
	}
	descs[6].Flags = 0
	r.slots(descs...)
	if c := r.pop(Popped); len(c.Segs) != 7 {
		t.Errorf("%d segments of a chain of 7", len(c.Segs))
	}
}

// TestG15PackedWrapCounterLies: the rest of a chain has flags of another lap.
func TestG15PackedWrapCounterLies(t *testing.T) {
	for _, start := range []uint32{0, 5, 6} {
		for _, wrap := range []uint32{0, 1} {
			for _, lie := range []uint16{0, virtio.DescAvail, virtio.DescUsed, phaseFlags} {
				r := newRigAt(t, 7, packed, place{start, wrap}.offWrap())
				r.T = t
				second := place{start, wrap}.plus(1, 7)
				if lie == second.available() {
					continue
				}
				r.slots(r.pd(0, 10, 0, next), r.pd(0, 10, 0, 0))
				d := &r.drv.RawPacked()[second.slot]
				d.Flags = d.Flags&^phaseFlags | lie
				r.brokenPacked("of a chain has flags", "not available")
			}
		}
	}
}

// TestG04PackedIndirect: a bad table costs its own chain.
func TestG04PackedIndirect(t *testing.T) {
	const f = packed | virtio.FIndirectDesc
	for name, change := range map[string]func(table []virtio.Desc, d *virtio.PackedDesc){
		"length 0":               func(_ []virtio.Desc, d *virtio.PackedDesc) { d.Len = 0 },
		"length 15":              func(_ []virtio.Desc, d *virtio.PackedDesc) { d.Len = 15 },
		"length 47":              func(_ []virtio.Desc, d *virtio.PackedDesc) { d.Len = 47 },
		"too many":               func(_ []virtio.Desc, d *virtio.PackedDesc) { d.Len = 16 * (MaxIndirect + 1) },
		"2^32-16":                func(_ []virtio.Desc, d *virtio.PackedDesc) { d.Len = math.MaxUint32 - 15 },
		"unmapped":               func(_ []virtio.Desc, d *virtio.PackedDesc) { d.Addr = 0x1000 },
		"unmapped, end of space": func(_ []virtio.Desc, d *virtio.PackedDesc) { d.Addr = math.MaxUint64 - 8 },
		"runs out of memory":     func(_ []virtio.Desc, d *virtio.PackedDesc) { d.Addr = uint64(farBase) + farSize - 32 },
		"entry unmapped":         func(t []virtio.Desc, _ *virtio.PackedDesc) { t[1].Addr = 0 },
		"entry of length 0":      func(t []virtio.Desc, _ *virtio.PackedDesc) { t[2].Len = 0 },
		"readable after writable": func(t []virtio.Desc, _ *virtio.PackedDesc) {
			t[0].Next = write
		},
		"total above 2^32": func(t []virtio.Desc, _ *virtio.PackedDesc) { t[0].Len, t[1].Len, t[2].Len = 1<<31, 1<<31, 1<<31 },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, 15, f)
			at := r.dev.packed.next
			id := r.add([]Buf{r.buf(0, 10), r.buf(0, 10), r.buf(0, 10)}, nil)
			change(r.drv.RawTable(id), &r.drv.RawPacked()[at.slot])
			r.malformedPacked(id, 1)
		})
	}
	t.Run("next and indirect", func(t *testing.T) {
		r := newRig(t, 15, f)
		r.slots(r.pd(0, 16, 1, next|indirect), r.pd(0, 16, 2, 0))
		r.malformedPacked(2, 2)
	})
	t.Run("indirect after direct", func(t *testing.T) {
		r := newRig(t, 15, f)
		r.slots(r.pd(0, 16, 1, next), r.pd(0, 16, 2, indirect))
		r.malformedPacked(2, 2)
	})
	t.Run("not negotiated", func(t *testing.T) {
		r := newRig(t, 15, packed)
		r.slots(r.pd(0, 16, 4, indirect))
		r.malformedPacked(4, 1)
	})
}

// TestPackedReadOnlyTable: in a queue whose buffers nobody writes to, a table's entry that says otherwise is readable all the same.
func TestPackedReadOnlyTable(t *testing.T) {
	r := newRig(t, 15, packed|virtio.FIndirectDesc)
	r.cfg.ReadOnly = true
	dev, err := NewDevice(r.cfg, guestmem.NewView(r.table, nil))
	if err != nil {
		t.Fatal(err)
	}
	r.dev = dev
	id := r.add([]Buf{r.buf(0, 12), r.buf(100, 10), r.buf(200, 20)}, nil)
	r.drv.RawTable(id)[0].Next = write
	if c := r.pop(Popped); c.Readable != 3 || c.ReadLen != 42 || c.WriteLen != 0 {
		t.Errorf("%d segments of %d readable bytes, %d writable", c.Readable, c.ReadLen, c.WriteLen)
	}
}

// TestG04PackedTableAcrossRegions: such a table is legal, as is one that is not aligned.
func TestG04PackedTableAcrossRegions(t *testing.T) {
	for _, off := range []int{-16, -24, -8, -3, -31, -512, -33} {
		r := newRig(t, 15, packed|virtio.FIndirectDesc)
		table := []virtio.PackedDesc{r.pd(0, 10, 9, 0), r.pd(100, 20, 9, write)}
		addr := r.high + guestmem.GPA(off)
		for i, b := range shm.Bytes(table) {
			r.table.Slice(addr+guestmem.GPA(i), 1)[0] = b
		}
		r.slots(virtio.PackedDesc{Addr: uint64(addr), Len: 32, Flags: indirect})
		want := shape{Segs: []Buf{r.buf(0, 10), r.buf(100, 20)}, Readable: 1, ReadLen: 10, WriteLen: 20}
		if diff := cmp.Diff(want, shapeOf(r.pop(Popped))); diff != "" {
			t.Errorf("table at %d from the end of the region:\n%s", off, diff)
		}
	}
}

func TestG05PackedBuffers(t *testing.T) {
	for name, d := range map[string]virtio.PackedDesc{
		"length 0":              {Addr: uint64(lowBase)},
		"length 0, unmapped":    {Addr: 1},
		"length 2^32-1":         {Addr: uint64(lowBase), Len: math.MaxUint32},
		"unmapped":              {Addr: 0x1000, Len: 1},
		"crosses into nothing":  {Addr: uint64(farBase) + farSize - 10, Len: 11},
		"address and length":    {Addr: math.MaxUint64 - 3, Len: 8},
		"just below the region": {Addr: uint64(lowBase) - 1, Len: 2},
	} {
		for _, flags := range []uint16{0, write} {
			t.Run(name, func(t *testing.T) {
				r := newRig(t, 15, packed)
				for range 2 { // before and after the region was hit: popPacked and popPackedSlow
					d.ID, d.Flags = 7, flags
					r.slots(d)
					r.malformedPacked(7, 1)
				}
				first := d
				first.ID, first.Flags = 9, flags|next
				r.slots(first, r.pd(0, 10, 8, flags)) // bad at the start: the id is at the end
				r.malformedPacked(8, 2)
				r.slots(r.pd(0, 10, 9, next|flags), d)
				r.malformedPacked(7, 2)
			})
		}
	}
	t.Run("more than MaxSegs", func(t *testing.T) {
		r := newRig(t, 2*MaxSegs+1, packed)
		descs := make([]virtio.PackedDesc, MaxSegs+1)
		for i := range descs {
			descs[i] = r.pd(0, 1, 11, next)
		}
		descs[MaxSegs].Flags = 0
		r.slots(descs...)
		r.malformedPacked(11, MaxSegs+1)
		r.slots(descs[1:]...)
		if c := r.pop(Popped); len(c.Segs) != MaxSegs {
			t.Errorf("%d segments, want %d", len(c.Segs), MaxSegs)
		}
	})
}

func TestG05PackedBufferAcrossRegions(t *testing.T) {
	r := newRig(t, 15, packed)
	r.slots(virtio.PackedDesc{Addr: uint64(r.high) - 100, Len: 300, ID: 4, Flags: next}, r.pd(0, 7, 4, write))
	want := shape{
		Head: 4, Segs: []Buf{{r.high - 100, 100}, {r.high, 200}, r.buf(0, 7)}, Readable: 2, ReadLen: 300, WriteLen: 7,
	}
	if diff := cmp.Diff(want, shapeOf(r.pop(Popped))); diff != "" {
		t.Error(diff)
	}
}

func TestG06PackedReadableAfterWritable(t *testing.T) {
	r := newRig(t, 15, packed)
	r.slots(r.pd(0, 10, 1, next), r.pd(0, 10, 2, next|write), r.pd(0, 10, 3, 0))
	r.malformedPacked(3, 3)
}

// TestG13PackedPartsOverlap: parts that lie on top of each other, or of the buffers, harm the guest alone.
func TestG13PackedPartsOverlap(t *testing.T) {
	for _, lay := range []struct{ driver, device int }{{0, 0}, {12, 12}, {8, 28}, {28, 12}, {12, 8}} {
		r := newRig(t, 15, packed|virtio.FEventIdx|virtio.FIndirectDesc)
		b := r.cfg.Desc
		cfg := r.cfg
		cfg.Avail, cfg.Used = b[lay.driver:], b[lay.device:]
		dev, err := NewDevice(cfg, *r.dev.View())
		if err != nil {
			t.Fatal(err)
		}
		r.dev = dev
		for i := range 100 {
			r.slots(r.pd(0, 10, uint16(i%15), 0))
			switch dev.Pop(&r.chain) {
			case Popped, Malformed:
				dev.Put(r.chain.Head, 1)
			}
			dev.Publish()
			dev.NeedsCall()
			dev.EnableKick()
			dev.DisableKick()
		}
	}
}

// TestG08PackedSingleFetch: a descriptor that changes all the time is still one descriptor to whoever pops it. The memory is not Go's, so
// that the race detector lets the guest have its way.
func TestG08PackedSingleFetch(t *testing.T) {
	r := newRig(t, 15, packed)
	ring := mapPacked(t, r)
	stop, done := make(chan struct{}), make(chan struct{})
	defer func() { close(stop); <-done }()
	at := r.dev.packed.next
	go func() {
		defer close(done)
		phase := at.available()
		set := func(n uint32, id, flags uint16) {
			atomic.StoreUint64(&ring[at.slot].word, packWord(n, id, flags|phase))
		}
		for {
			select {
			case <-stop:
				return
			default:
			}
			for range 100 {
				set(100, 1, write)
				set(50_000, 2, 0)
				set(100, 1, next)
				set(math.MaxUint32, 3, indirect)
			}
		}
	}()
	second := at.plus(1, 15)
	ring[second.slot] = slot{addr: uint64(r.data), word: packWord(100, 4, second.available())}
	statuses := map[Status]int{}
	c := Chain{Segs: make([]Seg, 0, 4)}
	for range 200_000 {
		s := r.dev.Pop(&c)
		statuses[s]++
		switch s {
		case Popped:
			consistent(t, &c)
			if n := len(c.Segs[0].Mem); (c.Head == 2) != (n == 50_000) {
				t.Fatalf("id %d with a segment of %d bytes", c.Head, n)
			}
			r.dev.Unpop(1)
		case Malformed:
			r.dev.Unpop(1)
		case Empty: // before the other goroutine's first store
		case Broken:
			t.Fatal(r.dev.Err())
		}
	}
	t.Logf("%v", statuses)
}

// mapPacked moves the device end of r to a ring in mapped memory, whose first descriptors to pop have the data area's address.
func mapPacked(t *testing.T, r *rig) []slot {
	t.Helper()
	m := mapMemory(t)
	if err := r.dev.Rebind(m, m[1<<15:], m[1<<15+4:]); err != nil {
		t.Fatal(err)
	}
	ring := r.dev.packed.ring
	ring[r.dev.packed.next.slot].addr = uint64(r.data)
	return ring
}
