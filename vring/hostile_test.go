package vring

import (
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

const (
	next     = virtio.DescNext
	write    = virtio.DescWrite
	indirect = virtio.DescIndirect
)

// broken pops, expects Broken with an Err that has every one of words, and that the ring stays so.
func (r *rig) broken(words ...string) {
	r.Helper()
	base := r.dev.Base()
	r.pop(Broken)
	for _, w := range words {
		if !strings.Contains(r.dev.Err().Error(), w) {
			r.Errorf("Err is %q, without %q", r.dev.Err(), w)
		}
	}
	r.rawHead(0)
	r.pop(Broken)
	if r.dev.Available() != 0 || r.dev.EnableKick() || r.dev.Base() != base {
		r.Error("a broken ring goes on")
	}
}

// malformed pops, expects Malformed for head, and that the ring goes on.
func (r *rig) malformed(head uint16) {
	r.Helper()
	if c := r.pop(Malformed); c.Head != head {
		r.Errorf("head of the malformed chain is %d, want %d", c.Head, head)
	}
	r.put(head, 0)
	r.drv.RawDesc()[0] = r.desc(0, 10, 0, 0)
	r.rawHead(0)
	r.pop(Popped)
	r.put(0, 0)
}

func TestG01AvailIndexJumps(t *testing.T) {
	for _, jump := range []uint16{9, 10, 0x7fff, 0x8000, 0xffff} {
		r := newRig(t, 8, 0)
		r.drv.RawSetAvailIndex(0xfff0 + jump)
		r.broken("queue size 8", "available index")

		r = newRig(t, 8, 0)
		r.drv.RawSetAvailIndex(0xfff0 + jump)
		if !r.dev.EnableKick() { // whoever sleeps now never learns of it
			t.Errorf("EnableKick keeps quiet about an index %d ahead", jump)
		}
		r.broken("queue size 8", "available index")
	}
	t.Run("by the whole queue size is legal", func(t *testing.T) {
		r := newRig(t, 8, 0)
		r.drv.RawDesc()[0] = r.desc(0, 10, 0, 0)
		r.drv.RawSetAvailIndex(0xfff0 + 8)
		for range 8 {
			r.pop(Popped)
		}
		r.pop(Empty)
		r.drv.RawSetAvailIndex(0xfff0 + 9) // before any of the 8 was returned
		r.broken("9 entries ahead of the used index", "queue size 8")
	})
}

func TestG02IndexBeyondTable(t *testing.T) {
	for _, head := range []uint16{256, 300, 0x8000, 0xffff} {
		r := newRig(t, 256, 0)
		r.rawHead(head)
		r.broken("queue size 256", "head ")
	}
	for _, link := range []uint16{256, 0xffff} {
		r := newRig(t, 256, 0)
		r.raw(r.desc(0, 10, next, 1), r.desc(0, 10, next, link))
		r.broken("queue size 256", "next ")
	}
	t.Run("of an indirect table", func(t *testing.T) {
		for _, link := range []uint16{2, 31, 0xffff} {
			r := newRig(t, 256, virtio.FIndirectDesc)
			id := r.add([]Buf{r.buf(0, 10), r.buf(0, 10)}, nil)
			r.drv.RawTable(id)[0].Next = link
			r.malformed(id)
		}
	})
}

func TestG03Loops(t *testing.T) {
	r := newRig(t, 16, 0)
	r.raw(r.desc(0, 10, next, 0))
	r.broken("after 16 descriptors")

	r = newRig(t, 16, 0)
	for i := range uint16(16) {
		r.drv.RawDesc()[i] = r.desc(0, 1, next, (i+1)%16)
	}
	r.rawHead(5)
	r.broken("after 16 descriptors", "head 5")

	r = newRig(t, 16, 0)
	r.raw(r.desc(0, 0, next, 1), r.desc(0, 0, next, 0))
	r.broken("after 16 descriptors")

	r = newRig(t, 16, 0) // readable after writable on the way
	r.raw(r.desc(0, 1, next, 1), r.desc(0, 1, next|write, 0))
	r.broken("after 16 descriptors")

	t.Run("in an indirect table", func(t *testing.T) {
		r := newRig(t, 16, virtio.FIndirectDesc)
		id := r.add([]Buf{r.buf(0, 10), r.buf(0, 10)}, nil)
		r.drv.RawTable(id)[1] = r.desc(0, 10, next, 0)
		r.malformed(id)
	})
}

func TestG04Indirect(t *testing.T) {
	entry := func(r *rig, change func(table []virtio.Desc, d *virtio.Desc)) {
		r.Helper()
		id := r.add([]Buf{r.buf(0, 10), r.buf(0, 10), r.buf(0, 10)}, nil)
		change(r.drv.RawTable(id), &r.drv.RawDesc()[id])
		r.malformed(id)
	}
	for name, change := range map[string]func(table []virtio.Desc, d *virtio.Desc){
		"length 0":                  func(_ []virtio.Desc, d *virtio.Desc) { d.Len = 0 },
		"length not multiple of 16": func(_ []virtio.Desc, d *virtio.Desc) { d.Len++ },
		"length 15":                 func(_ []virtio.Desc, d *virtio.Desc) { d.Len = 15 },
		"too long":                  func(_ []virtio.Desc, d *virtio.Desc) { d.Len = 16 * (MaxIndirect + 1) },
		"longest":                   func(_ []virtio.Desc, d *virtio.Desc) { d.Len = math.MaxUint32 &^ 15 },
		"nested":                    func(t []virtio.Desc, _ *virtio.Desc) { t[1].Flags |= indirect },
		"nested first":              func(t []virtio.Desc, _ *virtio.Desc) { t[0].Flags = indirect },
		"next and indirect":         func(_ []virtio.Desc, d *virtio.Desc) { d.Flags |= next },
		"unmapped":                  func(_ []virtio.Desc, d *virtio.Desc) { d.Addr = 0x1000 },
		"unmapped, end of space":    func(_ []virtio.Desc, d *virtio.Desc) { d.Addr = math.MaxUint64 - 8 },
		"runs out of memory":        func(_ []virtio.Desc, d *virtio.Desc) { d.Addr = uint64(farBase) + farSize - 32 },
		"total above 2^32": func(t []virtio.Desc, _ *virtio.Desc) {
			t[0].Len, t[1].Len, t[2].Len = 1<<31, 1<<31, 1<<31
		},
	} {
		t.Run(name, func(t *testing.T) { entry(newRig(t, 16, virtio.FIndirectDesc), change) })
	}
	t.Run("not negotiated", func(t *testing.T) {
		r := newRig(t, 16, 0)
		r.raw(r.desc(0, 16, indirect, 0))
		r.malformed(0)
	})
	t.Run("after a bad direct descriptor", func(t *testing.T) {
		r := newRig(t, 16, virtio.FIndirectDesc)
		r.raw(r.desc(0, 0, next, 1), r.desc(0, 16, indirect, 0))
		r.malformed(0)
	})
}

// TestG04TableAcrossRegions: such a table is legal, as is one that is not aligned.
func TestG04TableAcrossRegions(t *testing.T) {
	for _, at := range []int{-16, -24, -8, -3, -31, -512, -33} {
		r := newRig(t, 16, virtio.FIndirectDesc)
		table := []virtio.Desc{r.desc(0, 10, next, 2), {}, r.desc(100, 20, write, 0)}
		addr := r.high + guestmem.GPA(at)
		for i, b := range shm.Bytes(table) {
			r.table.Slice(addr+guestmem.GPA(i), 1)[0] = b
		}
		r.raw(virtio.Desc{Addr: uint64(addr), Len: 48, Flags: indirect})
		want := shape{Segs: []Buf{r.buf(0, 10), r.buf(100, 20)}, Readable: 1, ReadLen: 10, WriteLen: 20}
		if diff := cmp.Diff(want, shapeOf(r.pop(Popped))); diff != "" {
			t.Errorf("table at %d from the end of the region:\n%s", at, diff)
		}
	}
}

func TestG05Buffers(t *testing.T) {
	low := uint64(lowBase)
	for name, d := range map[string]virtio.Desc{
		"length 0":                 {Addr: low},
		"length 0, unmapped":       {Addr: 1},
		"length 2^32-1":            {Addr: low, Len: math.MaxUint32},
		"unmapped":                 {Addr: 0x1000, Len: 1},
		"address 0":                {Addr: 0, Len: 1},
		"just below the region":    {Addr: low - 1, Len: 2},
		"crosses into nothing":     {Addr: uint64(farBase) + farSize - 10, Len: 11},
		"starts at the end":        {Addr: uint64(farBase) + farSize, Len: 1},
		"address and length wrap":  {Addr: math.MaxUint64 - 3, Len: 8},
		"wraps to a valid address": {Addr: math.MaxUint64, Len: 2},
	} {
		for _, flags := range []uint16{0, write} {
			t.Run(name, func(t *testing.T) {
				r := newRig(t, 16, 0)
				d.Flags = flags
				for range 2 { // before and after the region was hit: Pop and popSlow
					r.raw(d)
					r.malformed(0)
				}
				good := r.desc(0, 10, next|flags, 1)
				r.raw(good, d)
				r.malformed(0)
			})
		}
	}
	t.Run("total above 2^32", func(t *testing.T) {
		r := newRig(t, 16, 0)
		big := addBigRegion(t, r)
		const gib = 1 << 30
		descs := make([]virtio.Desc, 4)
		for i := range descs {
			descs[i] = virtio.Desc{Addr: big, Len: gib, Flags: next, Next: uint16(i + 1)}
		}
		descs[3].Flags = 0
		r.raw(descs...)
		r.malformed(0)
		descs[3].Len-- // 2^32 - 1 bytes in all
		r.raw(descs...)
		if c := r.pop(Popped); c.ReadLen != math.MaxUint32 {
			t.Errorf("chain of %d bytes", c.ReadLen)
		}
	})
	t.Run("more than MaxSegs", func(t *testing.T) {
		r := newRig(t, 2*MaxSegs, 0)
		for i := range uint16(MaxSegs + 1) {
			r.drv.RawDesc()[i] = r.desc(0, 1, next, i+1)
		}
		r.drv.RawDesc()[MaxSegs].Flags = 0
		r.rawHead(0)
		r.malformed(0)
		r.rawHead(1) // the same without its first
		if c := r.pop(Popped); len(c.Segs) != MaxSegs {
			t.Errorf("%d segments, want %d", len(c.Segs), MaxSegs)
		}
	})
}

// addBigRegion adds 1 GiB of guest memory to r's table, none of it ever touched, and returns its address.
func addBigRegion(t *testing.T, r *rig) uint64 {
	t.Helper()
	const at, size = 1 << 40, 1 << 30
	fd, err := unix.MemfdCreate("big", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	region, err := guestmem.NewRegion(fd, 0, at, at, size)
	if err != nil {
		t.Fatal(err)
	}
	table, err := guestmem.NewTable(append([]*guestmem.Region{region}, r.table.Regions()...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(table.Unpin)
	r.dev.SetView(guestmem.NewView(table, nil))
	return at
}

// TestG05BufferAcrossRegions: what is contiguous for the guest is a legal buffer, in as many segments as it takes.
func TestG05BufferAcrossRegions(t *testing.T) {
	r := newRig(t, 16, 0)
	r.raw(virtio.Desc{Addr: uint64(r.high) - 100, Len: 300, Flags: next, Next: 1}, r.desc(0, 7, write, 0))
	want := shape{
		Segs:     []Buf{{r.high - 100, 100}, {r.high, 200}, r.buf(0, 7)},
		Readable: 2, ReadLen: 300, WriteLen: 7,
	}
	if diff := cmp.Diff(want, shapeOf(r.pop(Popped))); diff != "" {
		t.Error(diff)
	}
	for _, s := range r.chain.Segs {
		if cap(s.Mem) != len(s.Mem) {
			t.Errorf("segment at %#x of %d bytes can grow to %d", s.Addr, len(s.Mem), cap(s.Mem))
		}
	}
}

func TestG06ReadableAfterWritable(t *testing.T) {
	for _, f := range []virtio.Features{0, virtio.FIndirectDesc} {
		r := newRig(t, 16, f)
		id := r.add([]Buf{r.buf(0, 10), r.buf(0, 10), r.buf(0, 10)}, nil)
		if f == 0 {
			r.drv.RawDesc()[id+1].Flags |= write
		} else {
			r.drv.RawTable(id)[1].Flags |= write
		}
		r.malformed(id)
	}
}

func TestG11AvailIndexMovesBack(t *testing.T) {
	r := newRig(t, 16, 0)
	r.raw(r.desc(0, 10, 0, 0))
	for i := range uint16(16) {
		r.drv.RawAvail()[i] = 0
	}
	r.drv.RawSetAvailIndex(0xfff0 + 4)
	r.pop(Popped)
	r.pop(Popped)
	r.drv.RawSetAvailIndex(0xfff0 + 3) // to what is not popped yet: nothing to hold against it
	r.dev.EnableKick()
	r.pop(Popped)
	r.pop(Empty)
	r.drv.RawSetAvailIndex(0xfff0 + 2) // to what was popped: never again
	r.broken("available index")
}

// TestG13RingsOverlap: parts that lie on top of each other, or of the buffers, harm the guest alone.
func TestG13RingsOverlap(t *testing.T) {
	for _, lay := range []struct{ avail, used int }{{0, 0}, {16, 16}, {0, 4}, {4, 0}, {2, 64}, {64, 4}} {
		r := newRig(t, 16, virtio.FEventIdx|virtio.FIndirectDesc)
		b := r.cfg.Desc
		cfg := r.cfg
		cfg.Desc, cfg.Avail, cfg.Used = b, b[lay.avail:], b[lay.used:]
		dev, err := NewDevice(cfg, *r.dev.View())
		if err != nil {
			t.Fatal(err)
		}
		for i := range 100 {
			idx := dev.Base() + 1 + uint16(i%3)
			b[lay.avail+2], b[lay.avail+3] = byte(idx), byte(idx>>8)
			switch dev.Pop(&r.chain) {
			case Popped, Malformed:
				dev.Put(r.chain.Head, 1)
			}
			dev.Publish()
			dev.NeedsCall()
			dev.EnableKick()
		}
	}
}

func TestDeviceUnpopAfterBroken(t *testing.T) {
	r := newRig(t, 16, 0)
	r.add([]Buf{r.buf(0, 10)}, nil)
	r.pop(Popped)
	r.drv.RawSetAvailIndex(0x1000)
	r.pop(Broken)
	r.dev.Unpop(1)
	r.pop(Broken)
	if got := r.dev.Base(); got != 0xfff0 {
		t.Errorf("base is %#x after Unpop, want 0xfff0", got)
	}
}
