package vring

import (
	"fmt"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// Config says what a Device is made of. Desc, Avail and Used are the memory of the three parts; they may be longer than
// virtio.DescTableLen, AvailLen and UsedLen, which is all that is used of them.
type Config struct {
	Size              int // descriptors: a power of two, 1 to virtio.MaxQueueSize
	Desc, Avail, Used []byte
	UsedLogAddr       guestmem.GPA // the used ring's address for the dirty log, if LogUsed
	LogUsed           bool         // tell the dirty log of writes to the used ring
	Features          virtio.Features
	Base              uint16 // index of the first available entry to pop, as in SET_VRING_BASE
}

// Device is the device end of a split virtqueue.
type Device struct {
	// Pop and Put: what every packet touches.
	heads     []uint16      // avail.ring; the driver writes it
	desc      []virtio.Desc // descriptor table; the driver writes it
	view      guestmem.View
	next      uint16 // available entry to pop next
	avail     uint16 // avail.idx when last looked at
	mask      uint16 // queue size - 1
	usedNext  uint16 // used entry to write next
	published uint16 // used.idx
	usedFlags uint16 // used.flags
	used      []virtio.UsedElem

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

	scratch []virtio.Desc // copy of an indirect table that cannot be read in place
	err     error
}

// NewDevice returns the device end of the ring in cfg, whose buffers view translates. The index of the first used entry is read
// from the used ring, as it is the only record of what an earlier back-end returned.
func NewDevice(cfg Config, view guestmem.View) (*Device, error) {
	if err := checkSize(cfg.Size); err != nil {
		return nil, err
	}
	if cfg.Features.Has(virtio.FRingPacked) {
		return nil, fmt.Errorf("a split ring with the feature %v", virtio.FRingPacked)
	}
	if view.Table() == nil {
		panic("bug: a device queue without guest memory")
	}
	d := &Device{
		view:          view,
		next:          cfg.Base,
		avail:         cfg.Base,
		mask:          uint16(cfg.Size - 1),
		unknown:       1 << 16,
		logUsed:       cfg.LogUsed,
		logAddr:       cfg.UsedLogAddr,
		eventIdx:      cfg.Features.Has(virtio.FEventIdx),
		notifyOnEmpty: cfg.Features.Has(virtio.FNotifyOnEmpty),
		indirect:      cfg.Features.Has(virtio.FIndirectDesc),
	}
	if err := d.Rebind(cfg.Desc, cfg.Avail, cfg.Used); err != nil {
		return nil, err
	}
	idx, err := shm.Index(cfg.Used, offIdx)
	if err != nil {
		return nil, fmt.Errorf("used ring: %w", err)
	}
	d.published = idx.Load()
	d.usedNext = d.published
	return d, nil
}

// checkSize refuses a queue size that a split ring cannot have.
func checkSize(n int) error {
	if n < 1 || n > virtio.MaxQueueSize || n&(n-1) != 0 {
		return fmt.Errorf("queue size %d, must be a power of two from 1 to %d", n, virtio.MaxQueueSize)
	}
	return nil
}

// Rebind gives the Device a new mapping of the same ring memory. On error nothing has changed.
func (d *Device) Rebind(desc, avail, used []byte) error {
	p, err := newParts(int(d.mask)+1, desc, avail, used)
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

// Base is the index of the available entry that Pop takes next, as GET_VRING_BASE answers.
func (d *Device) Base() uint16 { return d.next }

// UsedIndex is used.idx: how many used entries the driver can see, modulo 1<<16.
func (d *Device) UsedIndex() uint16 { return d.published }

// Size is the queue size in descriptors.
func (d *Device) Size() int { return int(d.mask) + 1 }

// Err says why the ring is Broken; it is nil until then.
func (d *Device) Err() error { return d.err }
