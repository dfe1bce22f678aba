package user

import (
	"encoding/binary"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/vhostd/vhostd/internal/sys"
)

// Bounds of one outbox. Connections share it, and each has a window of at most tcpBufferMax bytes on the way.
const (
	outboxBytes  = 8 << 20
	outboxFrames = 8192
)

// outbox holds the packets on their way to the guest on one receiveq. Any goroutine puts, the worker takes.
type outbox struct {
	wake *sys.EventFD

	mu       sync.Mutex
	waiting  []*stack.PacketBuffer // the first taken of them are gone
	taken    int
	bytes    int
	asleep   bool // the worker found nothing, and has to be signalled
	signaled bool
	closed   bool

	dropped atomic.Uint64
}

// put adds a packet, for which it takes a reference.
func (o *outbox) put(pkt *stack.PacketBuffer) bool {
	size := pkt.MemSize()
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed || len(o.waiting)-o.taken >= outboxFrames || o.bytes+size > outboxBytes {
		o.dropped.Add(1)
		return false
	}
	if len(o.waiting) == cap(o.waiting) && o.taken > len(o.waiting)/2 {
		n := copy(o.waiting, o.waiting[o.taken:])
		clear(o.waiting[n:])
		o.waiting, o.taken = o.waiting[:n], 0
	}
	o.waiting = append(o.waiting, pkt.IncRef())
	o.bytes += size
	if o.asleep {
		// Under the lock, so that a signal never comes after the Drain that should have taken it.
		o.asleep, o.signaled = false, true
		o.wake.Signal()
	}
	return true
}

// take moves packets, with their references, into batch. When there are none, the next put signals.
func (o *outbox) take(batch []*stack.PacketBuffer) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := copy(batch, o.waiting[o.taken:])
	for i := range n {
		o.bytes -= batch[i].MemSize()
		o.waiting[o.taken+i] = nil
	}
	if o.taken += n; o.taken == len(o.waiting) {
		o.waiting, o.taken = o.waiting[:0], 0
	}
	if n == 0 {
		if o.signaled {
			o.wake.Drain()
			o.signaled = false
		}
		o.asleep = true
	}
	return n
}

// flush drops everything.
func (o *outbox) flush() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.flushLocked()
}

func (o *outbox) flushLocked() {
	for _, pkt := range o.waiting[o.taken:] {
		pkt.DecRef()
		o.dropped.Add(1)
	}
	clear(o.waiting)
	o.waiting, o.taken, o.bytes = o.waiting[:0], 0, 0
}

func (o *outbox) close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.flushLocked()
	o.closed = true
	return o.wake.Close()
}

// outboxes are those of all pairs; the first inUse get packets.
type outboxes struct {
	boxes [maxPairs]outbox
	inUse atomic.Int32
}

// put steers a packet by the hash of its flow. With no pair in use there is no guest, and it is lost.
func (o *outboxes) put(pkt *stack.PacketBuffer) bool {
	switch n := uint32(o.inUse.Load()); n {
	case 0:
		return true
	case 1:
		return o.boxes[0].put(pkt)
	default:
		return o.boxes[flowHash(pkt)%n].put(pkt)
	}
}

// setInUse sets the number of pairs in use, and drops what waits on the others.
func (o *outboxes) setInUse(n int) {
	o.inUse.Store(int32(n))
	for i := n; i < maxPairs; i++ {
		o.boxes[i].flush()
	}
}

func (o *outboxes) open() error {
	for i := range o.boxes {
		fd, err := sys.NewEventFD()
		if err != nil {
			return err
		}
		o.boxes[i].wake = fd
	}
	return nil
}

func (o *outboxes) close() (err error) {
	for i := range o.boxes {
		if o.boxes[i].wake == nil {
			continue
		}
		if e := o.boxes[i].close(); e != nil {
			err = e
		}
	}
	return err
}

// flowHash is the same for all packets of a connection to the guest. Fragments but the first go by their addresses alone, and so do all
// datagrams that are cut, since no packet of such a one carries a transport header that the stack knows of.
func flowHash(pkt *stack.PacketBuffer) uint32 {
	const prime = 0x9e3779b1
	h := uint32(pkt.TransportProtocolNumber)
	ip := pkt.NetworkHeader().Slice()
	switch pkt.NetworkProtocolNumber {
	case header.IPv4ProtocolNumber:
		h = mix(h, ip[12:20])
	case header.IPv6ProtocolNumber:
		h = mix(h, ip[8:40])
	default:
		return 0
	}
	if t := pkt.TransportHeader().Slice(); len(t) >= 4 {
		h = mix(h, t[:4])
	}
	h *= prime
	return h ^ h>>15
}

// mix takes in b, of a length that 4 divides.
func mix(h uint32, b []byte) uint32 {
	const prime = 0x85ebca6b
	for ; len(b) >= 4; b = b[4:] {
		h = (h ^ binary.NativeEndian.Uint32(b)) * prime
		h ^= h >> 13
	}
	return h
}
