package vring

import (
	"encoding/binary"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
)

// What follows reads rings a second time, from the specification and as plainly as can be: flat memory from address 0 on, a byte at a time,
// nothing remembered. Fuzzing holds the device end against it.

// Where the parts of a ring lie that fuzzing pops from; flatHole is where one region ends and the next begins, with no gap between.
const (
	fuzzSize  = 16 // of the queue, descriptors
	fuzzAvail = 0x100
	fuzzUsed  = 0x200
	flatHole  = 0x1000
	flatSize  = 0x2000
)

// flat is guest memory as one piece, ring and all.
type flat []byte

func (m flat) u16(at int) uint16 { return binary.NativeEndian.Uint16(m[at:]) }
func (m flat) u32(at int) uint32 { return binary.NativeEndian.Uint32(m[at:]) }
func (m flat) u64(at int) uint64 { return binary.NativeEndian.Uint64(m[at:]) }

// holds reports whether n bytes at a are guest memory.
func (m flat) holds(a, n uint64) bool { return a < uint64(len(m)) && n <= uint64(len(m))-a }

// split is the descriptor at an address, of a split ring or of its indirect table.
func (m flat) split(at int) virtio.Desc {
	return virtio.Desc{Addr: m.u64(at), Len: m.u32(at + 8), Flags: m.u16(at + 12), Next: m.u16(at + 14)}
}

// packed is a descriptor of a packed ring.
func (m flat) packed(slot int) (d virtio.Desc, id uint16) {
	at := slot * virtio.DescSize
	return virtio.Desc{Addr: m.u64(at), Len: m.u32(at + 8), Flags: m.u16(at + 14)}, m.u16(at + 12)
}

// reading is a chain, as the reference reads it.
type reading struct {
	shape
	status  Status
	descs   int // of the ring
	written bool
}

// buffer adds what a descriptor names, in as many pieces as there are regions, and reports whether a driver may give it.
func (r *reading) buffer(m flat, d virtio.Desc) bool {
	write := d.Flags&virtio.DescWrite != 0
	if d.Len == 0 || !m.holds(d.Addr, uint64(d.Len)) || r.written && !write {
		return false
	}
	for at, left := d.Addr, d.Len; left > 0; {
		n := left
		if at < flatHole {
			n = min(left, uint32(flatHole-at))
		}
		r.Segs = append(r.Segs, Buf{GPA: guestmem.GPA(at), Len: n})
		at, left = at+uint64(n), left-n
	}
	if r.written = write; write {
		r.WriteLen += d.Len
	} else {
		r.ReadLen += d.Len
		r.Readable = len(r.Segs)
	}
	return len(r.Segs) <= MaxSegs
}

// table is the number of descriptors of the indirect table that d names, 0 if it names none.
func (m flat) table(d virtio.Desc, f virtio.Features) int {
	n := d.Len / virtio.DescSize
	if !f.Has(virtio.FIndirectDesc) || d.Flags&virtio.DescNext != 0 || d.Len%virtio.DescSize != 0 || n > MaxIndirect || !m.holds(d.Addr, uint64(d.Len)) {
		return 0
	}
	return int(n)
}

// malformed makes r what Pop tells of a chain that goes back unread.
func (r *reading) malformed() { r.shape, r.status = shape{Head: r.Head}, Malformed }

// readSplit reads the chain of head.
func (m flat) readSplit(head uint16, f virtio.Features) (r reading) {
	r.Head, r.status = head, Popped
	good := true
	for i := head; ; {
		if i >= fuzzSize || r.descs == fuzzSize {
			return reading{status: Broken}
		}
		d := m.split(int(i) * virtio.DescSize)
		r.descs++
		if d.Flags&virtio.DescIndirect != 0 {
			good = good && r.splitTable(m, d, f)
			break
		}
		good = good && r.buffer(m, d)
		if d.Flags&virtio.DescNext == 0 {
			break
		}
		i = d.Next
	}
	if !good {
		r.malformed()
	}
	return r
}

func (r *reading) splitTable(m flat, at virtio.Desc, f virtio.Features) bool {
	n := m.table(at, f)
	for i, steps := 0, 0; i < n && steps < n; steps++ {
		d := m.split(int(at.Addr) + i*virtio.DescSize)
		if d.Flags&virtio.DescIndirect != 0 || !r.buffer(m, d) {
			return false
		}
		if d.Flags&virtio.DescNext == 0 {
			return true
		}
		i = int(d.Next)
	}
	return false
}

// readPacked reads the chain at a place, of which the device has others of out descriptors already, and of the buffer ids in has.
func (m flat) readPacked(at place, out int, has map[uint16]int, f virtio.Features) (r reading) {
	available := func(d virtio.Desc) bool {
		return (d.Flags&virtio.DescAvail != 0) == (at.wrap == 1) && (d.Flags&virtio.DescUsed != 0) == (at.wrap == 0)
	}
	r.status = Popped
	good := true
	for {
		d, id := m.packed(int(at.slot))
		switch {
		case !available(d) && r.descs == 0:
			return reading{status: Empty}
		case !available(d), out+r.descs == fuzzSize:
			return reading{status: Broken}
		}
		if d.Flags&virtio.DescIndirect != 0 {
			good = good && r.descs == 0 && r.packedTable(m, d, f)
		} else {
			good = good && r.buffer(m, d)
		}
		r.descs++
		if at.slot++; at.slot == fuzzSize {
			at = place{0, 1 - at.wrap}
		}
		if d.Flags&virtio.DescNext == 0 {
			r.Head = id
			break
		}
	}
	switch {
	case r.Head >= fuzzSize || has[r.Head] != 0:
		return reading{status: Broken}
	case !good:
		r.malformed()
	}
	return r
}

func (r *reading) packedTable(m flat, at virtio.Desc, f virtio.Features) bool {
	n := m.table(at, f)
	for i := range n {
		a := int(at.Addr) + i*virtio.DescSize
		if !r.buffer(m, virtio.Desc{Addr: m.u64(a), Len: m.u32(a + 8), Flags: m.u16(a+14) & virtio.DescWrite}) {
			return false
		}
	}
	return n > 0
}

// called reports whether an event at, an index or a place, was passed on the way from one to the other.
func (m flat) calledSplit(from, to uint16, f virtio.Features) bool {
	if !f.Has(virtio.FEventIdx) {
		return m.u16(fuzzAvail)&virtio.AvailNoInterrupt == 0
	}
	for event := m.u16(fuzzAvail + 4 + 2*fuzzSize); from != to; from++ {
		if from == event {
			return true
		}
	}
	return false
}

func (m flat) calledPacked(from, to place, f virtio.Features) bool {
	offWrap, flags := m.u16(fuzzAvail), m.u16(fuzzAvail+2)&3
	if flags != virtio.EventDesc || !f.Has(virtio.FEventIdx) {
		return flags != virtio.EventDisable
	}
	for from != to {
		if from.offWrap() == offWrap {
			return true
		}
		if from.slot++; from.slot == fuzzSize {
			from = place{0, 1 - from.wrap}
		}
	}
	return false
}
