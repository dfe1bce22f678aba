package soft

import (
	"math"
	"sync/atomic"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/zerocopy"
)

// batchSize is how many children are made before the inner device is called.
const batchSize = 64

// queue lowers the frames for the Queue within. All of it belongs to the transmitq's worker, but for the counter and the pool's return.
type queue struct {
	netdev.Queue
	takes   offload.Set // of the inner device
	seg     offload.Segmenter
	parent  *zerocopy.Buffer   // the frame that is being cut; nil when none is
	waiting []*zerocopy.Buffer // children that the inner device has not taken; never empty while parent is not nil, between calls
	pool    *pool
	making  *child // of the pool, for the next segment; nil until it is needed
	dropped atomic.Uint64
}

// Send implements netdev.Queue.
func (q *queue) Send(bufs []*zerocopy.Buffer) (n int) {
	if !q.flush() {
		return 0
	}
	for n < len(bufs) {
		if run := q.whole(bufs[n:]); run > 0 {
			sent := q.Queue.Send(bufs[n : n+run])
			n += sent
			if sent < run {
				return n
			}
			continue
		}
		n += q.begin(bufs[n:])
		if !q.flush() {
			return n
		}
	}
	return n
}

// whole is the number of frames at the start of bufs that the inner device takes as they are.
func (q *queue) whole(bufs []*zerocopy.Buffer) int {
	for i, b := range bufs {
		if !q.takesIt(b) {
			return i
		}
	}
	return len(bufs)
}

// takesIt tells whether the inner device takes a frame as it is.
func (q *queue) takesIt(b *zerocopy.Buffer) bool {
	first, _ := b.HeaderWords()
	return q.takes.TakesWords(first)
}

// begin makes children of frames that the inner device does not take, until there is a batch of them, and returns how many frames it took.
func (q *queue) begin(bufs []*zerocopy.Buffer) int {
	for i, b := range bufs {
		if q.parent != nil || len(q.waiting) == batchSize || q.takesIt(b) {
			return i
		}
		if err := q.seg.Start(b.Header(), b.Frags(), q.takes); err != nil {
			q.dropped.Add(1)
			b.Release(zerocopy.Dropped)
			continue
		}
		q.parent = b
		q.fill(batchSize)
	}
	return len(bufs)
}

// fill makes children until limit of them wait, or the frame is done.
func (q *queue) fill(limit int) {
	for q.parent != nil && len(q.waiting) < limit {
		if q.making == nil {
			q.making = q.pool.get()
		}
		c := q.making
		hdr, n, payload, ok := q.seg.Next(c.head[:])
		if !ok {
			q.finish(zerocopy.ZeroCopied) // it is the children that say what became of the pages
			return
		}
		q.making = nil
		q.parent.Retain()
		c.carry(q.parent, hdr, n, payload)
		q.waiting = append(q.waiting, &c.buf)
	}
}

// finish gives up the queue's own reference of the frame that is being cut.
func (q *queue) finish(o zerocopy.Outcome) {
	p := q.parent
	q.parent = nil
	p.Release(o)
}

// flush hands the children that wait to the inner device, and reports whether it took all that there will be.
func (q *queue) flush() bool {
	for len(q.waiting) > 0 {
		n := q.Queue.Send(q.waiting)
		if n < len(q.waiting) {
			q.waiting = q.waiting[:copy(q.waiting, q.waiting[n:])]
			return false
		}
		q.waiting = q.waiting[:0]
		q.fill(batchSize)
	}
	return true
}

// Reap implements netdev.Queue. It is also another try for what waits.
func (q *queue) Reap() {
	q.flush()
	q.Queue.Reap()
}

// Held implements netdev.Holder.
func (q *queue) Held() bool {
	h, ok := q.Queue.(netdev.Holder)
	return len(q.waiting) > 0 || ok && h.Held()
}

// SendUnwound implements netdev.Unwinder. Nobody can say which of the children the inner device has, so all are forgotten, with their parent and their pool.
func (q *queue) SendUnwound() {
	if u, ok := q.Queue.(netdev.Unwinder); ok {
		u.SendUnwound()
	}
	q.parent, q.making, q.waiting, q.pool = nil, nil, nil, &pool{}
}

// RecvUnwound implements netdev.Unwinder for an inner Queue that does.
func (q *queue) RecvUnwound() {
	if u, ok := q.Queue.(netdev.Unwinder); ok {
		u.RecvUnwound()
	}
}

// Orphan implements netdev.Orphaner: what waits for room waits in private memory from now on.
func (q *queue) Orphan() {
	q.fill(math.MaxInt)
	for _, b := range q.waiting {
		if err := b.Orphan(zerocopy.HeapAllocator); err != nil {
			panic("bug: " + err.Error()) // nobody else has a reference, and the heap does not say no
		}
	}
	if o, ok := q.Queue.(netdev.Orphaner); ok {
		o.Orphan()
	}
}

// Recall implements netdev.Borrower for an inner Queue that does.
func (q *queue) Recall(p *zerocopy.Posted) {
	if b, ok := q.Queue.(netdev.Borrower); ok {
		b.Recall(p)
	}
}

// CompletionFD implements netdev.Completer for an inner Queue that does.
func (q *queue) CompletionFD() int {
	if c, ok := q.Queue.(netdev.Completer); ok {
		return c.CompletionFD()
	}
	return -1
}

// drop releases what waits.
func (q *queue) drop() {
	q.dropped.Add(uint64(len(q.waiting)))
	zerocopy.ReleaseAll(q.waiting, zerocopy.Dropped)
	q.waiting = nil
	if q.making != nil {
		q.pool.put(q.making)
		q.making = nil
	}
	if q.parent != nil {
		q.finish(zerocopy.Dropped)
	}
}

// Counters implements netdev.Queue. Frames whose headers could not be cut count as dropped.
func (q *queue) Counters() netdev.Counters {
	c := q.Queue.Counters()
	c.SendDropped += q.dropped.Load()
	return c
}
