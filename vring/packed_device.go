package vring

import (
	"fmt"
	"sync/atomic"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
)

// packedDevice is what the device end of a packed virtqueue has beside what every Device has. Device.next, usedNext and published count
// chains here, and avail is always next, which is what takes Pop to popPacked.
type packedDevice struct {
	packedParts
	size   uint32
	next   place    // descriptor to pop next
	phase  uint16   // phase flags of an available descriptor at next; noPhase on a broken ring
	out    uint32   // descriptors of chains that are popped and not published
	counts []uint16 // by buffer id: descriptors of its chain, 0 when the device does not have it
	order  []uint16 // buffer ids in the order in which they were popped: a ring, by Device.next
	used   place    // where the next used descriptor goes
	event  uint32   // what deviceEvent was last set to
	table  uint16   // the flags that are heeded in an indirect table
}

// noPhase is what no descriptor's flags are when masked.
const noPhase = 1 << 6

// openPacked makes d the device end of the packed ring in cfg.
func (d *Device) openPacked(cfg Config) (*Device, error) {
	n := cfg.Size
	parts, err := newPackedParts(n, cfg.Desc, cfg.Avail, cfg.Used)
	if err != nil {
		return nil, err
	}
	next, used := placeOf(cfg.Base), placeOf(cfg.UsedBase)
	if next.slot >= uint32(n) || used.slot >= uint32(n) {
		return nil, fmt.Errorf("base at descriptors %d (available) and %d (used), queue size %d", next.slot, used.slot, n)
	}
	p := &packedDevice{
		packedParts: parts, size: uint32(n), counts: make([]uint16, n), order: make([]uint16, int(d.mask)+1), event: ^uint32(0),
		table: virtio.DescWrite,
	}
	if cfg.ReadOnly {
		p.table = 0
	}
	if next != used && !p.isAvailable(used) {
		used = next // all were returned; or the front-end does not know the used index
	}
	p.next, p.used, p.phase = used, used, used.available()
	d.packed, d.used = p, make([]virtio.UsedElem, int(d.mask)+1)
	d.next, d.avail = 0, 0
	d.notifyOnEmpty = false // it is of the legacy interface (virtio-v1.2 §6.3), which has no packed rings
	return d, nil
}

func (d *Device) rebindPacked(desc, driver, device []byte) error {
	parts, err := newPackedParts(int(d.packed.size), desc, driver, device)
	if err == nil {
		d.packed.packedParts = parts
	}
	return err
}

// isAvailable reports whether the descriptor at is available.
func (p *packedDevice) isAvailable(at place) bool {
	return wordFlags(atomic.LoadUint64(&p.ring[at.slot].word))&phaseFlags == at.available()
}

// load reads a descriptor: once.
func (p *packedDevice) load(at place) virtio.PackedDesc {
	s := &p.ring[at.slot]
	w := atomic.LoadUint64(&s.word)
	return virtio.PackedDesc{Addr: s.addr, Len: uint32(w), ID: wordID(w), Flags: wordFlags(w)}
}

// popPacked is Pop. As there, a chain of one descriptor in the memory region of the last one is taken here, all others in popPackedSlow.
func (d *Device) popPacked(c *Chain) Status {
	p := d.packed
	s := &p.ring[p.next.slot]
	w := atomic.LoadUint64(&s.word)
	flags, id, n := wordFlags(w), wordID(w), uint32(w)
	if flags&(phaseFlags|virtio.DescNext|virtio.DescIndirect) != p.phase || n == 0 || cap(c.Segs) == 0 {
		return d.popPackedSlow(c)
	}
	addr := guestmem.GPA(s.addr)
	mem := d.view.Hit(addr, n)
	if mem == nil || int(id) >= len(p.counts) || p.counts[id] != 0 || p.out >= p.size {
		return d.popPackedSlow(c)
	}
	d.takePacked(id, 1)
	c.Segs = c.Segs[:1]
	c.Segs[0] = Seg{Mem: mem, Addr: addr}
	c.Head, c.Descs = id, 1
	if flags&virtio.DescWrite == 0 {
		c.Readable, c.ReadLen, c.WriteLen = 1, n, 0
	} else {
		c.Readable, c.ReadLen, c.WriteLen = 0, 0, n
	}
	return Popped
}

