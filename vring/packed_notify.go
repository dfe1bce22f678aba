package vring

import (
	"sync/atomic"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// publishPacked is Publish of what was Put, in Device.used from published to usedNext. The words of all but the first used descriptor are
// stored first, then the first's. State changes only when all memory was written, so that a fault on the way leaves the chains the device's.
func (d *Device) publishPacked() {
	p := d.packed
	ring, counts, at := p.ring, p.counts, p.used
	var first uint64
	for i := d.published; i != d.usedNext; i++ {
		e := &d.used[i&d.mask]
		flags := at.used()
		if e.Len > 0 {
			flags |= virtio.DescWrite
		}
		w := packWord(e.Len, uint16(e.ID), flags)
		if i == d.published {
			first = w
		} else {
			ring[at.slot].word = w
		}
		n := counts[e.ID]
		if n == 0 {
			panic("bug: a chain was put that the device does not have")
		}
		at.advance(uint32(n), p.size)
	}
	shm.StoreFence64(&ring[p.used.slot].word, first)
	if d.logUsed {
		d.logPacked()
	}
	d.releasePacked()
	p.used = at
}

// releasePacked forgets the chains that were published.
func (d *Device) releasePacked() {
	p := d.packed
	counts, total := p.counts, uint32(0)
	for i := d.published; i != d.usedNext; i++ {
		id := d.used[i&d.mask].ID
		n := uint32(counts[id])
		if n == 0 {
			panic("bug: a chain was put twice")
		}
		counts[id] = 0
		total += n
	}
	d.published = d.usedNext
	p.out -= total
	d.owed += total + d.unknown
	d.unknown = 0
}

// logPacked tells the dirty log of the used descriptors that were written.
func (d *Device) logPacked() {
	at := d.packed.used
	for i := d.published; i != d.usedNext; i++ {
		d.view.Dirty(slotAddr(d.descLogAddr, at.slot), virtio.DescSize)
		at.advance(uint32(d.packed.counts[d.used[i&d.mask].ID]), d.packed.size)
	}
}

// needsCallPacked is NeedsCall after n descriptors.
func (d *Device) needsCallPacked(n uint32) bool {
	p := d.packed
	return wanted(atomic.LoadUint32(p.driverEvent), d.eventIdx, p.used, n, p.size)
}

// enableKickPacked is EnableKick.
func (d *Device) enableKickPacked() (more bool) {
	p := d.packed
	at := p.next
	if d.eventIdx {
		_, at = p.ahead()
	}
	d.storeEvent(eventOf(at, d.eventIdx))
	return d.lookPacked() != Empty
}

// disableKickPacked is DisableKick. It has something to write with VIRTIO_F_EVENT_IDX as well: a driver may take no notice of the offset.
func (d *Device) disableKickPacked() {
	if d.packed.event != eventOff {
		d.storeEvent(eventOff)
	}
}

// storeEvent stores the device's event suppression structure, with the effect of a fence.
func (d *Device) storeEvent(event uint32) {
	d.packed.event = event
	shm.StoreFence32(d.packed.deviceEvent, event)
	if d.logUsed {
		d.view.Dirty(d.logAddr, virtio.EventLen)
	}
}
