package vring

import (
	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// Put returns the chain of head to the driver with written bytes in its device-writable part. The driver sees it at the next
// Publish. Each chain popped is Put once; with VIRTIO_F_IN_ORDER, in the order they were popped.
func (d *Device) Put(head uint16, written uint32) {
	d.used[d.usedNext&d.mask] = virtio.UsedElem{ID: uint32(head), Len: written}
	d.usedNext++
}

// PrefetchUsed asks for the ring memory that the next n Puts, each of a chain of one descriptor, write.
func (d *Device) PrefetchUsed(n int) {
	if d.packed != nil {
		prefetch(d.packed.ring, int(d.packed.used.slot), n)
		return
	}
	prefetch(d.used, int(d.usedNext&d.mask), n)
}

// prefetch asks for the n values of ring from i on.
func prefetch[T any](ring []T, i, n int) {
	shm.PrefetchWrite(shm.Bytes(ring[i:min(i+n, len(ring))]))
	if rest := i + n - len(ring); rest > 0 {
		shm.PrefetchWrite(shm.Bytes(ring[:min(rest, len(ring))]))
	}
}

// Publish lets the driver see every chain Put so far (virtio-v1.2 §2.7.8.2). It does nothing when there is none.
func (d *Device) Publish() {
	n := d.usedNext - d.published
	if n == 0 {
		return
	}
	if d.packed != nil {
		d.publishPacked()
		return
	}
	if d.logUsed {
		d.logEntries(d.published, n)
	}
	d.published = d.usedNext
	d.storeWord(offIdx)
	d.owed += uint32(n) + d.unknown
	d.unknown = 0
}

// storeWord stores used.flags and used.idx, with the effect of a fence. Only the field at off has changed.
func (d *Device) storeWord(off int) {
	shm.StoreFence32(d.usedWord, uint32(d.published)<<16|uint32(d.usedFlags))
	if d.logUsed {
		d.view.Dirty(d.logAddr+guestmem.GPA(off), 2)
	}
}

// logEntries tells the dirty log of n used entries from index first on.
func (d *Device) logEntries(first, n uint16) {
	const elem = 8 // bytes of a virtio.UsedElem
	at := d.logAddr + offEntries
	i := int(first & d.mask)
	head := min(int(n), d.Size()-i)
	d.view.Dirty(at+guestmem.GPA(i*elem), uint64(head*elem))
	if rest := int(n) - head; rest > 0 {
		d.view.Dirty(at, uint64(rest*elem))
	}
}

// NeedsCall reports whether the driver wants to be notified of what was published since the last time it was asked
// (virtio-v1.2 §2.7.7.2). The first answer with VIRTIO_F_EVENT_IDX is yes, since an earlier back-end may have owed a notification.
func (d *Device) NeedsCall() bool {
	n := d.owed
	if n == 0 {
		return false
	}
	d.owed = 0
	switch {
	case d.packed != nil:
		return d.needsCallPacked(n)
	case d.notifyOnEmpty && d.next == d.avail && d.availIdx.Load() == d.next:
		return true
	case d.eventIdx:
		return crossed(d.usedEvent.Load(), d.published, n)
	}
	return d.availFlags.Load()&virtio.AvailNoInterrupt == 0
}

// EnableKick asks the driver to notify of chains that this end has not seen yet, then looks at the ring once more: more tells
// that there are chains to pop, or that the ring turned out to be broken. Without more, the next chain comes with a notification.
func (d *Device) EnableKick() (more bool) {
	if d.err != nil {
		return false
	}
	if d.packed != nil {
		return d.enableKickPacked()
	}
	if d.eventIdx {
		shm.StoreFence16(d.availEvent, d.avail)
		if d.logUsed {
			d.view.Dirty(d.logAddr+guestmem.GPA(offAvailEvent(d.Size())), 2)
		}
	} else {
		d.usedFlags = 0
		d.storeWord(offFlags)
	}
	return d.look() != Empty
}

// DisableKick tells the driver that notifications are not needed; some may come all the same. With VIRTIO_F_EVENT_IDX there is
// nothing to write: the index moves past avail_event and that is that.
func (d *Device) DisableKick() {
	if d.packed != nil {
		d.disableKickPacked()
		return
	}
	if d.eventIdx || d.usedFlags == virtio.UsedNoNotify {
		return
	}
	d.usedFlags = virtio.UsedNoNotify
	d.storeWord(offFlags)
}
