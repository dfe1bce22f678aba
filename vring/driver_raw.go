package vring

import (
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// The Raw methods reach into the ring's memory behind the Driver's back: to play a driver that breaks the rules.

// RawDesc is the descriptor table; a packed ring has none, nor what RawAvail, RawUsed, RawUsedFlags and RawAvailEvent return.
func (d *Driver) RawDesc() []virtio.Desc { return d.desc }

// RawAvail is the ring of heads in the available ring.
func (d *Driver) RawAvail() []uint16 { return d.heads }

// RawUsed is the ring of entries in the used ring.
func (d *Driver) RawUsed() []virtio.UsedElem { return d.used }

// RawTable is the indirect table that chains of head id use, or nil when there are none.
func (d *Driver) RawTable(id uint16) []virtio.Desc {
	if d.tableLen == 0 {
		return nil
	}
	first := int(id) * d.tableLen
	return d.tables[first : first+d.tableLen]
}

// RawSetAvailIndex stores avail.idx. The next Publish overwrites it.
func (d *Driver) RawSetAvailIndex(idx uint16) {
	shm.StoreFence32(d.availWord, uint32(idx)<<16|uint32(d.flags))
}

// RawUsedIndex is used.idx as it stands in memory. Of a packed ring it is the place, as in Config.UsedBase, behind the last used descriptor.
func (d *Driver) RawUsedIndex() uint16 {
	if d.packed != nil {
		return d.usedIndexPacked()
	}
	return d.usedIdx.Load()
}

// RawPacked is the descriptor ring of a packed ring.
func (d *Driver) RawPacked() []virtio.PackedDesc {
	return view[virtio.PackedDesc](shm.Bytes(d.packed.ring), d.size)
}

// RawUsedFlags is used.flags as it stands in memory.
func (d *Driver) RawUsedFlags() uint16 { return d.parts.usedFlags.Load() }

// RawAvailEvent is avail_event as it stands in memory.
func (d *Driver) RawAvailEvent() uint16 { return d.availNotify.Load() }
