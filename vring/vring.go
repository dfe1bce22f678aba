// Package vring is both ends of a virtqueue, split or packed: Device, which a back-end drives, and Driver, which a guest would drive. Both
// are real rings over guest memory; the driver end makes tests, benchmarks and load generators that need no guest.
//
// # Theory of operation
//
// A split virtqueue (virtio-v1.2 §2.7) is three pieces of guest memory. Each has one writer:
//
//	             driver writes                               device writes
//	desc    [addr len flags next] ...          used   flags idx [id len] [id len] ... avail_event
//	avail   flags idx [head] [head] ... used_event
//
//	          published  usedNext      next         avail (cached)      idx in the ring
//	avail ring   |----------|------------|--------------|------------------|
//	             | Put, not |  popped,   | can be       | made available   |
//	             | visible  |  not Put   | popped       | since we looked  |
//
// All indices run freely over 16 bits and are reduced to the queue size, a power of two, only where they touch a ring. Pop moves
// next, Put moves usedNext, Publish moves published. What lies between published and idx belongs to the device, and is never
// more than the queue size; Device checks that on every look at idx, so one bound serves both against an index that jumps and
// against a driver that reuses chains before it got them back.
//
// A packed virtqueue (§2.8) has the same methods; packed_ring.go tells what differs.
//
// # Ordering
//
//   - Device loads avail.idx (acquire) before it reads the entries below it; the load is repeated only when the cached value is
//     used up. Publish stores used.idx (release) after the entries below it were written.
//   - flags and idx of the used ring are one aligned 32-bit word with one writer, so one store publishes. It is sequentially
//     consistent: NeedsCall may load used_event after it without a further fence.
//   - EnableKick stores avail_event, a 16-bit field whose neighbour lies beyond the ring, then fences, then looks at avail.idx
//     again: either the driver sees the new avail_event, or the device sees the new index. The driver end mirrors this.
//
// # What a driver can do to us
//
// The driver may write anything at any time. Every field is read once, into a local, and decided on there. Work per Pop is bounded:
// a direct chain by the queue size, an indirect table by the larger of the queue size and MaxIndirect. A chain with a bad
// buffer, or with more than MaxSegs, is Malformed and goes back to the driver; a ring whose structure makes no sense is Broken for good, and Err says why.
//
// Neither end is safe for concurrent use; the two ends of one ring may of course run in two goroutines.
package vring

import "github.com/vhostd/vhostd/virtio"

// MaxIndirect is the least number of descriptors that an indirect table may have, whatever the queue size. A driver must not make a
// chain longer than the queue size (virtio-v1.2 §2.7.5.3.1), but Linux does for small queues. No driver goes beyond 1024 buffers,
// the limit that QEMU has always had.
const MaxIndirect = 1024

// MaxSegs is the most segments of a chain; one that has more is Malformed. A device may have such a limit (virtio-v1.2 §2.7.4.1). This
// one is IOV_MAX, so a chain always fits one system call; and it keeps a driver from making the host set memory aside for its
// chains that it would never need.
const MaxSegs = 1024

// crossed reports whether an index that advanced by n to now has passed event, that is, whether the side that set event wants to
// be notified (virtio-v1.2 §2.7.7.2, §2.7.10.1). An n of 1<<16 or more is always true: it went all the way round.
func crossed(event, now uint16, n uint32) bool {
	return uint32(now-event-1) < n
}

// Offsets in bytes within the available and used rings (virtio-v1.2 §2.7.6, §2.7.8).
const (
	offFlags   = 0
	offIdx     = 2
	offEntries = 4
)

// offUsedEvent is where the available ring of a queue of size n holds used_event.
func offUsedEvent(n int) int { return virtio.AvailLen(n) - 2 }

// offAvailEvent is where the used ring of a queue of size n holds avail_event.
func offAvailEvent(n int) int { return virtio.UsedLen(n) - 2 }
