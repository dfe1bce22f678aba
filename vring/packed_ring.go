package vring

import (
	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
)

// A packed virtqueue (virtio-v1.2 §2.8) is one ring that both sides write, and a word for each side in which it says what it wants to be
// notified of:
//
//	descriptor ring   [addr len id flags] ...     driver makes available, device makes used, in the same slots
//	driver event      offset and wrap, flags      driver writes: which used descriptors it wants to hear of
//	device event      offset and wrap, flags      device writes: which available descriptors it wants to hear of
//
// There are no indices in memory. Each side counts its way round the ring, flipping a wrap counter each time, and the two flags of a
// descriptor against that counter tell whether it is available, used, or neither. Length, id and flags of a descriptor are one aligned
// 64-bit word, so one load takes all that is decided on, and one store hands it over: of a batch, the first descriptor's word is
// stored last (release), and until then the other side, which goes slot by slot, does not look behind it.
//
// The device may write a used descriptor over an available one whose chain it still has: what it needs of a chain is in private memory
// from Pop on. A chain's buffer id may be any that the device does not have already; the table of ids is what Put and Unpop go by.

// slot is a descriptor as the two words that it is read and written in.
type slot struct {
	addr uint64
	word uint64 // len, id<<32, flags<<48
}

// phaseFlags are those that tell whether a descriptor is available or used.
const phaseFlags = virtio.DescAvail | virtio.DescUsed

// packWord makes the word of a descriptor.
func packWord(n uint32, id, flags uint16) uint64 {
	return uint64(n) | uint64(id)<<32 | uint64(flags)<<48
}

func wordFlags(w uint64) uint16 { return uint16(w >> 48) }
func wordID(w uint64) uint16    { return uint16(w >> 32) }

// place is a position in a packed ring: a slot, and the wrap counter there, 0 or 1.
type place struct {
	slot, wrap uint32
}

// placeOf reads an offset and wrap counter as rings and vhost-user have them: bits 0 to 14, and 15.
func placeOf(offWrap uint16) place {
	return place{uint32(offWrap & 0x7fff), uint32(offWrap >> 15)}
}

func (p place) offWrap() uint16 { return uint16(p.slot | p.wrap<<15) }

// available and used are the phase flags of such a descriptor at p.
func (p place) available() uint16 { return uint16(virtio.DescAvail << (8 * (p.wrap ^ 1))) }
func (p place) used() uint16      { return uint16(phaseFlags * p.wrap) }

// advance moves p by n slots, at most size.
func (p *place) advance(n, size uint32) {
	if p.slot += n; p.slot >= size {
		p.slot -= size
		p.wrap ^= 1
	}
}

// retreat is the opposite of advance.
func (p *place) retreat(n, size uint32) {
	if p.slot < n {
		p.slot += size
		p.wrap ^= 1
	}
	p.slot -= n
}

// eventOf is the event suppression structure that asks for a notification of everything, or with EVENT_IDX of the descriptor at p.
func eventOf(p place, eventIdx bool) uint32 {
	if eventIdx {
		return virtio.EventDesc<<16 | uint32(p.offWrap())
	}
	return virtio.EventEnable << 16
}

// eventOff asks for none.
const eventOff = virtio.EventDisable << 16

// wanted reports whether the event suppression structure asks for a notification after n descriptors were made available or used up to now
// (virtio-v1.2 §2.8.10). An n above the ring's size is more than all the way round.
func wanted(event uint32, eventIdx bool, now place, n, size uint32) bool {
	switch flags := event >> 16 & 3; {
	case flags == virtio.EventDisable:
		return false
	case flags != virtio.EventDesc || !eventIdx || n > size:
		return true
	}
	at := placeOf(uint16(event))
	ago := int(now.slot) - int(at.slot)
	if at.wrap != now.wrap {
		ago += int(size)
	}
	return ago >= 1 && ago <= int(n)
}

// packedParts are typed views of the memory of a packed virtqueue.
type packedParts struct {
	ring        []slot
	driverEvent *uint32 // driver writes
	deviceEvent *uint32 // device writes
}

// newPackedParts checks alignments and sizes (virtio-v1.2 §2.8) and makes the views of a queue of size n.
func newPackedParts(n int, desc, driver, device []byte) (p packedParts, err error) {
	if err := checkPart("descriptor ring", desc, virtio.DescTableLen(n), virtio.DescAlign); err != nil {
		return p, err
	}
	if err := checkPart("driver event suppression", driver, virtio.EventLen, virtio.EventAlign); err != nil {
		return p, err
	}
	if err := checkPart("device event suppression", device, virtio.EventLen, virtio.EventAlign); err != nil {
		return p, err
	}
	return packedParts{view[slot](desc, n), &view[uint32](driver, 1)[0], &view[uint32](device, 1)[0]}, nil
}

// plain is a descriptor of a packed ring as one of a split ring's, without link.
func plain(d virtio.PackedDesc) virtio.Desc {
	return virtio.Desc{Addr: d.Addr, Len: d.Len, Flags: d.Flags & (virtio.DescNext | virtio.DescWrite | virtio.DescIndirect)}
}

// slotAddr is the guest address of a slot of the ring at base.
func slotAddr(base guestmem.GPA, i uint32) guestmem.GPA {
	return base + guestmem.GPA(i)*virtio.DescSize
}
