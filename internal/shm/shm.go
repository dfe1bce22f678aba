// Package shm is the one unsafe place of vhostd: typed views over memory that is shared with a guest, and the ordering rules
// for it. Nothing in it knows virtio.
//
// # Rules
//
// Memory behind a view may change at any moment: read a field once, into a local, and decide on the local. Plain loads and
// stores are ordered against each other only by the atomic operations between them: a load of a ring index (IndexWord.Load) comes
// before everything read after it, a store of one (StoreFence32) after everything written before it. A StoreFence, or Fence, orders a
// store before a later load too, which nothing weaker does: whoever publishes and then asks whether the other side wants to hear of it needs that.
//
// sync/atomic has no 16-bit type, and rings have 16-bit indices. An index is therefore loaded as part of the aligned 32-bit
// word that holds it (IndexWord); a word whose two halves both belong to one side is stored whole.
//
// The race detector does not see memory that Go did not allocate: tests that want it back a Mapping with the heap (Heap). Its atomic stores are no
// fences there.
package shm

import "sync/atomic"

// IndexWord is a 16-bit index in shared memory, little-endian, that the other side stores.
type IndexWord struct {
	word  *uint32
	shift uint8
}

// Load reads the index; what is read after it is at least as new as the index.
func (w IndexWord) Load() uint16 {
	return uint16(atomic.LoadUint32(w.word) >> w.shift)
}
