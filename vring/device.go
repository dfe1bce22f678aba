package vring

import (
	"fmt"
	"math/bits"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// Config says what a Device is made of. Desc, Avail and Used are the memory of the three parts; they may be longer than
// virtio.DescTableLen, AvailLen and UsedLen, which is all that is used of them. With VIRTIO_F_RING_PACKED they are the descriptor ring, and
// the event suppression structures of driver and device.
type Config struct {
	Size              int // descriptors: 1 to virtio.MaxQueueSize, a power of two for a split ring
	Desc, Avail, Used []byte
	DescLogAddr       guestmem.GPA // the address of Desc for the dirty log, if LogUsed and packed
	UsedLogAddr       guestmem.GPA // the address of Used for the dirty log, if LogUsed
	LogUsed           bool         // tell the dirty log of writes to the ring
	Features          virtio.Features

	// ReadOnly: the device never writes into this queue's buffers, as of a transmitq. In indirect tables of a packed ring the flag that says otherwise
	// is not heeded then: DPDK's driver (22.11 for one) leaves it on the virtio-net header of a frame in several pieces, and no back-end of its
	// acquaintance looks.
	ReadOnly bool

	// Base is the index of the first available entry to pop, as in SET_VRING_BASE. It is not heeded for a split ring, which goes on at its used
	// index: an earlier back-end used chains in order, so those behind that index are exactly the ones that nobody has returned, and are
	// taken again; all others were returned, and both are the same. Of a packed ring Base is an offset in bits 0 to 14 and a
	// wrap counter in bit 15, and UsedBase is the same for used descriptors: what lies between the two was popped by an earlier back-end
	// that did not return it. If the descriptor at UsedBase is available still, popping starts there; else UsedBase is not heeded.
	Base, UsedBase uint16
}

// Device is the device end of a virtqueue, split or packed.
type Device struct {
	// Pop and Put: what every packet touches.
	heads     []uint16      // avail.ring; the driver writes it
	desc      []virtio.Desc // descriptor table; the driver writes it
	view      guestmem.View
	next      uint16            // available entry to pop next
	avail     uint16            // avail.idx when last looked at
	mask      uint16            // queue size - 1
	usedNext  uint16            // used entry to write next
	published uint16            // used.idx
	usedFlags uint16            // used.flags
	used      []virtio.UsedElem // the used ring; of a packed ring, what was Put and not published
	packed    *packedDevice     // nil: a split ring

	// Publish, NeedsCall, EnableKick: what every batch touches.
	usedWord      *uint32 // used.flags and used.idx
	owed          uint32  // entries published since NeedsCall was asked
	unknown       uint32  // 1<<16 until the first Publish: nobody knows what the driver was last notified of
	logUsed       bool
	eventIdx      bool
	notifyOnEmpty bool
	indirect      bool
	availIdx      shm.IndexWord
	availFlags    shm.IndexWord
	usedEvent     shm.IndexWord
	availEvent    *uint16
	logAddr       guestmem.GPA
	descLogAddr   guestmem.GPA
	size          int

	scratch []virtio.Desc // copy of an indirect table that cannot be read in place
	err     error
}

// NewDevice returns the device end of the ring in cfg, whose buffers view translates. The index of a split ring's first used entry is read
// from the used ring, as it is the only record of what an earlier back-end returned: once, since the driver may write there what it likes.
func NewDevice(cfg Config, view guestmem.View) (*Device, error) {
	packed := cfg.Features.Has(virtio.FRingPacked)
	if err := CheckSize(cfg.Size, packed); err != nil {
		return nil, err
	}
	if view.Table() == nil {
		panic("bug: a device queue without guest memory")
	}
	d := &Device{
		view:          view,
		mask:          uint16(Slots(cfg.Size) - 1),
		size:          cfg.Size,
		unknown:       1 << 16,
		logUsed:       cfg.LogUsed,
		logAddr:       cfg.UsedLogAddr,
		descLogAddr:   cfg.DescLogAddr,
		eventIdx:      cfg.Features.Has(virtio.FEventIdx),
		notifyOnEmpty: cfg.Features.Has(virtio.FNotifyOnEmpty),
		indirect:      cfg.Features.Has(virtio.FIndirectDesc),
	}
	if packed {
		return d.openPacked(cfg)
	}
	if err := d.Rebind(cfg.Desc, cfg.Avail, cfg.Used); err != nil {
		return nil, err
	}
	idx, err := shm.Index(cfg.Used, offIdx)
	if err != nil {
		return nil, fmt.Errorf("used ring: %w", err)
	}
	d.published = idx.Load()
	d.usedNext, d.next, d.avail = d.published, d.published, d.published
	return d, nil
}

// CheckSize refuses a queue size in descriptors that a ring cannot have: that of a split ring is a power of two (virtio-v1.2 §2.7), that of a
// packed ring need not be (§2.8).
func CheckSize(n int, packed bool) error {
	switch {
	case n >= 1 && n <= virtio.MaxQueueSize && (packed || n&(n-1) == 0):
		return nil
	case packed:
		return fmt.Errorf("queue size %d, must be from 1 to %d", n, virtio.MaxQueueSize)
	}
	return fmt.Errorf("queue size %d, must be a power of two from 1 to %d", n, virtio.MaxQueueSize)
}

// Slots is the least power of two that is not below the queue size n: the length of a ring that holds every chain of the queue and is
// indexed with a mask.
func Slots(n int) int { return 1 << bits.Len(uint(n-1)) }

// Rebind gives the Device a new mapping of the same ring memory. On error nothing has changed.
func (d *Device) Rebind(desc, avail, used []byte) error {
	if d.packed != nil {
		return d.rebindPacked(desc, avail, used)
	}
	p, err := newParts(d.size, desc, avail, used)
	if err != nil {
		return err
	}
	d.desc, d.heads, d.used = p.desc, p.heads, p.used
	d.usedWord, d.availEvent = p.usedWord, p.availEvent
	d.availIdx, d.availFlags, d.usedEvent = p.availIdx, p.availFlags, p.usedEvent
	return nil
}

// SetView replaces the memory that buffers lie in, after a change of the memory table.
func (d *Device) SetView(v guestmem.View) { d.view = v }

// View translates the addresses of this queue's buffers.
func (d *Device) View() *guestmem.View { return &d.view }

// Base is the index of the available entry that Pop takes next, as GET_VRING_BASE answers; of a packed ring, as in Config.
func (d *Device) Base() uint16 {
	if d.packed != nil {
		return d.packed.next.offWrap()
	}
	return d.next
}

// UsedIndex is used.idx: how many used entries the driver can see, modulo 1<<16. Of a packed ring it is where the next used descriptor goes, as
// Config.UsedBase.
func (d *Device) UsedIndex() uint16 {
	if d.packed != nil {
		return d.packed.used.offWrap()
	}
	return d.published
}

// Size is the queue size in descriptors.
func (d *Device) Size() int { return d.size }

// Err says why the ring is Broken; it is nil until then.
func (d *Device) Err() error { return d.err }
