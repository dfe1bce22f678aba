// Package guestmem is the guest's RAM as the front-end shares it: regions, translation of guest addresses to memory, pins that keep
// a region mapped while a buffer in it is in flight, and the hook for the dirty log.
//
// # Theory of operation
//
// A Table is an immutable list of regions. A change of the memory map (SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG) makes a new Table
// that shares the unchanged regions with the old one:
//
//	Table 1: [region A] [region B]        pinned by queue 0's Window: frames in flight
//	Table 2: [region A]            [region C]      current
//
// A Table is born with one pin, its owner's. Whoever keeps slices of its memory across a point where the owner may change
// (a transmit Window with frames in flight) holds a pin of its own. When the last pin of a Table goes, it drops its regions; a
// region is unmapped when the last Table that holds it drops it. So memory under a buffer is never unmapped before its last
// reference goes, and nothing is counted per packet: a queue pins once per Table, not once per buffer.
//
// Host memory is only ever a []byte that ends where the region ends. Translation goes through a View, which belongs to one queue
// and remembers the region of its last hit.
package guestmem

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/vhostd/vhostd/internal/shm"
)

// GPA is a guest-physical address, as the driver writes into descriptors.
type GPA uint64

// UVA is an address in the front-end's own address space, as it names rings in SET_VRING_ADDR.
type UVA uint64

// MaxRegions is the most regions a Table holds: KVM's limit of memory slots less the few that QEMU keeps, as every back-end answers
// GET_MAX_MEM_SLOTS.
const MaxRegions = 509

// Region is a range of guest RAM, mapped. It never changes after it was made.
type Region struct {
	Guest  GPA    // first guest-physical address
	User   UVA    // the same byte in the front-end's address space
	Size   uint64 // bytes
	mem    *shm.Mapping
	tables atomic.Int32 // tables that hold it
}

// NewRegion maps size bytes at offset off of the file fd as the guest memory at guest. The fd may be closed afterwards.
func NewRegion(fd int, off uint64, guest GPA, user UVA, size uint64) (*Region, error) {
	if err := checkRange(guest, user, size); err != nil {
		return nil, err
	}
	m, err := shm.Map(fd, off, size)
	if err != nil {
		return nil, fmt.Errorf("region at %#x: %w", uint64(guest), err)
	}
	return &Region{Guest: guest, User: user, Size: size, mem: m}, nil
}

// NewHeapRegion returns a region backed by Go's heap, for tests that want the race detector to see guest memory.
func NewHeapRegion(guest GPA, user UVA, size int) (*Region, error) {
	return NewHeapRegionOf(guest, user, shm.Heap(size).Bytes)
}

// NewHeapRegionOf is NewHeapRegion for memory that is there already.
func NewHeapRegionOf(guest GPA, user UVA, b []byte) (*Region, error) {
	if err := checkRange(guest, user, uint64(len(b))); err != nil {
		return nil, err
	}
	return &Region{Guest: guest, User: user, Size: uint64(len(b)), mem: shm.HeapOf(b)}, nil
}

func checkRange(guest GPA, user UVA, size uint64) error {
	switch {
	case size == 0:
		return fmt.Errorf("region at %#x has size 0", uint64(guest))
	case size > 1<<62:
		return fmt.Errorf("region at %#x has size %#x", uint64(guest), size)
	case uint64(guest)+size < size:
		return fmt.Errorf("region at guest address %#x, size %#x wraps", uint64(guest), size)
	case uint64(user)+size < size:
		return fmt.Errorf("region at user address %#x, size %#x wraps", uint64(user), size)
	}
	return nil
}

// Same reports whether r and o are the same memory at the same addresses.
func (r *Region) Same(o *Region) bool {
	return r.Guest == o.Guest && r.User == o.User && r.Size == o.Size && r.mem.Same(o.mem)
}

// Discard unmaps a region that no Table ever held. It panics when one does.
func (r *Region) Discard() {
	if r.tables.Load() != 0 {
		panic("bug: discarding a region that a table holds")
	}
	_ = r.mem.Unmap()
}

// Own says who is to blame when the region's memory faults (see shm.Fault), until it is unmapped. It is called once at most.
func (r *Region) Own(o shm.Owner) { r.mem.Own(o) }

