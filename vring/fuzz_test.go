package vring

import (
	"testing"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// fuzzSize is the size of the queue that fuzzing pops from.
const fuzzSize = 16

// FuzzSplitPop pops from a ring of 16 whose memory, buffers and indirect tables included, is whatever the fuzzer makes of it.
// Whatever comes: no panic, no byte outside guest memory, sums that are right, and an end.
func FuzzSplitPop(f *testing.F) {
	desc := func(d ...virtio.Desc) []byte { return shm.Bytes(d) }
	f.Add(uint64(0), []byte{0, 0, 1, 0, 0, 0}, desc(virtio.Desc{Addr: 0x1000, Len: 100}))
	f.Add(uint64(0), []byte{0, 0, 2, 0, 0, 0, 1, 0}, desc(virtio.Desc{Len: 1, Flags: next, Next: 1}, virtio.Desc{Len: 9, Flags: write}))
	f.Add(uint64(0), []byte{0, 0, 9, 0, 44, 1}, desc(virtio.Desc{Addr: 0x1fff, Len: 0x100, Flags: next}))
	f.Add(uint64(virtio.FIndirectDesc), []byte{0, 0, 1, 0}, desc(
		virtio.Desc{Addr: 16, Len: 48, Flags: indirect}, virtio.Desc{Addr: 0xff0, Len: 100, Flags: next, Next: 2},
		virtio.Desc{Addr: 0x1000, Len: 0x1000, Flags: next, Next: 0}, virtio.Desc{Addr: 8, Len: 16, Flags: write}))
	f.Add(uint64(virtio.FIndirectDesc|virtio.FEventIdx), []byte{1, 0, 16, 0}, desc(
		virtio.Desc{Addr: 0xff8, Len: 160, Flags: indirect | write}, virtio.Desc{Len: 1 << 31, Flags: indirect | next}))
	f.Fuzz(func(t *testing.T, features uint64, avail, mem []byte) {
		fuzzPop(t, virtio.Features(features)&(virtio.FIndirectDesc|virtio.FEventIdx|virtio.FInOrder|virtio.FNotifyOnEmpty), avail, mem)
	})
}

// fuzzPop lays mem over guest memory of two regions that touch, at 0 and at 0x1000, with the descriptor table at its start.
func fuzzPop(t *testing.T, f virtio.Features, avail, mem []byte) {
	const size = fuzzSize
	low, high := heapRegion(t, 0, 0x1000), heapRegion(t, 0x1000, 0x1000)
	copy(low.Bytes(), mem)
	copy(high.Bytes(), mem[min(len(mem), 0x1000):])
	table, err := guestmem.NewTable(low, high)
	if err != nil {
		t.Fatal(err)
	}
	defer table.Unpin()
	ring := shm.Heap(virtio.AvailLen(size)).Bytes
	copy(ring, avail)
	dev, err := NewDevice(Config{
		Size: size, Desc: low.Bytes(), Avail: ring, Used: shm.Heap(virtio.UsedLen(size)).Bytes, Features: f,
	}, guestmem.NewView(table, nil))
	if err != nil {
		t.Fatal(err)
	}
	c := Chain{Segs: make([]Seg, 0, 1)}
	for range size + 1 {
		s := dev.Pop(&c)
		if (s == Broken) != (dev.Err() != nil) {
			t.Fatalf("Pop is %v, Err is %v", s, dev.Err())
		}
		if s == Empty || s == Broken {
			return
		}
		checkChain(t, table, s, &c)
		dev.Put(c.Head, c.WriteLen)
		dev.Publish()
		dev.NeedsCall()
		dev.EnableKick()
	}
	t.Fatalf("popped %d chains from a ring of %d", size+1, size)
}

// checkChain checks what Pop promises of a chain.
func checkChain(t *testing.T, table *guestmem.Table, s Status, c *Chain) {
	t.Helper()
	var sums [2]uint64
	for i, seg := range c.Segs {
		want := table.Slice(seg.Addr, uint64(len(seg.Mem)))
		if len(want) == 0 || &want[0] != &seg.Mem[0] || cap(seg.Mem) != len(seg.Mem) {
			t.Fatalf("segment at %#x of %d bytes is not the guest's memory there", seg.Addr, len(seg.Mem))
		}
		if i < c.Readable {
			sums[0] += uint64(len(seg.Mem))
		} else {
			sums[1] += uint64(len(seg.Mem))
		}
	}
	if sums != [2]uint64{uint64(c.ReadLen), uint64(c.WriteLen)} || c.Readable > len(c.Segs) {
		t.Fatalf("sums of the segments are %d: %+v", sums, shapeOf(c))
	}
	if (s == Popped) != (len(c.Segs) > 0) || int(c.Head) >= fuzzSize {
		t.Fatalf("%v chain of head %d with %d segments", s, c.Head, len(c.Segs))
	}
}
