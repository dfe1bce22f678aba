package vring

import (
	"sync/atomic"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// PopRun is Pop of as many chains as are of one descriptor and lie in the memory region of the last one: those are nearly all of a network
// device. It returns how many it took into chains, and leaves every other chain, and a ring that is broken, to Pop. What a fault in
// the ring's memory stops was not popped.
//
// When chains are used up there are likely to be more: the descriptors of as many are asked for, so that they travel while these are worked on.
func (d *Device) PopRun(chains []Chain) int {
	if d.packed != nil {
		return d.popRunPacked(chains)
	}
	return d.popRunSplit(chains)
}

// one makes c a chain of one segment.
func (c *Chain) one(mem []byte, addr guestmem.GPA, id uint16, writable bool) {
	if cap(c.Segs) == 0 {
		c.Segs = make([]Seg, 1) // its memory was given up after a long chain
	}
	c.Segs = c.Segs[:1]
	c.Segs[0] = Seg{Mem: mem, Addr: addr}
	c.Head, c.Descs = id, 1
	if writable {
		c.Readable, c.ReadLen, c.WriteLen = 0, 0, uint32(len(mem))
	} else {
		c.Readable, c.ReadLen, c.WriteLen = 1, uint32(len(mem)), 0
	}
}

func (d *Device) popRunSplit(chains []Chain) (n int) {
	if d.next == d.avail && d.look() != Popped {
		return 0
	}
	heads, table, next, mask := d.heads, d.desc, d.next, d.mask
	for chains = chains[:min(len(chains), int(d.avail-next))]; n < len(chains); n++ {
		head := heads[(next+uint16(n))&mask]
		if int(head) >= len(table) {
			break
		}
		desc := table[head]
		if desc.Flags&(virtio.DescNext|virtio.DescIndirect) != 0 || desc.Len == 0 {
			break
		}
		mem := d.view.Hit(guestmem.GPA(desc.Addr), desc.Len)
		if mem == nil {
			break
		}
		chains[n].one(mem, guestmem.GPA(desc.Addr), head, desc.Flags&virtio.DescWrite != 0)
	}
	d.next = next + uint16(n)
	d.prefetchSplit(n)
	return n
}

// descsOfLine is how many descriptors a cache line holds.
const descsOfLine = 64 / virtio.DescSize

// prefetchSplit asks for the descriptors of the next n chains. A driver takes neighbours in the table mostly: one of each cache line is enough.
func (d *Device) prefetchSplit(n int) {
	n = min(n, int(d.avail-d.next))
	for i := 0; i < n; i += descsOfLine {
		if head := int(d.heads[(d.next+uint16(i))&d.mask]); head < len(d.desc) {
			shm.PrefetchRead(shm.Bytes(d.desc[head : head+1]))
		}
	}
}

func (d *Device) popRunPacked(chains []Chain) (n int) {
	p := d.packed
	at, phase, next := p.next, p.phase, d.next
	ring, counts, order := p.ring, p.counts, p.order
	chains = chains[:min(len(chains), int(p.size-p.out))]
	for ; n < len(chains); n++ {
		s := &ring[at.slot]
		w := atomic.LoadUint64(&s.word)
		flags, id := wordFlags(w), wordID(w)
		if flags&(phaseFlags|virtio.DescNext|virtio.DescIndirect) != phase || uint32(w) == 0 {
			break
		}
		addr := guestmem.GPA(s.addr)
		mem := d.view.Hit(addr, uint32(w))
		if mem == nil || int(id) >= len(counts) || counts[id] != 0 {
			break
		}
		counts[id] = 1
		order[next&d.mask] = id
		next++
		if at.slot++; at.slot == p.size {
			at = place{0, at.wrap ^ 1}
			phase = at.available()
		}
		chains[n].one(mem, addr, id, flags&virtio.DescWrite != 0)
	}
	p.next, p.phase, p.out = at, phase, p.out+uint32(n)
	d.next, d.avail = next, next
	if n > 0 && n == len(chains) {
		prefetch(ring, int(at.slot), n) // for writing: that is where the used descriptors go
	}
	return n
}
