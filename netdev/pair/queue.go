package pair

import (
	"sync/atomic"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/zerocopy"
)

// queue is one queue pair of a Device.
type queue struct {
	d       *Device
	index   int
	scratch [][]byte // the receiveq's worker's
	tooBig  atomic.Uint64
}

// to is the link that frames sent on this queue pair take.
func (q *queue) to() *link {
	i := q.index
	if used := int(q.d.peer.pairs.Load()); used > 0 {
		i %= used
	}
	return q.d.out[i]
}

// Send implements netdev.Queue.
func (q *queue) Send(bufs []*zerocopy.Buffer) int {
	if len(bufs) == 0 {
		return 0
	}
	return q.to().put(bufs)
}

// Reap implements netdev.Queue: the other side's worker releases what is held.
func (q *queue) Reap() {}

// SendFD implements netdev.Queue.
func (q *queue) SendFD() int { return q.to().room.FD() }

// Recv implements netdev.Queue.
func (q *queue) Recv(p *zerocopy.Posted, max int) (n int, idle bool, err error) {
	n, idle, tooBig := q.d.in[q.index].get(p, max, &q.scratch)
	if tooBig > 0 {
		q.tooBig.Add(uint64(tooBig))
	}
	return n, idle, nil
}

// SendUnwound implements netdev.Unwinder: a frame whose copy did not end is not in its slot.
func (q *queue) SendUnwound() {}

// RecvUnwound implements netdev.Unwinder.
func (q *queue) RecvUnwound() { q.d.in[q.index].unwound() }

// RecvFD implements netdev.Queue.
func (q *queue) RecvFD() int {
	l := q.d.in[q.index]
	l.arm()
	return l.ready.FD()
}

// Counters implements netdev.Queue.
func (q *queue) Counters() netdev.Counters {
	return netdev.Counters{SendDropped: q.d.out[q.index].dropped.Load(), RecvDropped: q.tooBig.Load()}
}
