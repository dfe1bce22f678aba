package vring

import (
	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
)

// Seg is a piece of guest memory that a descriptor names, translated: never empty, and never longer than its memory region.
type Seg struct {
	Mem  []byte
	Addr guestmem.GPA // of Mem[0], for the dirty log
}

// Chain is a descriptor chain that was popped from the available ring, with every descriptor read once, validated and translated.
// Its owner keeps it for reuse: Pop overwrites Segs from the start and grows it when it must.
type Chain struct {
	Segs     []Seg  // device-readable segments, then device-writable ones
	Readable int    // how many of Segs are device-readable
	ReadLen  uint32 // bytes in the device-readable segments
	WriteLen uint32 // bytes in the device-writable segments
	Head     uint16 // what the used ring entry names
	Descs    uint16 // descriptors of the ring that it takes: an indirect table is one
}

// Prefetch asks for the first n bytes of the first segment, which is device-writable.
func (c *Chain) Prefetch(n int) { shm.PrefetchWrite(c.Segs[0].Mem[:min(n, len(c.Segs[0].Mem))]) }

// Status is the outcome of Pop. Empty, malformed and broken are different things: an empty ring is waited on, a malformed chain is
// returned to the driver unused, a broken ring is stopped.
type Status uint8

const (
	// Empty: the driver has made nothing available.
	Empty Status = iota
	// Popped: the chain is good.
	Popped
	// Malformed: the chain is to be returned with used length 0 (Chain.Head is valid, Segs is empty); the ring goes on.
	Malformed
	// Broken: the ring itself makes no sense (Err says why). Nothing was popped, and nothing ever will be.
	Broken
)

func (s Status) String() string {
	return [...]string{"empty", "popped", "malformed", "broken"}[s]
}