// takePacked says that the chain of n descriptors at next is the device's now.
func (d *Device) takePacked(id uint16, n uint32) {
	p := d.packed
	p.counts[id] = uint16(n)
	p.order[d.next&d.mask] = id
	p.out += n
	p.next.advance(n, p.size)
	p.phase = p.next.available()
	d.next++
	d.avail = d.next
}

// lookPacked looks at the descriptor at next. Popped means that it is available.
func (d *Device) lookPacked() Status {
	p := d.packed
	switch {
	case d.err != nil:
		return Broken
	case !p.isAvailable(p.next):
		return Empty
	case p.out >= p.size:
		return d.failPacked("descriptor %d is available, but all %d of the queue are the device's", p.next.slot, p.size)
	}
	return Popped
}

func (d *Device) failPacked(format string, args ...any) Status {
	d.packed.phase = noPhase
	return d.fail(format, args...)
}

// popPackedSlow takes the chain at next, of any shape.
func (d *Device) popPackedSlow(c *Chain) Status {
	if s := d.lookPacked(); s != Popped {
		return s
	}
	c.reset(0)
	id, n, s := d.walkPacked(c)
	p := d.packed
	switch {
	case s == Broken:
	case int(id) >= len(p.counts):
		s = d.failPacked("buffer id %d, queue size %d", id, p.size)
	case p.counts[id] != 0:
		s = d.failPacked("buffer id %d, which the device has already", id)
	}
	if s == Broken {
		c.reset(0)
		return s
	}
	d.takePacked(id, n)
	c.Head, c.Descs = id, uint16(n)
	if s == Malformed {
		c.reset(id)
	}
	return s
}

// walkPacked follows the chain at next, to its end even when a buffer is bad, since the id is there. It returns the chain's id and its
// number of descriptors in the ring.
func (d *Device) walkPacked(c *Chain) (id uint16, n uint32, s Status) {
	p, at := d.packed, d.packed.next
	for s = Popped; ; {
		desc := p.load(at)
		if desc.Flags&phaseFlags != at.available() {
			return 0, 0, d.failPacked("descriptor %d of a chain has flags %#x with wrap counter %d: it is not available",
				at.slot, desc.Flags, at.wrap)
		}
		if s == Popped && !d.addPacked(c, desc, n == 0) {
			s = Malformed
		}
		n++
		if desc.Flags&virtio.DescNext == 0 {
			return desc.ID, n, s
		}
		if p.out+n >= p.size {
			return 0, 0, d.failPacked("the chain at descriptor %d goes on after %d descriptors, the device has %d others: queue size %d",
				p.next.slot, n, p.out, p.size)
		}
		at.advance(1, p.size)
	}
}

// addPacked appends the buffer of desc to c, or the buffers of the table that it names. An indirect descriptor is a chain of its own
// (virtio-v1.2 §2.8.5).
func (d *Device) addPacked(c *Chain, desc virtio.PackedDesc, first bool) bool {
	if desc.Flags&virtio.DescIndirect == 0 {
		return d.add(c, plain(desc))
	}
	if !first {
		return false
	}
	table := d.table(plain(desc))
	for i := range table {
		if !d.add(c, tableEntry(table[i], d.packed.table)) {
			return false
		}
	}
	return len(table) > 0
}

// tableEntry makes an entry of a packed ring's indirect table, read as if it were a split ring's, what it is: there, the id and all
// flags but WRITE are reserved and ignored (virtio-v1.2 §2.8.7); heeded says which are not.
func tableEntry(d virtio.Desc, heeded uint16) virtio.Desc {
	flags := d.Next // the last 16 bits are the flags, those before them the id
	return virtio.Desc{Addr: d.Addr, Len: d.Len, Flags: flags & heeded}
}

// unpopPacked is Unpop of n chains.
func (d *Device) unpopPacked(n int) {
	p := d.packed
	for range n {
		d.next--
		id := p.order[d.next&d.mask]
		count := uint32(p.counts[id])
		p.counts[id] = 0
		p.out -= count
		p.next.retreat(count, p.size)
	}
	d.avail = d.next
	if d.err == nil {
		p.phase = p.next.available()
	}
}

// ahead counts the chains that are available from next on, and returns the place behind them.
func (p *packedDevice) ahead() (chains int, end place) {
	end = p.next
	for left := p.size - p.out; left > 0 && p.isAvailable(end); left-- {
		if p.load(end).Flags&virtio.DescNext == 0 {
			chains++
		}
		end.advance(1, p.size)
	}
	return chains, end
}
