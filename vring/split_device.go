package vring

import (
	"fmt"
	"math"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
)

// Pop takes the next available chain into c. The slices in c are good until the chain is Put or the memory table changes.
//
// A chain of one descriptor in the memory region of the last one, which is nearly every chain of a network device, is taken here
// without a call; everything else is popSlow's.
func (d *Device) Pop(c *Chain) Status {
	if d.next == d.avail {
		if d.packed != nil {
			return d.popPacked(c)
		}
		if s := d.look(); s != Popped {
			return s
		}
	}
	head := d.heads[d.next&d.mask]
	if int(head) < len(d.desc) && cap(c.Segs) > 0 {
		desc := d.desc[head]
		if desc.Flags&(virtio.DescNext|virtio.DescIndirect) == 0 && desc.Len != 0 {
			if mem := d.view.Hit(guestmem.GPA(desc.Addr), desc.Len); mem != nil {
				d.next++
				c.Segs = c.Segs[:1]
				c.Segs[0] = Seg{Mem: mem, Addr: guestmem.GPA(desc.Addr)}
				c.Head, c.Descs = head, 1
				if desc.Flags&virtio.DescWrite == 0 {
					c.Readable, c.ReadLen, c.WriteLen = 1, desc.Len, 0
				} else {
					c.Readable, c.ReadLen, c.WriteLen = 0, 0, desc.Len
				}
				return Popped
			}
		}
	}
	return d.popSlow(c, head)
}

// look reads avail.idx and checks it. Popped means that there is something to pop.
func (d *Device) look() Status {
	if d.err != nil {
		return Broken
	}
	idx := d.availIdx.Load()
	if idx == d.next {
		d.avail = idx
		return Empty
	}
	if n := idx - d.next; int(n) > d.Size() {
		return d.fail("available index %d is %d entries ahead of the next one, %d: queue size %d", idx, n, d.next, d.Size())
	}
	if n := idx - d.published; int(n) > d.Size() {
		return d.fail("available index %d is %d entries ahead of the used index %d: queue size %d", idx, n, d.published, d.Size())
	}
	d.avail = idx
	return Popped
}

// fail breaks the ring for good.
func (d *Device) fail(format string, args ...any) Status {
	d.err = fmt.Errorf(format, args...)
	d.avail = d.next
	return Broken
}

// Available is the number of chains that can be popped now. It looks at the ring only when all chains that it knew of are popped.
func (d *Device) Available() int {
	if d.packed != nil {
		if d.lookPacked() != Popped {
			return 0
		}
		n, _ := d.packed.ahead()
		return n
	}
	if d.next == d.avail && d.look() != Popped {
		return 0
	}
	return int(d.avail - d.next)
}

// Ahead is how many chains more Pop may take before it has to look at an index that the driver writes. A packed ring has none: there, it looks
// at each descriptor as it comes.
func (d *Device) Ahead() int {
	if d.packed != nil {
		return d.size - int(d.packed.out)
	}
	return int(d.avail - d.next)
}

// Unpop gives back the n chains popped last, none of which was Put: they will be popped again.
func (d *Device) Unpop(n int) {
	if out := int(d.next - d.usedNext); n < 0 || n > out {
		panic(fmt.Sprintf("bug: Unpop of %d chains, %d are out", n, out))
	}
	if d.packed != nil {
		d.unpopPacked(n)
		return
	}
	d.next -= uint16(n)
	if d.err != nil {
		d.avail = d.next
	}
}

// popSlow takes the chain at head, of any shape.
func (d *Device) popSlow(c *Chain, head uint16) Status {
	if int(head) >= len(d.desc) {
		return d.fail("head %d, queue size %d", head, len(d.desc))
	}
	c.reset(head)
	s := d.walk(c, head)
	if s == Broken {
		c.reset(head)
		return s
	}
	d.next++
	if s == Malformed {
		c.reset(head)
	}
	return s
}

// reset empties c, keeping its memory.
func (c *Chain) reset(head uint16) {
	*c = Chain{Segs: c.Segs[:0], Head: head}
}

// walk follows a direct chain. The structure is followed to its end even when a buffer is bad, so that a broken ring is found to be
// broken whatever its buffers are.
func (d *Device) walk(c *Chain, head uint16) Status {
	good := true
	for i, left := head, len(d.desc); left > 0; left-- {
		desc := d.desc[i]
		c.Descs++
		switch {
		case desc.Flags&virtio.DescIndirect != 0:
			if !good {
				return Malformed
			}
			return d.walkTable(c, desc)
		case good:
			good = d.add(c, desc)
		}
		if desc.Flags&virtio.DescNext == 0 {
			if !good {
				return Malformed
			}
			return Popped
		}
		if int(desc.Next) >= len(d.desc) {
			return d.fail("next %d in the chain of head %d, queue size %d", desc.Next, head, len(d.desc))
		}
		i = desc.Next
	}
	return d.fail("the chain of head %d goes on after %d descriptors, the queue size", head, len(d.desc))
}

// walkTable follows the indirect table that at names; it may come after direct descriptors (virtio-v1.2 §2.7.5.3.2). Nothing in a
// table can break the ring: the head is known, so the chain can be returned.
func (d *Device) walkTable(c *Chain, at virtio.Desc) Status {
	table := d.table(at)
	for i, left := 0, len(table); left > 0; left-- {
		desc := table[i]
		if desc.Flags&virtio.DescIndirect != 0 || !d.add(c, desc) {
			return Malformed
		}
		if desc.Flags&virtio.DescNext == 0 {
			return Popped
		}
		if i = int(desc.Next); i >= len(table) {
			return Malformed
		}
	}
	return Malformed // no table, or it loops
}

// add appends one buffer to c, unless it is one that no driver may give.
func (d *Device) add(c *Chain, desc virtio.Desc) bool {
	// A chain is at most 2^32 bytes long (virtio-v1.2 §2.7.5.2); the very last of them is not needed here.
	if desc.Len == 0 || uint64(c.ReadLen)+uint64(c.WriteLen)+uint64(desc.Len) > math.MaxUint32 {
		return false
	}
	write := desc.Flags&virtio.DescWrite != 0
	if !write && len(c.Segs) > c.Readable {
		return false // readable after writable (virtio-v1.2 §2.7.4.2)
	}
	a := guestmem.GPA(desc.Addr)
	if mem := d.view.Hit(a, desc.Len); mem != nil && len(c.Segs) < MaxSegs {
		c.Segs = append(c.Segs, Seg{Mem: mem, Addr: a})
	} else if !d.addPieces(c, a, desc.Len) {
		return false
	}
	if write {
		c.WriteLen += desc.Len
	} else {
		c.ReadLen += desc.Len
		c.Readable = len(c.Segs)
	}
	return true
}

// addPieces translates n bytes at a, which are one segment unless they cross from one memory region into the next.
func (d *Device) addPieces(c *Chain, a guestmem.GPA, n uint32) bool {
	for n > 0 {
		mem := d.view.Prefix(a, n)
		if mem == nil || len(c.Segs) >= MaxSegs {
			return false
		}
		c.Segs = append(c.Segs, Seg{Mem: mem, Addr: a})
		a += guestmem.GPA(len(mem))
		n -= uint32(len(mem))
	}
	return true
}

// maxTable is the most descriptors an indirect table may have; see MaxIndirect.
func (d *Device) maxTable() int { return max(d.Size(), MaxIndirect) }
