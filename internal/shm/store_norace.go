//go:build !race

package shm

import "sync/atomic"

// StoreFence32 stores v at p and then does what Fence does: sync/atomic's stores are sequentially consistent.
func StoreFence32(p *uint32, v uint32) { atomic.StoreUint32(p, v) }

// StoreFence64 is StoreFence32 for 64 bits.
func StoreFence64(p *uint64, v uint64) { atomic.StoreUint64(p, v) }
