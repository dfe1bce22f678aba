package vring

import (
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// FuzzChangingMemory pops while another thread writes: each word of guest memory, ring and all, is one of two at any moment. The memory is
// not Go's, so that the race detector lets the guest have its way. Whatever Pop saw, a chain lies in guest memory, its sums are those of
// its segments, and each of these was a descriptor at some time.
func FuzzChangingMemory(f *testing.F) {
	image := func(d ...virtio.Desc) []byte {
		b := make([]byte, fuzzUsed)
		copy(b, shm.Bytes(d))
		copy(b[fuzzAvail:], shm.Bytes([]uint16{0, 4, 0, 1, 0, 2}))
		return b
	}
	long := image(virtio.Desc{Addr: 0x300, Len: 0x100, Flags: next, Next: 1}, virtio.Desc{Addr: 0xf00, Len: 0x200, Flags: write}, virtio.Desc{Len: 5})
	f.Add(uint64(0), long, image(virtio.Desc{Addr: 0x800, Len: 0x100}, virtio.Desc{Addr: 1 << 40, Len: 0x200}, virtio.Desc{Len: 1 << 31}))
	f.Add(uint64(virtio.FIndirectDesc), long, image(virtio.Desc{Addr: 0, Len: 0x20, Flags: indirect}, virtio.Desc{Addr: 8, Len: 16, Flags: indirect}))
	const avail, table = uint16(virtio.DescAvail), uint16(virtio.DescAvail | indirect) // the flags of packed rings are where Next is
	f.Add(uint64(virtio.FRingPacked), image(virtio.Desc{Addr: 0x300, Len: 9, Next: avail | next}, virtio.Desc{Addr: 0xf00, Len: 0x200, Next: avail}),
		image(virtio.Desc{Addr: 0x400, Len: 8, Next: avail}, virtio.Desc{Addr: 0x1f00, Len: 0x101, Flags: 2, Next: avail | write}))
	f.Add(uint64(virtio.FRingPacked|virtio.FIndirectDesc), image(virtio.Desc{Addr: 0x10, Len: 32, Next: table}, virtio.Desc{Len: 9, Next: avail}),
		image(virtio.Desc{Addr: 0x20, Len: 16, Next: avail}, virtio.Desc{Addr: 0x400, Len: 10, Next: table | write}))
	mem := mapFlat(f)
	f.Fuzz(func(t *testing.T, features uint64, a, b []byte) {
		features &= uint64(virtio.FIndirectDesc | virtio.FEventIdx | virtio.FInOrder | virtio.FRingPacked)
		c := &changing{T: t, f: virtio.Features(features), table: mem}
		for i, image := range [][]byte{a, b} {
			full := make([]byte, flatSize)
			copy(full, image)
			c.images[i] = full
		}
		c.play()
	})
}

// mapFlat maps guest memory of two regions that touch. The caller's pin is dropped at the end.
func mapFlat(f *testing.F) *guestmem.Table {
	fd, err := unix.MemfdCreate("ring", unix.MFD_CLOEXEC)
	if err != nil {
		f.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, flatSize); err != nil {
		f.Fatal(err)
	}
	var regions []*guestmem.Region
	for _, at := range []uint64{0, flatHole} {
		r, err := guestmem.NewRegion(fd, at, guestmem.GPA(at), guestmem.UVA(at), flatHole)
		if err != nil {
			f.Fatal(err)
		}
		regions = append(regions, r)
	}
	table, err := guestmem.NewTable(regions...)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(table.Unpin)
	return table
}

// changing is guest memory that is one thing and another.
type changing struct {
	*testing.T
	f      virtio.Features
	table  *guestmem.Table
	images [2]flat
	known  map[Buf]bool // all descriptors that there ever are; nil with indirect tables, which may begin at any byte
}

// word is where byte at of guest memory is, a multiple of eight.
func (c *changing) word(at int) *uint64 {
	return &view[uint64](c.table.Regions()[at/flatHole].Bytes()[at%flatHole:], 1)[0]
}

func (c *changing) play() {
	var differ []int
	for at := 0; at < flatSize; at += 8 {
		atomic.StoreUint64(c.word(at), c.images[0].u64(at))
		if c.images[0].u64(at) != c.images[1].u64(at) {
			differ = append(differ, at)
		}
	}
	if !c.f.Has(virtio.FIndirectDesc) {
		c.know()
	}
	stop, done := new(atomic.Bool), make(chan struct{})
	go func() {
		defer close(done)
		for turn := uint64(1); !stop.Load() && len(differ) > 0; turn = turn*6364136223846793005 + 1442695040888963407 {
			at := differ[turn>>33%uint64(len(differ))]
			atomic.StoreUint64(c.word(at), c.images[turn>>62&1].u64(at))
		}
	}()
	defer func() { stop.Store(true); <-done }()
	for range 4 {
		c.pop(40)
	}
}

// know lists the descriptors that are in either image, or half in one and half in the other.
func (c *changing) know() {
	c.known = map[Buf]bool{}
	for at := 0; at < fuzzSize*virtio.DescSize; at += virtio.DescSize {
		for i := range 4 {
			c.known[Buf{GPA: guestmem.GPA(c.images[i&1].u64(at)), Len: c.images[i>>1].u32(at + 8)}] = true
		}
	}
}

// pop opens the ring, and takes and returns chains until it is broken or has been looked at n times.
func (c *changing) pop(n int) {
	low := c.table.Regions()[0].Bytes()
	dev, err := NewDevice(Config{
		Size: fuzzSize, Desc: low, Avail: low[fuzzAvail:], Used: low[fuzzUsed:], Features: c.f, Base: 1 << 15, UsedBase: 1 << 15,
	}, guestmem.NewView(c.table, nil))
	if err != nil {
		c.Fatal(err)
	}
	chain := Chain{Segs: make([]Seg, 0, 1)}
	for i := range n {
		switch s := dev.Pop(&chain); s {
		case Broken:
			if dev.Err() == nil {
				c.Fatal("broken, and no error")
			}
			return
		case Popped, Malformed:
			c.check(&chain, s)
			if i%8 == 7 {
				dev.Unpop(1)
				break
			}
			dev.Put(chain.Head, chain.WriteLen)
			dev.Publish()
			dev.NeedsCall()
		}
		dev.EnableKick()
	}
}

// check checks what holds for a chain whatever the memory was.
func (c *changing) check(chain *Chain, s Status) {
	if (s == Popped) != (len(chain.Segs) > 0) || int(chain.Head) >= fuzzSize {
		c.Fatalf("%v chain of head %d with %d segments", s, chain.Head, len(chain.Segs))
	}
	var read, written uint32
	var whole Buf // what may have been one buffer, over two regions
	for i, seg := range chain.Segs {
		mem := c.table.Slice(seg.Addr, uint64(len(seg.Mem)))
		if len(mem) == 0 || &mem[0] != &seg.Mem[0] || cap(seg.Mem) != len(seg.Mem) {
			c.Fatalf("segment at %#x of %d bytes is not the guest's memory there", seg.Addr, len(seg.Mem))
		}
		if i < chain.Readable {
			read += uint32(len(mem))
		} else {
			written += uint32(len(mem))
		}
		c.wasThere(chain, i, &whole)
	}
	if read != chain.ReadLen || written != chain.WriteLen || chain.Readable > len(chain.Segs) {
		c.Fatalf("sums of the segments are %d and %d: %+v", read, written, shapeOf(chain))
	}
}

// wasThere checks that segment i is a descriptor's, or the first or second piece of one that goes from one region into the other.
func (c *changing) wasThere(chain *Chain, i int, whole *Buf) {
	seg := Buf{GPA: chain.Segs[i].Addr, Len: uint32(len(chain.Segs[i].Mem))}
	switch {
	case c.known == nil || c.known[seg]:
		*whole = seg
		return
	case seg.GPA+guestmem.GPA(seg.Len) == flatHole && i+1 < len(chain.Segs):
		*whole = seg
		return
	case seg.GPA == flatHole && c.known[Buf{GPA: whole.GPA, Len: whole.Len + seg.Len}]:
		return
	}
	c.Fatalf("segment %d of %+v was never in a descriptor", i, shapeOf(chain))
}
