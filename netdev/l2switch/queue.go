package l2switch

import (
	"sync/atomic"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/zerocopy"
)

// batchSize is how many frames are looked at before the first is forwarded.
const batchSize = 64

// queue is one queue pair of a port. But for the lane and the counters, all of it belongs to the transmitq's side.
type queue struct {
	port  *Port
	index int
	lane  lane // to the guest

	frames, bytes atomic.Uint64 // from the guest

	work *work   // nil until the first frame
	owed []*lane // those that frames were put into without waking anybody
}

// work is what a transmitq needs for a batch.
type work struct {
	batch [batchSize]frame
	plain [batchSize][plainHead]byte
	deep  *[batchSize][deepHead]byte // nil until a Guard needs it
	shape [addrsLen + tagLen]byte
	frags [][]byte
	run   run
	open  bool // the port is an access port without a Guard
}

// Send implements netdev.Queue: it takes all frames.
func (q *queue) Send(bufs []*zerocopy.Buffer) (n int) {
	if q.work == nil {
		q.work = new(work)
	}
	for n < len(bufs) {
		n += q.forward(bufs[n:min(n+batchSize, len(bufs))])
	}
	return n
}

// Reap implements netdev.Queue: what was left in lanes without waking anybody is tried again.
func (q *queue) Reap() {
	if len(q.owed) > 0 {
		q.retry()
	}
}

// SendFD implements netdev.Queue.
func (q *queue) SendFD() int { return -1 }

// SendIdle implements netdev.Putter: from here on the receivers' own workers see to what waits.
func (q *queue) SendIdle() {
	for i, l := range q.owed {
		q.owed[i] = nil
		l.rouse(forFrames, forFrames)
	}
	q.owed = q.owed[:0]
}

// Recv implements netdev.Queue.
func (q *queue) Recv(p *zerocopy.Posted, max int) (n int, idle bool, err error) {
	l := &q.lane
	if l.quiet() {
		return 0, true, nil
	}
	for {
		n, idle = l.get(p, max)
		switch {
		case n == max, n > 0 && !idle:
			l.state.Store(awake)
			return n, false, nil
		case !idle:
			l.arm(forRoom)
			return 0, false, nil
		case l.arm(forFrames):
			return n, true, nil
		case n > 0:
			l.state.Store(awake)
			return n, false, nil
		}
	}
}

// RecvFD implements netdev.Queue.
func (q *queue) RecvFD() int { return q.lane.ready.FD() }

// Counters implements netdev.Queue.
func (q *queue) Counters() netdev.Counters {
	c := netdev.Counters{RecvDropped: q.lane.tooBig.Load() + q.lane.starved.Load() + q.lane.faulted.Load()}
	if q.index > 0 {
		return c
	}
	// A port counts for all of its queues.
	for r := range q.port.drops {
		if n := q.port.drops[r].Load(); Reason(r) < DropNoReceiver {
			c.SendDropped += n
		} else {
			c.RecvDropped += n
		}
	}
	return c
}

// Orphan implements netdev.Orphaner: what other guests still have of this queue's pages is copied.
func (q *queue) Orphan() {
	for _, p := range q.port.sw.view.Load().ports {
		if p == nil {
			continue
		}
		for i := range p.queues {
			p.queues[i].lane.orphanOf(q, ^uint64(0))
		}
		if p.up != nil {
			for _, l := range p.up.lines {
				l.orphan()
			}
		}
	}
}

// SendUnwound implements netdev.Unwinder: a batch starts anew, and what was put into a lane is in it whole or not at all. Nothing of the last one is kept:
// a guest's memory that has faulted stays mapped for as long as anybody knows one of its frames (zerocopy.Window.Abandon), and no frame may come here again for years.
func (q *queue) SendUnwound() { q.work = nil }

// RecvUnwound implements netdev.Unwinder.
func (q *queue) RecvUnwound() {
	if q.lane.unwound() {
		q.port.drop(DropFault, 1)
	}
}

// SetDoor implements netdev.Doorway.
func (q *queue) SetDoor(d netdev.Door) {
	l := &q.lane
	if d == nil {
		l.door.Store(nil)
		l.shut.Store(true)
		q.port.drop(DropNoReceiver, l.discard())
		return
	}
	l.door.Store(&d)
	l.shut.Store(false)
}
