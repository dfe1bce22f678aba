package vhosttest

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// Piece is a descriptor to be, for Queue.Driver.Add.
type Piece = vring.Buf

type piece = Piece

// Queue is a virtqueue, seen from the guest.
type Queue struct {
	Index           int // as in vhost-user
	Driver          *vring.Driver
	Base            uint16 // that Start sends; of a packed ring, for used descriptors as well
	Kick, Call, Err *sys.EventFD

	g           *Guest
	desc, avail guestmem.GPA
	used        guestmem.GPA
	tables      guestmem.GPA
	slots       []guestmem.GPA // a buffer each
	free        []uint16       // slots that are not out
	slotOf      []uint16       // by head
	cut         []piece
	hdrLen      int
}

// ErrTimeout says that nothing came.
var ErrTimeout = errors.New("timed out")

func newQueue(g *Guest, index int) *Queue {
	g.t.Helper()
	n := g.opts.QueueSize
	m := g.Mem
	q := &Queue{
		g: g, Index: index, hdrLen: virtio.NetHdrLen(g.Features),
		desc: m.Alloc(virtio.DescTableLen(n), virtio.DescAlign), avail: m.Alloc(virtio.AvailLen(n), 4), used: m.Alloc(virtio.UsedLen(n), 4),
		slotOf: make([]uint16, n),
	}
	if g.Features.Has(virtio.FIndirectDesc) && !g.opts.Direct {
		q.tables = m.Alloc(n*indirectLen*virtio.DescSize, virtio.DescAlign)
	}
	for range n {
		q.slots = append(q.slots, m.Alloc(q.slotSize(), 8))
	}
	for _, fd := range []**sys.EventFD{&q.Kick, &q.Call, &q.Err} {
		var err error
		*fd, err = sys.NewEventFD()
		g.must("eventfd", err)
	}
	start := uint16(StartIndex)
	switch {
	case g.opts.AtZero:
		start = q.zero()
	case g.opts.Packed:
		start = packedStart | uint16(n-min(n, 16))
	}
	q.reset(start)
	return q
}

// packedStart is the wrap counter of a packed ring's first lap, at index 0.
const packedStart = 1 << 15

// zero is where a real driver's rings start.
func (q *Queue) zero() uint16 {
	if q.g.opts.Packed {
		return packedStart
	}
	return 0
}

// base is what SET_VRING_BASE says for Base.
func (q *Queue) base() uint32 {
	if q.g.opts.Packed {
		return uint32(q.Base)<<16 | uint32(q.Base)
	}
	return uint32(q.Base)
}

// Transmit tells a transmitq from a receiveq.
func (q *Queue) Transmit() bool { return q.Index%2 == 1 }

func (q *Queue) slotSize() int {
	if q.Transmit() {
		return q.g.opts.SendSize
	}
	return q.g.opts.RecvSize
}

// Reset gives the queue a fresh driver, whose rings start at index base: what the old one had out is forgotten.
func (q *Queue) Reset(base uint16) { q.reset(base) }

func (q *Queue) reset(base uint16) {
	n, m := q.g.opts.QueueSize, q.g.Mem
	cfg := vring.DriverConfig{
		Size: n, Features: q.g.Features, Base: base,
		Desc: m.At(q.desc, virtio.DescTableLen(n)), Avail: m.At(q.avail, virtio.AvailLen(n)), Used: m.At(q.used, virtio.UsedLen(n)),
	}
	if q.g.Features.Has(virtio.FIndirectDesc) && !q.g.opts.Direct {
		size := n * indirectLen * virtio.DescSize
		cfg.Indirect, cfg.IndirectAddr, cfg.IndirectLen = m.At(q.tables, size), q.tables, indirectLen
	}
	d, err := vring.NewDriver(cfg)
	if err != nil {
		panic(fmt.Sprintf("driver of queue %d: %v", q.Index, err))
	}
	q.Driver, q.Base = d, base
	q.free = q.free[:0]
	for i := n - 1; i >= 0; i-- {
		q.free = append(q.free, uint16(i))
	}
}

