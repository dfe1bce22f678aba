package shm

// Fence orders every earlier store before every later load, as seen by the other side of the shared memory. One is due between
// "ask for a notification" and "look once more", on both sides; a sequentially consistent store followed by an atomic load
// does the same where the store may be 32 bits wide.
//
//go:noescape
func Fence()

// StoreFence16 stores v at p as one 16-bit store, leaving the 16 bits beside it alone, and then does what Fence does. p must be
// 2-aligned. The race detector takes no notice of the store, so the other side may load it as an IndexWord in a race test; for
// the same reason it publishes nothing else.
//
//go:noescape
func StoreFence16(p *uint16, v uint16)
