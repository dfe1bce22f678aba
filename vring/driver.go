package vring

import (
	"errors"
	"fmt"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// Buf is a buffer that a driver gives to a device.
type Buf struct {
	GPA guestmem.GPA
	Len uint32 // bytes
}

// DriverConfig says what a Driver is made of. The memory is the guest's, as for Config; the available ring must be 4-aligned.
type DriverConfig struct {
	Size              int // descriptors: 1 to virtio.MaxQueueSize, a power of two for a split ring
	Desc, Avail, Used []byte
	Features          virtio.Features
	Base              uint16 // both ring indices start here, as in Config; a guest's start at 0, with wrap counter 1 if packed

	// With VIRTIO_F_INDIRECT_DESC: Size tables of IndirectLen descriptors each, one for each head. Chains of 2 to IndirectLen
	// buffers then take one descriptor of the ring.
	Indirect     []byte
	IndirectAddr guestmem.GPA // of Indirect
	IndirectLen  int
}

// ErrFull is returned by Add when the ring lacks the descriptors that the chain takes: Reap first.
var ErrFull = errors.New("not enough free descriptors")

// Driver is the driver end of a virtqueue, split or packed.
type Driver struct {
	parts
	packed     *packedDriver // nil: a split ring
	availWord  *uint32       // avail.flags and avail.idx, driver writes
	eventField *uint16       // used_event, driver writes

	tables       []virtio.Desc // all indirect tables, one after the other
	tableLen     int
	indirectAddr guestmem.GPA

	size      int
	mask      uint16
	eventIdx  bool
	inOrder   bool
	flags     uint16 // avail.flags
	next      uint16 // available entry to write next
	published uint16 // avail.idx
	reaped    uint16 // used entry to read next
	seen      uint16 // used.idx when last looked at
	owed      uint32 // entries published since NeedsKick was asked

	// What the ring holds is kept here, as the driver must not rely on memory that the device could have scribbled on.
	free     []uint16 // free descriptors: a ring, since VIRTIO_F_IN_ORDER wants them taken in ring order
	freeHead uint16
	freeLen  int
	after    []uint16 // the descriptor after this one in its chain
	out      []sent   // by head
	order    []uint16 // heads in the order they were made available
	batch    virtio.UsedElem
	inBatch  bool // VIRTIO_F_IN_ORDER: chains up to batch.ID are used
	err      error
}

// sent is a chain that the device has.
type sent struct {
	descs    uint16 // of the ring; 0: the device does not have it
	writable uint32 // bytes
}

// NewDriver initializes the memory in cfg as an empty ring and returns its driver end. The device end is made after it.
func NewDriver(cfg DriverConfig) (*Driver, error) {
	packed := cfg.Features.Has(virtio.FRingPacked)
	if err := CheckSize(cfg.Size, packed); err != nil {
		return nil, err
	}
	n, slots := cfg.Size, Slots(cfg.Size)
	d := &Driver{
		size: n, mask: uint16(slots - 1), indirectAddr: cfg.IndirectAddr,
		eventIdx: cfg.Features.Has(virtio.FEventIdx), inOrder: cfg.Features.Has(virtio.FInOrder),
		next: cfg.Base, published: cfg.Base, reaped: cfg.Base, seen: cfg.Base,
		free: make([]uint16, slots), freeLen: n, after: make([]uint16, n), out: make([]sent, n), order: make([]uint16, slots),
	}
	for i := range d.free {
		d.free[i] = uint16(i)
	}
	if cfg.Features.Has(virtio.FIndirectDesc) && cfg.IndirectLen > 0 {
		var err error
		if d.tables, err = shm.View[virtio.Desc](cfg.Indirect, n*cfg.IndirectLen); err != nil {
			return nil, fmt.Errorf("indirect tables: %w", err)
		}
		d.tableLen = cfg.IndirectLen
	}
	open := d.openSplit
	if packed {
		open = d.openPacked
	}
	if err := open(cfg); err != nil {
		return nil, err
	}
	return d, nil
}

// openSplit makes d the driver end of the split ring in cfg: an empty one.
func (d *Driver) openSplit(cfg DriverConfig) (err error) {
	if d.parts, err = newParts(d.size, cfg.Desc, cfg.Avail, cfg.Used); err != nil {
		return err
	}
	if d.availWord, err = shm.Word(cfg.Avail, offFlags); err != nil {
		return fmt.Errorf("available ring: %w", err)
	}
	d.eventField = &view[uint16](cfg.Avail[offUsedEvent(d.size):], 1)[0]
	d.initMemory()
	return nil
}

// initMemory writes an empty ring. Both events are at the start: each side's first entry comes with a notification.
func (d *Driver) initMemory() {
	clear(d.desc)
	clear(d.heads)
	clear(d.used)
	shm.StoreFence32(d.usedWord, uint32(d.reaped)<<16)
	shm.StoreFence16(d.availEvent, d.reaped)
	shm.StoreFence16(d.eventField, d.reaped)
	d.storeWord()
}

// storeWord stores avail.flags and avail.idx, with the effect of a fence.
func (d *Driver) storeWord() {
	shm.StoreFence32(d.availWord, uint32(d.published)<<16|uint32(d.flags))
}

// need is how many descriptors of the ring a chain of n buffers takes, and whether it goes into an indirect table.
func (d *Driver) need(n int) (need int, indirect bool, err error) {
	if need = n; n > 1 && n <= d.tableLen {
		need, indirect = 1, true
	}
	switch {
	case n == 0:
		return 0, false, errors.New("chain without buffers")
	case need > d.size:
		return 0, false, fmt.Errorf("chain of %d buffers, queue size %d", n, d.size)
	case need > d.freeLen:
		return 0, false, ErrFull
	}
	return need, indirect, nil
}

// Add writes a chain that the device cannot see yet: readable buffers, then writable ones, at least one in all. The id that it returns
// is the chain's head, which Reap will return; of a packed ring, its buffer id.
func (d *Driver) Add(readable, writable []Buf) (id uint16, err error) {
	if d.packed != nil {
		return d.addPacked(readable, writable)
	}
	need, indirect, err := d.need(len(readable) + len(writable))
	if err != nil {
		return 0, err
	}
	id = d.free[d.freeHead&d.mask]
	if indirect {
		d.addIndirect(readable, writable)
	} else {
		d.addDirect(readable, writable)
	}
	var total uint32
	for _, b := range writable {
		total += b.Len
	}
	d.out[id] = sent{descs: uint16(need), writable: total}
	d.order[d.next&d.mask] = id
	d.heads[d.next&d.mask] = id
	d.next++
	return id, nil
}

// pick is buffer i of the chain as a descriptor, without its link.
func pick(readable, writable []Buf, i int) virtio.Desc {
	if i < len(readable) {
		return virtio.Desc{Addr: uint64(readable[i].GPA), Len: readable[i].Len}
	}
	b := writable[i-len(readable)]
	return virtio.Desc{Addr: uint64(b.GPA), Len: b.Len, Flags: virtio.DescWrite}
}

// take takes the next free descriptor.
func (d *Driver) take() uint16 {
	id := d.free[d.freeHead&d.mask]
	d.freeHead++
	d.freeLen--
	return id
}

func (d *Driver) addDirect(readable, writable []Buf) {
	for i, n := 0, len(readable)+len(writable); i < n; i++ {
		desc := pick(readable, writable, i)
		id := d.take()
		if i+1 < n {
			desc.Flags |= virtio.DescNext
			desc.Next = d.free[d.freeHead&d.mask]
		}
		d.after[id] = desc.Next
		d.desc[id] = desc
	}
}

func (d *Driver) addIndirect(readable, writable []Buf) {
	id := d.take()
	n := len(readable) + len(writable)
	at, table := d.tableOf(id, n)
	for i := range table {
		desc := pick(readable, writable, i)
		if i+1 < n {
			desc.Flags |= virtio.DescNext
			desc.Next = uint16(i + 1)
		}
		table[i] = desc
	}
	d.desc[id] = virtio.Desc{Addr: at, Len: uint32(n * virtio.DescSize), Flags: virtio.DescIndirect}
}

// tableOf is the first n descriptors of the indirect table of id, and their guest address.
func (d *Driver) tableOf(id uint16, n int) (at uint64, table []virtio.Desc) {
	first := int(id) * d.tableLen
	return uint64(d.indirectAddr) + uint64(first)*virtio.DescSize, d.tables[first : first+n]
}

// Publish makes every chain added so far available to the device (virtio-v1.2 §2.7.13).
func (d *Driver) Publish() {
	if d.packed != nil {
		d.publishPacked()
		return
	}
	n := d.next - d.published
	if n == 0 {
		return
	}
	d.published = d.next
	d.storeWord()
	d.owed += uint32(n)
}

// NeedsKick reports whether the device wants to be notified of what was published since the last time it was asked
// (virtio-v1.2 §2.7.10.1).
func (d *Driver) NeedsKick() bool {
	n := d.owed
	if n == 0 {
		return false
	}
	d.owed = 0
	if d.packed != nil {
		return d.needsKickPacked(n)
	}
	if d.eventIdx {
		return crossed(d.availNotify.Load(), d.published, n)
	}
	return d.usedFlags.Load()&virtio.UsedNoNotify == 0
}

// Free is the number of free descriptors.
func (d *Driver) Free() int { return d.freeLen }

// Out is the number of chains that were added and not reaped.
func (d *Driver) Out() int { return int(d.next - d.reaped) }

// Size is the queue size in descriptors.
func (d *Driver) Size() int { return d.size }

// Err says what the device did wrong; Reap returns nothing from then on.
func (d *Driver) Err() error { return d.err }
