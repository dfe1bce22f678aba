//go:build race

package shm

import "sync/atomic"

// StoreFence32 stores v at p and then does what Fence does. The race detector's stores to memory that Go did not allocate release and no more: a
// load behind one may be done before it. A kick was lost to that: the driver did not see that it was asked for, the device not the chain.
func StoreFence32(p *uint32, v uint32) {
	atomic.StoreUint32(p, v)
	Fence()
}

// StoreFence64 is StoreFence32 for 64 bits.
func StoreFence64(p *uint64, v uint64) {
	atomic.StoreUint64(p, v)
	Fence()
}
