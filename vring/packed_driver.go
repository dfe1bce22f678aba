package vring

import (
	"fmt"
	"sync/atomic"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// packedDriver is what the driver end of a packed virtqueue has beside what every Driver has. Driver.next, published and reaped count
// chains here, and Driver.free is the ids that are free.
type packedDriver struct {
	packedParts
	size  uint32
	next  place  // descriptor to write next
	batch place  // first descriptor that is not published
	first uint64 // its word
	descs uint32 // not published
	used  place  // used descriptor to read next
	event uint32 // what driverEvent was last set to
}

// openPacked makes d the driver end of the packed ring in cfg: an empty one.
func (d *Driver) openPacked(cfg DriverConfig) error {
	parts, err := newPackedParts(cfg.Size, cfg.Desc, cfg.Avail, cfg.Used)
	if err != nil {
		return err
	}
	at := placeOf(cfg.Base)
	if at.slot >= uint32(cfg.Size) {
		return fmt.Errorf("base at descriptor %d, queue size %d", at.slot, cfg.Size)
	}
	clear(parts.ring) // neither available nor used, whatever the wrap counter
	shm.StoreFence32(parts.deviceEvent, eventOf(at, false))
	d.packed = &packedDriver{packedParts: parts, size: uint32(cfg.Size), next: at, batch: at, used: at}
	d.next, d.published, d.reaped = 0, 0, 0
	d.storeEvent(eventOf(at, d.eventIdx))
	return nil
}

// addPacked is Add.
func (d *Driver) addPacked(readable, writable []Buf) (id uint16, err error) {
	n := len(readable) + len(writable)
	need, indirect, err := d.need(n)
	if err != nil {
		return 0, err
	}
	id = d.free[d.freeHead&d.mask]
	d.freeHead++
	d.freeLen -= need
	if indirect {
		d.writeSlot(d.fillTable(id, readable, writable), id)
	} else {
		for i := range n {
			desc := pick(readable, writable, i)
			if i+1 < n {
				desc.Flags |= virtio.DescNext
			}
			d.writeSlot(desc, id)
		}
	}
	var total uint32
	for _, b := range writable {
		total += b.Len
	}
	d.out[id] = sent{descs: uint16(need), writable: total}
	d.order[d.next&d.mask] = id
	d.next++
	return id, nil
}

// writeSlot writes the next descriptor, and makes it available unless it is the first of a batch: that is Publish's.
func (d *Driver) writeSlot(desc virtio.Desc, id uint16) {
	p := d.packed
	s := &p.ring[p.next.slot]
	s.addr = desc.Addr
	w := packWord(desc.Len, id, desc.Flags|p.next.available())
	if p.descs == 0 {
		p.first = w
	} else {
		s.word = w
	}
	p.descs++
	p.next.advance(1, p.size)
}

// fillTable writes the indirect table of id and returns the descriptor that names it.
func (d *Driver) fillTable(id uint16, readable, writable []Buf) virtio.Desc {
	n := len(readable) + len(writable)
	at, table := d.tableOf(id, n)
	for i := range table {
		desc := pick(readable, writable, i)
		table[i] = virtio.Desc{Addr: desc.Addr, Len: desc.Len, Next: desc.Flags} // the flags come last, the id before them is reserved
	}
	return virtio.Desc{Addr: at, Len: uint32(n * virtio.DescSize), Flags: virtio.DescIndirect}
}

// publishPacked is Publish.
func (d *Driver) publishPacked() {
	p := d.packed
	if p.descs == 0 {
		return
	}
	shm.StoreFence64(&p.ring[p.batch.slot].word, p.first)
	d.published = d.next
	d.owed += p.descs
	p.batch, p.descs = p.next, 0
}

// reapPacked is Reap.
func (d *Driver) reapPacked() (id uint16, written uint32, ok bool) {
	p := d.packed
	if !d.lookPacked() {
		return 0, 0, false
	}
	if !d.inBatch {
		elem, ok := d.usedPacked()
		if !ok {
			return 0, 0, false
		}
		d.batch, d.inBatch = elem, true
	}
	id = uint16(d.batch.ID)
	written = d.batch.Len
	if first := d.order[d.reaped&d.mask]; d.inOrder && first != id {
		// One used descriptor may stand for several chains (virtio-v1.2 §2.8.8): it names the last one.
		if d.reaped+1 == d.published {
			return 0, 0, d.fail("used id %d out of order, %d is the oldest that is out", id, first)
		}
		id, written = first, d.out[first].writable
	} else {
		d.inBatch = false
	}
	n := d.out[id].descs
	p.used.advance(uint32(n), p.size)
	d.free[(d.freeHead+uint16(d.size)-(d.next-d.reaped))&d.mask] = id
	d.freeLen += int(n)
	d.out[id] = sent{}
	d.reaped++
	return id, written, true
}

// lookPacked reports whether there is a used descriptor.
func (d *Driver) lookPacked() bool {
	p := d.packed
	if d.err != nil || d.reaped == d.published {
		return false
	}
	return d.inBatch || wordFlags(atomic.LoadUint64(&p.ring[p.used.slot].word))&phaseFlags == p.used.used()
}

// usedPacked reads the used descriptor that is next and checks it.
func (d *Driver) usedPacked() (e virtio.UsedElem, ok bool) {
	w := atomic.LoadUint64(&d.packed.ring[d.packed.used.slot].word)
	e = virtio.UsedElem{ID: uint32(wordID(w))}
	if wordFlags(w)&virtio.DescWrite != 0 {
		e.Len = uint32(w)
	}
	return e, d.checkUsed(e)
}

// needsKickPacked is NeedsKick after n descriptors.
func (d *Driver) needsKickPacked(n uint32) bool {
	p := d.packed
	return wanted(atomic.LoadUint32(p.deviceEvent), d.eventIdx, p.batch, n, p.size)
}

// enableCallPacked is EnableCall.
func (d *Driver) enableCallPacked() (more bool) {
	d.storeEvent(eventOf(d.packed.used, d.eventIdx))
	return d.lookPacked()
}

// disableCallPacked is DisableCall.
func (d *Driver) disableCallPacked() {
	if d.packed.event != eventOff {
		d.storeEvent(eventOff)
	}
}

// storeEvent stores the driver's event suppression structure, with the effect of a fence.
func (d *Driver) storeEvent(event uint32) {
	d.packed.event = event
	shm.StoreFence32(d.packed.driverEvent, event)
}

// usedIndexPacked goes through the used descriptors to where the device will write the next one.
func (d *Driver) usedIndexPacked() uint16 {
	p := d.packed
	at := p.used
	for i := d.reaped; i != d.published; i++ {
		w := atomic.LoadUint64(&p.ring[at.slot].word)
		id := int(wordID(w))
		if wordFlags(w)&phaseFlags != at.used() || id >= len(d.out) || d.out[id].descs == 0 {
			break
		}
		at.advance(uint32(d.out[id].descs), p.size)
	}
	return at.offWrap()
}
