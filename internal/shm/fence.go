package shm

// Fence orders every earlier store before every later load, as seen by the other side of the shared memory. One is due between
// "ask for a notification" and "look once more", on both sides; a sequentially consistent store followed by an atomic load
// does the same where the store may be 32 bits wide.
//
//go:noescape
func Fence()