// Bytes is the region's memory.
func (r *Region) Bytes() []byte { return r.mem.Bytes }

// ErrOverlap is returned for regions that overlap each other in guest or in user addresses.
var ErrOverlap = errors.New("memory regions overlap")

// Table is an immutable set of regions; see the package comment.
type Table struct {
	regions []*Region // sorted by Guest
	pins    atomic.Int64
}

// NewTable makes a Table of regions, which may be shared with other Tables, with one pin. On error no region is held by it.
func NewTable(regions ...*Region) (*Table, error) {
	if len(regions) > MaxRegions {
		return nil, fmt.Errorf("%d memory regions, at most %d", len(regions), MaxRegions)
	}
	sorted := slices.Clone(regions)
	slices.SortFunc(sorted, func(a, b *Region) int { return compare(a.Guest, b.Guest) })
	for i := 1; i < len(sorted); i++ {
		if a, b := sorted[i-1], sorted[i]; uint64(b.Guest-a.Guest) < a.Size {
			return nil, fmt.Errorf("%w: guest addresses %#x+%#x and %#x", ErrOverlap, uint64(a.Guest), a.Size, uint64(b.Guest))
		}
	}
	byUser := slices.Clone(sorted)
	slices.SortFunc(byUser, func(a, b *Region) int { return compare(a.User, b.User) })
	for i := 1; i < len(byUser); i++ {
		if a, b := byUser[i-1], byUser[i]; uint64(b.User-a.User) < a.Size {
			return nil, fmt.Errorf("%w: user addresses %#x+%#x and %#x", ErrOverlap, uint64(a.User), a.Size, uint64(b.User))
		}
	}
	t := &Table{regions: sorted}
	t.pins.Store(1)
	for _, r := range sorted {
		if r.tables.Add(1) == 1 && r.mem.Bytes == nil {
			panic("bug: a table of a region that was unmapped")
		}
	}
	return t, nil
}

func compare[T GPA | UVA](a, b T) int {
	if a < b {
		return -1
	}
	if a > b {
		return 1
	}
	return 0
}

// Regions returns the table's regions in the order of their guest addresses. The caller must not change the slice.
func (t *Table) Regions() []*Region { return t.regions }

// Pin keeps the table's memory mapped until Unpin. Only a holder of a pin may take another.
func (t *Table) Pin() {
	if t.pins.Add(1) <= 1 {
		panic("bug: pinning a table of guest memory that was released")
	}
}

// Unpin gives up a pin; the last one drops the table's regions, and with them the mappings that no other table holds.
func (t *Table) Unpin() {
	switch n := t.pins.Add(-1); {
	case n > 0:
		return
	case n < 0:
		panic("bug: a table of guest memory was released twice")
	}
	for _, r := range t.regions {
		if r.tables.Add(-1) == 0 {
			_ = r.mem.Unmap()
		}
	}
}

// Pins is the number of pins, the owner's included.
func (t *Table) Pins() int { return int(t.pins.Load()) }

// Slice returns the n bytes of guest memory at a, or nil when they do not lie within one region.
func (t *Table) Slice(a GPA, n uint64) []byte {
	r := t.find(a)
	if r == nil {
		return nil
	}
	return sub(r.mem.Bytes, uint64(a-r.Guest), n)
}

// UserSlice is Slice for an address in the front-end's address space.
func (t *Table) UserSlice(a UVA, n uint64) []byte {
	for _, r := range t.regions {
		if off := uint64(a - r.User); off < r.Size {
			return sub(r.mem.Bytes, off, n)
		}
	}
	return nil
}

func sub(b []byte, off, n uint64) []byte {
	if n > uint64(len(b))-off {
		return nil
	}
	return b[off : off+n : off+n]
}

// find returns the region that holds a.
func (t *Table) find(a GPA) *Region {
	i, ok := slices.BinarySearchFunc(t.regions, a, func(r *Region, a GPA) int { return compare(r.Guest, a) })
	if ok {
		return t.regions[i]
	}
	if i == 0 || uint64(a-t.regions[i-1].Guest) >= t.regions[i-1].Size {
		return nil
	}
	return t.regions[i-1]
}