func (q *Queue) close() {
	for _, fd := range []*sys.EventFD{q.Kick, q.Call, q.Err} {
		_ = fd.Close()
	}
}

// Addr is what SET_VRING_ADDR says of the queue.
func (q *Queue) Addr() vhostuser.VringAddr {
	m := q.g.Mem
	return vhostuser.VringAddr{Index: uint32(q.Index), Desc: m.User(q.desc), Avail: m.User(q.avail), Used: m.User(q.used)}
}

// Start starts the queue at Base and enables it, if the options do not say otherwise.
func (q *Queue) Start() {
	q.g.t.Helper()
	fe, i := q.g.FE, uint32(q.Index)
	kick := q.Kick.FD()
	if q.g.opts.Polled {
		kick = -1
	}
	q.g.must("SET_VRING_NUM", fe.SetVringNum(i, uint32(q.g.opts.QueueSize)))
	q.g.must("SET_VRING_BASE", fe.SetVringBase(i, q.base()))
	q.g.must("SET_VRING_ADDR", fe.SetVringAddr(q.Addr()))
	q.g.must("SET_VRING_ERR", fe.SetVringErr(i, q.Err.FD()))
	q.g.must("SET_VRING_CALL", fe.SetVringCall(i, q.Call.FD()))
	q.g.must("SET_VRING_KICK", fe.SetVringKick(i, kick))
	if !q.g.opts.NoProtocol && !q.g.opts.Disabled {
		q.Enable(true) // last, as QEMU does
	}
	q.g.Barrier()
}

// Enable enables or disables the queue.
func (q *Queue) Enable(on bool) {
	q.g.t.Helper()
	q.g.must("SET_VRING_ENABLE", q.g.FE.SetVringEnable(uint32(q.Index), on))
}

// Stop stops the queue with GET_VRING_BASE and keeps the base.
func (q *Queue) Stop() {
	q.g.t.Helper()
	base, err := q.g.FE.GetVringBase(uint32(q.Index))
	q.g.must("GET_VRING_BASE", err)
	if q.Base = uint16(base); base != q.base() {
		q.g.t.Errorf("queue %d: base %#x: chains were kept", q.Index, base)
	}
}

// Flush publishes what was added and kicks if the device wants that.
func (q *Queue) Flush() {
	q.Driver.Publish()
	if q.Driver.NeedsKick() {
		q.Kick.Signal()
	}
}

// Wait waits up to timeout until there is something to reap, asleep. ErrTimeout says that there is nothing.
func (q *Queue) Wait(timeout time.Duration) error {
	deadline := time.Now().Add(timeout)
	for !q.Driver.EnableCall() {
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("queue %d: %w after %v", q.Index, ErrTimeout, timeout)
		}
		p := []unix.PollFd{{Fd: int32(q.Call.FD()), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, int(left/time.Millisecond)+1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("queue %d: waiting for a call: %w", q.Index, err)
		}
		q.Call.Drain()
	}
	q.Driver.DisableCall()
	return q.Driver.Err()
}

// slot takes a free slot; ok is false when all are out.
func (q *Queue) slot() (s uint16, ok bool) {
	if len(q.free) == 0 {
		return 0, false
	}
	return q.free[len(q.free)-1], true
}

// add adds the first n bytes of slot s, which was the last of the free ones, as a chain.
func (q *Queue) add(s uint16, n int, l Layout) (uint16, error) {
	q.cut = l.cut(q.cut[:0], q.slots[s], n)
	var id uint16
	var err error
	if q.Transmit() {
		id, err = q.Driver.Add(q.cut, nil)
	} else {
		id, err = q.Driver.Add(nil, q.cut)
	}
	if err != nil {
		return 0, err
	}
	q.free = q.free[:len(q.free)-1]
	q.slotOf[id] = s
	return id, nil
}

// reap takes back one chain and returns its slot, which is free from now on, and how much was written.
func (q *Queue) reap() (s uint16, written uint32, ok bool) {
	id, written, ok := q.Driver.Reap()
	if !ok {
		return 0, 0, false
	}
	s = q.slotOf[id]
	q.free = append(q.free, s)
	return s, written, true
}
