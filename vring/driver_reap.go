package vring

import (
	"fmt"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// Reap takes back a chain that the device has used: its id, and how many bytes the device says it wrote. It returns ok = false when
// there is none, or when the device broke the rules: then Err says how.
func (d *Driver) Reap() (id uint16, written uint32, ok bool) {
	if d.packed != nil {
		return d.reapPacked()
	}
	if d.reaped == d.seen && !d.look() {
		return 0, 0, false
	}
	if d.inOrder {
		id, written, ok = d.usedInOrder()
	} else {
		id, written, ok = d.usedAt(d.reaped)
	}
	if !ok {
		return 0, 0, false
	}
	d.reaped++
	d.release(id)
	return id, written, true
}

// look reads used.idx and checks it; true means that there is something to reap.
func (d *Driver) look() bool {
	if d.err != nil {
		return false
	}
	idx := d.usedIdx.Load()
	if n, out := idx-d.reaped, d.published-d.reaped; n > out {
		return d.fail("used index %d is %d entries ahead of the last one reaped, %d chains are out", idx, n, out)
	}
	d.seen = idx
	return idx != d.reaped
}

func (d *Driver) fail(format string, args ...any) bool {
	d.err = fmt.Errorf(format, args...)
	d.seen = d.reaped
	return false
}

// usedAt reads the used entry of index i and checks it.
func (d *Driver) usedAt(i uint16) (id uint16, written uint32, ok bool) {
	elem := d.used[i&d.mask]
	if !d.checkUsed(elem) {
		return 0, 0, false
	}
	return uint16(elem.ID), elem.Len, true
}

// checkUsed checks what the device says of a chain.
func (d *Driver) checkUsed(elem virtio.UsedElem) bool {
	switch {
	case elem.ID >= uint32(len(d.out)):
		return d.fail("used id %d, queue size %d", elem.ID, len(d.out))
	case d.out[elem.ID].descs == 0:
		return d.fail("used id %d, which the device does not have", elem.ID)
	case elem.Len > d.out[elem.ID].writable:
		return d.fail("used length %d of id %d, whose writable part has %d bytes", elem.Len, elem.ID, d.out[elem.ID].writable)
	}
	return true
}

// usedInOrder takes the oldest chain that is out. With VIRTIO_F_IN_ORDER one used entry may stand for several chains: it names the
// last one, and those before it count as used to their full length (virtio-v1.2 §2.7.9).
func (d *Driver) usedInOrder() (id uint16, written uint32, ok bool) {
	if !d.inBatch {
		last, n, ok := d.usedAt(d.reaped)
		if !ok {
			return 0, 0, false
		}
		d.batch, d.inBatch = virtio.UsedElem{ID: uint32(last), Len: n}, true
	}
	id = d.order[d.reaped&d.mask]
	if uint32(id) == d.batch.ID {
		d.inBatch = false
		return id, d.batch.Len, true
	}
	if d.reaped+1 == d.seen {
		return 0, 0, d.fail("used id %d out of order, %d is the oldest that is out", d.batch.ID, id)
	}
	return id, d.out[id].writable, true
}

// release frees the descriptors of the chain of head id.
func (d *Driver) release(id uint16) {
	n := d.out[id].descs
	d.out[id] = sent{}
	for range n {
		d.free[(d.freeHead+uint16(d.freeLen))&d.mask] = id
		d.freeLen++
		id = d.after[id]
	}
}

// EnableCall asks the device to notify of chains that it uses from now on, then looks at the ring once more: more tells that there
// are chains to reap already, or that the device broke the rules.
func (d *Driver) EnableCall() (more bool) {
	if d.err != nil {
		return false
	}
	if d.packed != nil {
		return d.enableCallPacked()
	}
	if d.eventIdx {
		shm.StoreFence16(d.eventField, d.seen)
	} else {
		d.flags = 0
		d.storeWord()
	}
	return d.look() || d.err != nil
}

// DisableCall tells the device that notifications are not needed; some may come all the same. With VIRTIO_F_EVENT_IDX there is
// nothing to write, as for Device.DisableKick.
func (d *Driver) DisableCall() {
	if d.packed != nil {
		d.disableCallPacked()
		return
	}
	if d.eventIdx || d.flags == virtio.AvailNoInterrupt {
		return
	}
	d.flags = virtio.AvailNoInterrupt
	d.storeWord()
}
