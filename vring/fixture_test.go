package vring

import (
	"testing"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
)

// Guest addresses of the test's memory. Low and High touch, so that a buffer can cross from one region into the other; Far
// stands alone.
const (
	lowBase  = guestmem.GPA(0x1000_0000)
	dataSize = 1 << 20
	highSize = 1 << 16
	farBase  = guestmem.GPA(0x8000_0000)
	farSize  = 1 << 16
)

const rigTableLen = 32 // descriptors of an indirect table

// rig is both ends of one ring over heap memory, which the race detector watches.
type rig struct {
	*testing.T
	drv   *Driver
	dev   *Device
	cfg   Config
	table *guestmem.Table
	data  guestmem.GPA // start of dataSize bytes for buffers, up to high
	high  guestmem.GPA
	chain Chain
}

// newRig makes an empty ring whose indices start at 0xfff0; a packed one's start 16 slots before its end.
func newRig(t *testing.T, size int, f virtio.Features) *rig {
	t.Helper()
	base := uint16(0xfff0)
	if f.Has(virtio.FRingPacked) {
		base = place{slot: uint32(size - min(size, 16)), wrap: 1}.offWrap()
	}
	r := newRigAt(t, size, f, base)
	r.T = t
	return r
}

// partLens are the lengths in bytes of what Config calls Desc, Avail and Used.
func partLens(size int, f virtio.Features) (desc, avail, used int) {
	if f.Has(virtio.FRingPacked) {
		return virtio.DescTableLen(size), virtio.EventLen, virtio.EventLen
	}
	return virtio.DescTableLen(size), virtio.AvailLen(size), virtio.UsedLen(size)
}

func newRigAt(t testing.TB, size int, f virtio.Features, base uint16) *rig {
	t.Helper()
	off := 0
	place := func(n int) int {
		at := off
		off = (off + n + 0xff) &^ 0xff // nothing of anybody else's within a word of a ring's end
		return at
	}
	descLen, availLen, usedLen := partLens(size, f)
	desc, avail, used := place(descLen), place(availLen), place(usedLen)
	tables := place(size * rigTableLen * virtio.DescSize)
	data := place(dataSize)
	low := heapRegion(t, lowBase, off)
	r := &rig{data: lowBase + guestmem.GPA(data), high: lowBase + guestmem.GPA(off)}
	table, err := guestmem.NewTable(low, heapRegion(t, r.high, highSize), heapRegion(t, farBase, farSize))
	if err != nil {
		t.Fatal(err)
	}
	r.table = table
	t.Cleanup(table.Unpin)

	b := low.Bytes()
	r.cfg = Config{
		Size: size, Desc: b[desc:], Avail: b[avail:], Used: b[used:], Features: f, Base: base, UsedBase: base,
		DescLogAddr: lowBase + guestmem.GPA(desc), UsedLogAddr: lowBase + guestmem.GPA(used),
	}
	r.drv, err = NewDriver(DriverConfig{
		Size: size, Desc: b[desc:], Avail: b[avail:], Used: b[used:], Features: f, Base: base,
		Indirect: b[tables:], IndirectAddr: lowBase + guestmem.GPA(tables), IndirectLen: rigTableLen,
	})
	if err != nil {
		t.Fatal(err)
	}
	r.dev, err = NewDevice(r.cfg, guestmem.NewView(table, nil))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func heapRegion(t testing.TB, a guestmem.GPA, size int) *guestmem.Region {
	t.Helper()
	r, err := guestmem.NewHeapRegion(a, guestmem.UVA(a)+0x7f00_0000_0000, size)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// buf is n bytes of the data area, from its offset off.
func (r *rig) buf(off int, n uint32) Buf { return Buf{GPA: r.data + guestmem.GPA(off), Len: n} }

// add adds and publishes one chain.
func (r *rig) add(readable, writable []Buf) uint16 {
	r.Helper()
	id, err := r.drv.Add(readable, writable)
	if err != nil {
		r.Fatalf("Add: %v", err)
	}
	r.drv.Publish()
	return id
}

// pop pops into r.chain and checks the status.
func (r *rig) pop(want Status) *Chain {
	r.Helper()
	if got := r.dev.Pop(&r.chain); got != want {
		r.Fatalf("Pop is %v, want %v (Err: %v)", got, want, r.dev.Err())
	}
	if (r.dev.Err() != nil) != (want == Broken) {
		r.Fatalf("after %v, Err is %v", want, r.dev.Err())
	}
	if want == Malformed && len(r.chain.Segs)+r.chain.Readable+int(r.chain.ReadLen)+int(r.chain.WriteLen) != 0 {
		r.Fatalf("malformed, and yet there is a chain: %+v", r.chain)
	}
	return &r.chain
}

// put puts and publishes one chain.
func (r *rig) put(head uint16, written uint32) {
	r.dev.Put(head, written)
	r.dev.Publish()
}

// reap reaps one chain, which must be id with written bytes.
func (r *rig) reap(id uint16, written uint32) {
	r.Helper()
	gotID, got, ok := r.drv.Reap()
	if !ok || gotID != id || got != written {
		r.Fatalf("Reap: id %d, written %d, %v; want id %d, written %d (Err: %v)", gotID, got, ok, id, written, r.drv.Err())
	}
}

// raw makes a chain of descriptors that are written as they are, head first, from descriptor 0 of the table on.
func (r *rig) raw(descs ...virtio.Desc) {
	copy(r.drv.RawDesc(), descs)
	r.rawHead(0)
}

// rawHead makes head available, whatever it is.
func (r *rig) rawHead(head uint16) {
	r.drv.RawAvail()[r.dev.Base()&uint16(r.dev.Size()-1)] = head
	r.drv.RawSetAvailIndex(r.dev.Base() + 1)
}

// desc is a descriptor of n bytes of the data area.
func (r *rig) desc(off int, n uint32, flags, next uint16) virtio.Desc {
	return virtio.Desc{Addr: uint64(r.data) + uint64(off), Len: n, Flags: flags, Next: next}
}

// shape is what a test compares of a chain: addresses and lengths of its segments.
type shape struct {
	Head     uint16
	Segs     []Buf
	Readable int
	ReadLen  uint32
	WriteLen uint32
}

func shapeOf(c *Chain) shape {
	s := shape{Head: c.Head, Readable: c.Readable, ReadLen: c.ReadLen, WriteLen: c.WriteLen}
	for _, seg := range c.Segs {
		s.Segs = append(s.Segs, Buf{GPA: seg.Addr, Len: uint32(len(seg.Mem))})
	}
	return s
}

// mem is the guest memory of b, for the driver to look at.
func (r *rig) mem(b Buf) []byte { return r.table.Slice(b.GPA, uint64(b.Len)) }

// recorder is a dirty log that remembers.
type recorder struct{ writes []Buf }

func (d *recorder) Dirty(a guestmem.GPA, n uint64) {
	d.writes = append(d.writes, Buf{GPA: a, Len: uint32(n)})
}
