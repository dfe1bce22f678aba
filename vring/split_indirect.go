package vring

import (
	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// table returns the indirect table that at names, or nil when there cannot be one there (virtio-v1.2 §2.7.5.3). It is guest memory:
// an entry is to be read once.
func (d *Device) table(at virtio.Desc) []virtio.Desc {
	n := int(at.Len / virtio.DescSize)
	switch {
	case !d.indirect, at.Flags&virtio.DescNext != 0:
		return nil
	case n == 0, at.Len%virtio.DescSize != 0, n > d.maxTable():
		return nil
	}
	if mem := d.view.Slice(guestmem.GPA(at.Addr), at.Len); mem != nil {
		if t, err := shm.View[virtio.Desc](mem, n); err == nil {
			return t
		}
	}
	return d.copyTable(guestmem.GPA(at.Addr), n)
}

// copyTable copies a table of n entries that crosses memory regions, or is not aligned, into memory of our own.
func (d *Device) copyTable(a guestmem.GPA, n int) []virtio.Desc {
	if d.scratch == nil {
		d.scratch = make([]virtio.Desc, d.maxTable())
	}
	t := d.scratch[:n]
	to := shm.Bytes(t)
	for len(to) > 0 {
		mem := d.view.Prefix(a, uint32(len(to)))
		if mem == nil {
			return nil
		}
		to = to[copy(to, mem):]
		a += guestmem.GPA(len(mem))
	}
	return t
}
