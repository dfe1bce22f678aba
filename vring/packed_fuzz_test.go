package vring

import (
	"testing"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// FuzzPackedPop is FuzzSplitPop for packed rings: the descriptor ring lies at the start of memory that is whatever the fuzzer makes of it,
// and the driver's event suppression structure behind it. Between two pops the device's own writes change it further.
func FuzzPackedPop(f *testing.F) {
	ring := func(d ...virtio.PackedDesc) []byte { return shm.Bytes(d) }
	const avail, last = virtio.DescAvail, 15 << 8 // base: slot in the high byte, wrap counter inverted in the low one
	f.Add(uint64(0), uint16(0), ring(virtio.PackedDesc{Addr: 0x1000, Len: 100, ID: 3, Flags: avail}))
	f.Add(uint64(0), uint16(0), ring(
		virtio.PackedDesc{Len: 1, Flags: next | avail}, virtio.PackedDesc{Len: 9, ID: 15, Flags: write | avail},
		virtio.PackedDesc{Len: 9, ID: 15, Flags: avail}))
	f.Add(uint64(0), uint16(last), append(ring(virtio.PackedDesc{Addr: 0x1fff, Len: 2, Flags: virtio.DescUsed}), make([]byte, 512)...))
	f.Add(uint64(virtio.FIndirectDesc|virtio.FEventIdx), uint16(1), ring(
		virtio.PackedDesc{Addr: 16, Len: 48, Flags: indirect | virtio.DescUsed},
		virtio.PackedDesc{Addr: 0xff0, Len: 100, Flags: 0xfffd}, virtio.PackedDesc{Addr: 0x1000, Len: 0x1000},
		virtio.PackedDesc{Addr: 8, Len: 16, Flags: write}))
	f.Fuzz(func(t *testing.T, features uint64, base uint16, mem []byte) {
		fuzzPackedPop(t, virtio.Features(features)&(virtio.FIndirectDesc|virtio.FEventIdx|virtio.FInOrder), base, mem)
	})
}

func fuzzPackedPop(t *testing.T, f virtio.Features, base uint16, mem []byte) {
	low, high := heapRegion(t, 0, 0x1000), heapRegion(t, 0x1000, 0x1000)
	copy(low.Bytes(), mem)
	copy(high.Bytes(), mem[min(len(mem), 0x1000):])
	table, err := guestmem.NewTable(low, high)
	if err != nil {
		t.Fatal(err)
	}
	defer table.Unpin()
	at := place{slot: uint32(base>>8) % fuzzSize, wrap: uint32(^base & 1)}
	dev, err := NewDevice(Config{
		Size: fuzzSize, Desc: low.Bytes(), Avail: low.Bytes()[16*fuzzSize:], Used: shm.Heap(4).Bytes, Features: f | virtio.FRingPacked,
		Base: at.offWrap(), UsedBase: at.offWrap(),
	}, guestmem.NewView(table, nil))
	if err != nil {
		t.Fatal(err)
	}
	c := Chain{Segs: make([]Seg, 0, 1)}
	for i := range 3 * fuzzSize {
		n := dev.Available()
		s := dev.Pop(&c)
		if (s == Broken) != (dev.Err() != nil) || n == 0 && s == Popped {
			t.Fatalf("Pop is %v, Err is %v, %d were available", s, dev.Err(), n)
		}
		if s == Empty || s == Broken {
			return
		}
		checkChain(t, table, s, &c)
		if i%5 == 4 {
			before := dev.Base()
			dev.Unpop(1)
			if s := dev.Pop(&c); s == Empty || s == Broken || dev.Base() != before {
				t.Fatalf("after Unpop, Pop is %v and the base %#x, was %#x", s, dev.Base(), before)
			}
		}
		dev.Put(c.Head, c.WriteLen)
		if i%3 != 0 { // else two are published at once
			dev.Publish()
			dev.NeedsCall()
			dev.EnableKick()
		}
	}
}
