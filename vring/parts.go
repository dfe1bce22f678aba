package vring

import (
	"fmt"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// parts are typed views of the memory of a split virtqueue, as either end uses them.
type parts struct {
	desc  []virtio.Desc     // driver writes
	heads []uint16          // avail.ring, driver writes
	used  []virtio.UsedElem // device writes

	availIdx, availFlags, usedEvent shm.IndexWord // as the device reads them
	usedIdx, usedFlags, availNotify shm.IndexWord // as the driver reads them; availNotify is avail_event

	usedWord   *uint32 // used.flags and used.idx, device writes
	availEvent *uint16 // device writes
}

// newParts checks alignments and sizes (virtio-v1.2 §2.7) and makes the views of a queue of size n.
func newParts(n int, desc, avail, used []byte) (p parts, err error) {
	if err := checkPart("descriptor table", desc, virtio.DescTableLen(n), virtio.DescAlign); err != nil {
		return p, err
	}
	if err := checkPart("available ring", avail, virtio.AvailLen(n), virtio.AvailAlign); err != nil {
		return p, err
	}
	if err := checkPart("used ring", used, virtio.UsedLen(n), virtio.UsedAlign); err != nil {
		return p, err
	}
	p.desc = view[virtio.Desc](desc, n)
	p.heads = view[uint16](avail[offEntries:], n)
	p.used = view[virtio.UsedElem](used[offEntries:], n)
	p.availIdx, p.availFlags, p.usedEvent = index(avail, offIdx), index(avail, offFlags), index(avail, offUsedEvent(n))
	p.usedIdx, p.usedFlags, p.availNotify = index(used, offIdx), index(used, offFlags), index(used, offAvailEvent(n))
	p.usedWord = &view[uint32](used, 1)[0]
	p.availEvent = &view[uint16](used[offAvailEvent(n):], 1)[0]
	return p, nil
}

func checkPart(name string, b []byte, size, align int) error {
	if len(b) < size {
		return fmt.Errorf("%s of %d bytes, needs %d", name, len(b), size)
	}
	if shm.Addr(b)%uintptr(align) != 0 {
		return fmt.Errorf("%s is not aligned to %d bytes", name, align)
	}
	return nil
}

// view is shm.View of memory that checkPart has passed.
func view[T any](b []byte, n int) []T {
	v, err := shm.View[T](b, n)
	if err != nil {
		panic("bug: " + err.Error())
	}
	return v
}

// index is shm.Index of memory that checkPart has passed.
func index(b []byte, off int) shm.IndexWord {
	w, err := shm.Index(b, off)
	if err != nil {
		panic("bug: " + err.Error())
	}
	return w
}
