// Package zerocopy is the contract between guest pages and devices: a Buffer carries a frame whose fragments are guest pages and a
// Ubuf that says who wants them back; a Window keeps the used ring of a transmitq in order; Posted is the guest's receive buffers.
//
// # Theory of operation
//
// Transmit, one Window per transmitq:
//
//	available ring --Pop--> [slot 3][slot 4][slot 5][slot 6] --Send--> device
//	                          done    out     done    out
//	                           ^ tail                   ^ head
//	used ring <--Reap-- up to the first slot that is still out
//
// Slots are taken in the order in which chains are popped, whether the frame will be copied or not. Releases land in any order and on
// any goroutine; they only mark the slot. Reap, called by the queue's worker, writes used elements in slot order and stops at
// the first slot that is out. So every chain is returned exactly once and in order (which lets VIRTIO_F_IN_ORDER be offered), and
// only the worker ever touches the ring.
//
// A release by somebody else than the worker wakes it when it sleeps (Wake), so a guest that has gone quiet still gets its buffers
// back. The Window pins the memory table under every slot that is out: see SetView.
package zerocopy

import (
	"runtime"
	"sync/atomic"
	"time"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// State of a slot. The worker takes a free slot and frees a done one; whoever releases the buffer last moves it from out to done.
const (
	slotFree uint32 = iota
	slotOut
	slotBad     // done: the chain was malformed, nothing was sent
	slotGivenUp // the used element was written at the drain's deadline although the device still holds the pages
	slotDone    // done: plus the Outcome
)

type slot struct {
	// state is stored plainly by the worker while the slot is its own, and by sync/atomic from the hand-over to a device on.
	state uint32
	buf   *Buffer // nil when the last one left with its holder (Orphan)
}

// keepSegs is how many segments a slot keeps memory for: a guest that sends ever longer chains must not make every slot grow for good.
const keepSegs = 64

// tablePin is a memory table that slots before a cursor may point into.
type tablePin struct {
	table *guestmem.Table
	until uint64 // pinned until tail reaches it
}

// WindowStats are the counters of a transmitq (contract line 14). They are the worker's to write.
type WindowStats struct {
	Frames     [NumOutcomes]uint64 // by what became of them
	Bytes      uint64              // of all frames, without virtio-net headers
	Malformed  uint64              // chains that carried no frame
	GivenUp    uint64              // used elements written while the device still held the pages
	MaxPending int                 // most slots taken at once
	MaxWait    time.Duration       // longest time that the used ring waited for one slot, which has come; see LongestWait
}

// Window keeps the order of a transmitq's used ring; see the package comment. All methods are the worker's own; the release of a
// Buffer may come from anywhere.
type Window struct {
	ring       *vring.Device
	slots      []slot
	chains     []vring.Chain // of the slots
	mask       uint64
	head, tail uint64 // cursors: slots [tail, head) are taken
	hdrLen     int
	Stats      WindowStats

	blocked      uint64 // the slot that Reap stopped at, plus one; 0 for none
	blockedSince time.Time

	table *guestmem.Table // pinned, as are older
	older []tablePin

	wake     func()
	sleeping atomic.Bool
	late     atomic.Int64 // slots given up that the device still holds, plus one until Close
	closed   bool         // by Close or Abandon
}

// NewWindow returns a Window over ring, whose frames start with the header that the features f imply. wake is called from the
// goroutine that releases a buffer while the worker sleeps. The Window pins the ring's memory table until Close.
func NewWindow(ring *vring.Device, f virtio.Features, wake func()) *Window {
	n := vring.Slots(ring.Size())
	w := &Window{
		ring: ring, slots: make([]slot, n), chains: make([]vring.Chain, n), mask: uint64(n - 1), hdrLen: virtio.NetHdrLen(f),
		table: ring.View().Table(), wake: wake,
	}
	w.table.Pin()
	w.late.Store(1)
	const inline = 4 // segments that a chain holds before it has to grow: a header's, and what most frames need
	segs := make([]vring.Seg, n*inline)
	bufs := make([]Buffer, n)
	for i := range w.slots {
		w.chains[i].Segs = segs[i*inline : i*inline : (i+1)*inline]
		w.slots[i].buf = &bufs[i]
	}
	return w
}

// Pending is the number of slots that are taken: chains popped and not yet returned.
func (w *Window) Pending() int { return int(w.head - w.tail) }

// Pop takes frames from the ring and fills batch with up to len(batch) of them. Chains that carry no frame are returned in their turn
// and do not show, but count. The status is Popped when the ring may hold more, Empty when it does not, Broken when it is broken.
func (w *Window) Pop(batch []*Buffer) (n int, status vring.Status) {
	if w.head == w.tail {
		// Nothing is out: start again at slot 0, so that a device that is done at once keeps to the slots that are in the cache.
		w.head, w.tail = 0, 0
	}
	status = vring.Popped
	for limit := len(batch); limit > 0 && w.Pending() < len(w.slots); {
		at := int(w.head & w.mask)
		run := w.ring.PopRun(w.chains[at:min(at+min(limit, len(w.slots)-w.Pending()), len(w.chains))])
		if run == 0 {
			s := w.ring.Pop(&w.chains[at])
			if s == vring.Empty || s == vring.Broken {
				status = s
				break
			}
			run = 1
		}
		limit -= run
		n += w.loadRun(batch[n:], run)
	}
	w.Stats.MaxPending = max(w.Stats.MaxPending, w.Pending())
	return n, status
}

// loadRun takes slots for n chains that were popped, and puts those that are frames into batch.
func (w *Window) loadRun(batch []*Buffer, n int) (frames int) {
	for range n {
		i := w.head & w.mask
		s := &w.slots[i]
		w.head++
		if !w.load(s, uint32(i)) {
			s.state = slotBad
			continue
		}
		batch[frames] = s.buf
		frames++
	}
	return frames
}

// minFrame is an Ethernet header: what is shorter is no frame.
const minFrame = 14

// load makes s.buf the frame of the chain in s. It reports false for a chain that holds no frame: too short, too long, or one that
// asks for something to be written (virtio-v1.2 §5.1.6.2: a transmitq's chains are device-readable).
func (w *Window) load(s *slot, i uint32) bool {
	c := &w.chains[i]
	n := int(c.ReadLen) - w.hdrLen
	if n < minFrame || n > virtio.MaxFrame || c.Readable != len(c.Segs) {
		return false
	}
	b := s.buf
	if b == nil {
		b = new(Buffer)
		s.buf = b
	}
	first := &c.Segs[0]
	switch {
	case len(first.Mem) > w.hdrLen:
		b.hdrSrc = first.Mem[:w.hdrLen:w.hdrLen]
		first.Mem, first.Addr = first.Mem[w.hdrLen:], first.Addr+guestmem.GPA(w.hdrLen)
		b.segs = c.Segs
	case len(first.Mem) == w.hdrLen:
		b.hdrSrc = first.Mem
		b.segs = c.Segs[1:]
	default:
		w.gatherHeader(b, c)
	}
	b.length = uint32(n)
	b.refs = 1
	b.window, b.ubuf.Desc = w, i
	if b.worst.Load() != 0 {
		b.worst.Store(0)
	}
	s.state = slotOut
	w.Stats.Bytes += uint64(n)
	return true
}

// gatherHeader reads a header that is spread over several segments, down to single bytes.
func (w *Window) gatherHeader(b *Buffer, c *vring.Chain) {
	var private [virtio.NetHdrSize]byte
	i := 0
	for n := 0; n < w.hdrLen; i++ {
		seg := &c.Segs[i]
		m := copy(private[n:w.hdrLen], seg.Mem)
		n += m
		if m < len(seg.Mem) {
			seg.Mem, seg.Addr = seg.Mem[m:], seg.Addr+guestmem.GPA(m)
			break
		}
	}
	b.hdrSrc = nil
	first, last := virtio.NetHdrWords(private[:w.hdrLen])
	b.first, b.last = virtio.NetHdrSent(first), last
	b.segs = c.Segs[i:]
}

// Undo gives the n frames that were popped last and that no device has taken back to the ring: they will be popped again, together
// with chains between them that turned out to carry no good frame.
func (w *Window) Undo(n int) {
	chains := 0
	for n > 0 {
		if w.head == w.tail {
			panic("bug: undoing more frames than are out")
		}
		w.head--
		chains++
		if s := &w.slots[w.head&w.mask]; atomic.LoadUint32(&s.state) == slotOut {
			s.buf.window, s.buf.refs = nil, 0
			w.Stats.Bytes -= uint64(s.buf.length)
			n--
		}
	}
	if w.blocked > w.head {
		w.blocked = 0 // the slot that was waited for is none any more
	}
	w.ring.Unpop(chains)
}

// Reap writes used elements for the slots that are done, in order, up to the first that is out, and returns how many. The caller
// publishes them.
func (w *Window) Reap() int {
	start := w.tail
	for w.tail != w.head {
		state := atomic.LoadUint32(&w.slots[w.tail&w.mask].state)
		if state == slotOut {
			w.block()
			break
		}
		w.retire(state)
	}
	if len(w.older) > 0 {
		w.unpinOlder()
	}
	return int(w.tail - start)
}

// retire returns the chain of the slot at tail.
func (w *Window) retire(state uint32) {
	if state >= slotDone {
		w.Stats.Frames[state-slotDone]++
	} else {
		w.Stats.Malformed++
	}
	if w.blocked != 0 {
		w.unblock()
	}
	i := w.tail & w.mask
	c := &w.chains[i]
	w.tail++ // first: guest memory may fault under Put
	if cap(c.Segs) > keepSegs {
		w.shrink(i)
	}
	w.ring.Put(c.Head, 0)
}

// shrink gives up the memory that a long chain took in slot i, which is done. The frame's fragments are the same memory as the chain's segments.
func (w *Window) shrink(i uint64) {
	w.chains[i].Segs = nil
	if b := w.slots[i].buf; b != nil {
		b.segs, b.bufs = nil, nil
	}
}

// block and unblock time how long the used ring waits for one slot.
func (w *Window) block() {
	if w.blocked != w.tail+1 {
		w.blocked, w.blockedSince = w.tail+1, time.Now()
	}
}

func (w *Window) unblock() {
	w.Stats.MaxWait = w.LongestWait()
	w.blocked = 0
}

// LongestWait is the longest time that the used ring has waited for one slot, the one that it waits for now included.
func (w *Window) LongestWait() time.Duration {
	if w.blocked == 0 {
		return w.Stats.MaxWait
	}
	return max(w.Stats.MaxWait, time.Since(w.blockedSince))
}

// SetTable says that the ring's View looks into a new memory table from now on. The old one stays pinned for as long as a slot taken
// under it is out.
func (w *Window) SetTable(t *guestmem.Table) {
	t.Pin()
	w.older = append(w.older, tablePin{table: w.table, until: w.head})
	w.table = t
	w.unpinOlder()
}

func (w *Window) unpinOlder() {
	for len(w.older) > 0 && (w.older[0].until <= w.tail || w.tail == w.head) {
		w.older[0].table.Unpin()
		w.older = w.older[1:]
	}
}

// Sleep announces that the worker is about to wait: from now on a release wakes it. The worker looks once more (Reap) after Sleep and before it
// waits, and calls Awake when it goes on.
func (w *Window) Sleep() { w.sleeping.Store(true) }

// Awake ends Sleep.
func (w *Window) Awake() { w.sleeping.Store(false) }

// complete marks a slot done, from any goroutine.
func (w *Window) complete(desc uint32, o Outcome) {
	state := &w.slots[desc].state
	if !atomic.CompareAndSwapUint32(state, slotOut, slotDone+uint32(o)) {
		w.completeLate(state)
		return
	}
	if w.sleeping.Load() && w.sleeping.CompareAndSwap(true, false) {
		w.wake()
	}
}

// completeLocal is complete for the worker itself: it does not sleep, and nobody else stores to a slot whose buffer it holds alone.
func (w *Window) completeLocal(desc uint32, o Outcome) {
	state := &w.slots[desc].state
	if *state != slotOut {
		w.completeLate(state)
		return
	}
	*state = slotDone + uint32(o)
}

// completeLate takes the release of a slot whose used element was written at the deadline.
func (w *Window) completeLate(state *uint32) {
	if !atomic.CompareAndSwapUint32(state, slotGivenUp, slotFree) {
		panic("bug: a slot of the window was completed twice")
	}
	w.unpinLate()
}

// unpinLate drops one of what keeps the memory of a closed Window: the last unpins it.
func (w *Window) unpinLate() {
	if w.late.Add(-1) > 0 {
		return
	}
	for _, p := range w.older {
		p.table.Unpin()
	}
	w.table.Unpin()
}

// Close ends the Window: used elements are written for every slot that is taken, those included that a device still holds (they count as
// GivenUp: a drain comes first), so that every chain is returned. The caller publishes them. The memory stays pinned until the
// last buffer that is still out has been released; the Window must not be used afterwards.
func (w *Window) Close() (givenUp int) {
	for w.tail != w.head {
		s := &w.slots[w.tail&w.mask]
		if !w.giveUp(s) {
			w.retire(atomic.LoadUint32(&s.state))
			continue
		}
		givenUp++
		if w.blocked != 0 {
			w.unblock()
		}
		head := w.chains[w.tail&w.mask].Head
		w.tail++
		w.ring.Put(head, 0)
	}
	w.closed = true
	w.unpinLate()
	return givenUp
}

// Abandon is Close for a ring whose memory can no longer be touched: nothing is returned. It may come after a Close that did not end, and
// does nothing after one that did. A fault can strike in the middle of Pop or Send, so nobody knows which buffers are in somebody's
// hands: the memory stays pinned until none of them is referenced any more, which is the garbage collector's to find out.
func (w *Window) Abandon() {
	if w.closed {
		return
	}
	w.closed = true
	for ; w.tail != w.head; w.tail++ {
		w.giveUp(&w.slots[w.tail&w.mask])
	}
	pinned := []*guestmem.Table{w.table}
	for _, p := range w.older {
		pinned = append(pinned, p.table)
	}
	runtime.AddCleanup(w, unpinAll, pinned)
}

func unpinAll(tables []*guestmem.Table) {
	for _, t := range tables {
		t.Unpin()
	}
}

// giveUp takes a slot from the device that still holds its buffer; it reports false when none does.
func (w *Window) giveUp(s *slot) bool {
	w.late.Add(1)
	if atomic.CompareAndSwapUint32(&s.state, slotOut, slotGivenUp) {
		w.Stats.GivenUp++
		return true
	}
	w.late.Add(-1) // never the last: Close's own is still counted
	return false
}
