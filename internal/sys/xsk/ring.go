package xsk

import (
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/shm"
)

// ring is what both kinds have in common. The words lie in memory that is shared with the kernel.
type ring[T any] struct {
	producer *uint32 // stored by whoever fills the ring
	consumer *uint32 // stored by whoever empties it
	flags    *uint32 // stored by the kernel
	entries  []T
	mask     uint32
}

// Producer is a ring that the caller fills and the kernel empties.
type Producer[T any] struct {
	ring[T]
	next  uint32 // entry to write next
	limit uint32 // entries before it are free, when last looked at
}

// Free is the number of entries that can be added, at least: the kernel's progress is looked at when fewer than want are known of.
func (p *Producer[T]) Free(want int) int {
	if int(p.limit-p.next) < want {
		p.limit = atomic.LoadUint32(p.consumer) + uint32(len(p.entries))
	}
	return int(p.limit - p.next)
}

// Add writes an entry that the kernel cannot see yet. One must be free.
func (p *Producer[T]) Add(v T) {
	p.entries[p.next&p.mask] = v
	p.next++
}

// Publish lets the kernel see what was added.
func (p *Producer[T]) Publish() { shm.StoreFence32(p.producer, p.next) }

// Waiting is the number of entries that the kernel has not taken.
func (p *Producer[T]) Waiting() int { return int(p.next - atomic.LoadUint32(p.consumer)) }

// Taken is how many entries the kernel has taken since the ring was made, modulo 1<<32.
func (p *Producer[T]) Taken() uint32 { return atomic.LoadUint32(p.consumer) }

// NeedsWakeup reports whether the kernel looks at the ring only when it is told to.
func (p *Producer[T]) NeedsWakeup() bool {
	return atomic.LoadUint32(p.flags)&unix.XDP_RING_NEED_WAKEUP != 0
}

// Consumer is a ring that the kernel fills and the caller empties.
type Consumer[T any] struct {
	ring[T]
	next uint32 // entry to read next
	end  uint32 // entries before it are there, when last looked at
}

// Len is the number of entries that are there: the kernel's progress is looked at when none are known of.
func (c *Consumer[T]) Len() int {
	if c.end == c.next {
		c.end = atomic.LoadUint32(c.producer)
	}
	return int(c.end - c.next)
}

// More looks at the kernel's progress and returns what Len is then.
func (c *Consumer[T]) More() int {
	c.end = atomic.LoadUint32(c.producer)
	return int(c.end - c.next)
}

// At is entry i of those that are there, from 0.
func (c *Consumer[T]) At(i int) T { return c.entries[(c.next+uint32(i))&c.mask] }

// Release gives the first n entries back to the kernel.
func (c *Consumer[T]) Release(n int) {
	c.next += uint32(n)
	shm.StoreFence32(c.consumer, c.next)
}

// mapRing maps a ring of n entries of type T, and sets r to it.
func mapRing[T any](s *Socket, r *ring[T], n, size int, at int64, off unix.XDPRingOffset) error {
	m, err := unix.Mmap(s.fd, at, int(off.Desc)+n*size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("mapping a ring of %d entries: %w", n, err)
	}
	s.maps = append(s.maps, m)
	if r.entries, err = shm.View[T](m[off.Desc:], n); err != nil {
		return err
	}
	r.mask = uint32(n - 1)
	for _, w := range []struct {
		to  **uint32
		off uint64
	}{{&r.producer, off.Producer}, {&r.consumer, off.Consumer}, {&r.flags, off.Flags}} {
		if *w.to, err = shm.Word(m, int(w.off)); err != nil {
			return err
		}
	}
	return nil
}

// Bytes of the entries.
const (
	addrSize = 8
	descSize = 16
)

func (s *Socket) mapRings(c Config) error {
	off, err := mmapOffsets(s.fd)
	if err != nil {
		return fmt.Errorf("layout of the rings: %w", err)
	}
	if err := mapRing(s, &s.Fill.ring, c.Fill, addrSize, unix.XDP_UMEM_PGOFF_FILL_RING, off.Fr); err != nil {
		return err
	}
	if err := mapRing(s, &s.Done.ring, c.Done, addrSize, unix.XDP_UMEM_PGOFF_COMPLETION_RING, off.Cr); err != nil {
		return err
	}
	if err := mapRing(s, &s.Rx.ring, c.Rx, descSize, unix.XDP_PGOFF_RX_RING, off.Rx); err != nil {
		return err
	}
	return mapRing(s, &s.Tx.ring, c.Tx, descSize, unix.XDP_PGOFF_TX_RING, off.Tx)
}
