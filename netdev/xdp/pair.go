package xdp

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/zerocopy"
)

// pair is a queue pair. It sends through one port and receives from one or several.
type pair struct {
	port *port // to send through
	room *sys.EventFD

	ports  []*port  // to receive from
	ready  int      // epoll descriptor of their sockets
	idles  uint     // calls of Recv that found nothing
	lender *binding // of port, that Posted's chains are lent to, or nil
}

var (
	_ netdev.Borrower = (*pair)(nil)
	_ netdev.Orphaner = (*pair)(nil)
)

func newPair() (*pair, error) {
	ready, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	room, err := sys.NewEventFD()
	if err != nil {
		return nil, errors.Join(err, unix.Close(ready))
	}
	return &pair{ready: ready, room: room}, nil
}

func (q *pair) close() error { return errors.Join(unix.Close(q.ready), q.room.Close()) }

// watch has RecvFD say when a socket has frames. It does not keep the socket alive.
func (q *pair) watch(fd int) error {
	if err := unix.EpollCtl(q.ready, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN}); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

func (q *pair) unwatch(fd int) error {
	if err := unix.EpollCtl(q.ready, unix.EPOLL_CTL_DEL, fd, nil); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

// Send implements netdev.Queue.
func (q *pair) Send(bufs []*zerocopy.Buffer) (n int) {
	p := q.port
	p.mu.Lock()
	defer p.mu.Unlock()
	p.turns++
	b := p.cur.Load()
	switch {
	case b == nil && p.gone() != nil:
		return p.drop(bufs)
	case b == nil:
		p.block()
		return 0
	case b.send.gone:
		return p.drop(bufs)
	}
	b.reap()
	p.results = p.results[:0]
	for n < len(bufs) {
		o, ok := b.add(bufs[n])
		if !ok {
			break
		}
		p.results = append(p.results, o)
		n++
	}
	b.sock.Tx.Publish()
	b.kick()
	p.release(bufs[:n])
	if b.send.gone {
		p.giveUp(b)
		return n + p.drop(bufs[n:])
	}
	b.reap()
	if n < len(bufs) && !b.room(b.way.pieces) {
		p.block()
	}
	if b.send.pieces > 0 {
		p.wake()
	}
	return n
}

// drop is the end of frames for an interface that is gone.
func (p *port) drop(bufs []*zerocopy.Buffer) int {
	p.dropped.Add(uint64(len(bufs)))
	zerocopy.ReleaseAll(bufs, zerocopy.Dropped)
	return len(bufs)
}

// release releases the frames of a batch that are not in flight.
func (p *port) release(bufs []*zerocopy.Buffer) {
	for start := 0; start < len(bufs); {
		o, end := p.results[start], start+1
		for end < len(bufs) && p.results[end] == o {
			end++
		}
		if o == zerocopy.Dropped {
			p.dropped.Add(uint64(end - start))
		}
		if o != inFlight {
			zerocopy.ReleaseAll(bufs[start:end], o)
		}
		start = end
	}
}

// Reap implements netdev.Queue.
func (q *pair) Reap() {
	p := q.port
	p.mu.Lock()
	defer p.mu.Unlock()
	p.turns++
	if b := p.cur.Load(); b != nil && (b.send.pieces > 0 || p.full) {
		p.turn(b)
	}
}

// SendFD implements netdev.Queue: it cannot be written while the port has no room.
func (q *pair) SendFD() int { return q.room.FD() }

// errCheck is after how many calls of Recv without a frame the sockets are asked for what ended them.
const errCheck = 256

// Recv implements netdev.Queue.
func (q *pair) Recv(p *zerocopy.Posted, limit int) (n int, idle bool, err error) {
	idle = true
	for i := 0; i < len(q.ports) && n < limit && idle; i++ {
		var m int
		m, idle = q.ports[i].receive(q, p, limit-n)
		n += m
	}
	if n == 0 && idle {
		err = q.check()
	}
	return n, idle, err
}

// receive moves up to limit frames from the port to the guest. It is not idle when the guest has posted too little for the next.
func (o *port) receive(q *pair, p *zerocopy.Posted, limit int) (n int, idle bool) {
	n, idle, end := o.receiveLocked(q, p, limit)
	if end {
		if o.lends.CompareAndSwap(true, false) {
			o.unruly.Add(1)
		}
		o.recall(lentBy(o.cur.Load(), q, p))
		q.lender = nil
		p.TakeBack()
		idle = true
	}
	return n, idle
}

// receiveLocked is receive, but for the end of lending. Guest memory can fault in it.
func (o *port) receiveLocked(q *pair, p *zerocopy.Posted, limit int) (n int, idle, end bool) {
	o.receiving.Lock()
	defer o.receiving.Unlock()
	b := o.cur.Load()
	if q.lender != nil && q.lender != b && o == q.port { // it has been closed: nobody writes there any more
		q.lender = nil
		p.TakeBack()
	}
	switch {
	case b == nil:
		return 0, true, false
	case !b.recv.inPlace:
		n, idle = b.take(p, limit)
		o.note(&b.recv)
		return n, idle, false
	case !o.lends.Load():
		return 0, true, true
	}
	q.lender = b
	n, idle, end = b.takeInPlace(p, limit)
	o.note(&b.recv)
	return n, idle, end
}

// note counts what became of frames at the port, which outlives its bindings.
func (o *port) note(r *receiving) {
	o.landed.Add(r.landed)
	o.lost.Add(r.tooBig)
	r.landed, r.tooBig = 0, 0
}

// lentBy is p if its chains are lent by b, else nil: they were another pair's.
func lentBy(b *binding, q *pair, p *zerocopy.Posted) *zerocopy.Posted {
	if q.lender == b {
		return p
	}
	return nil
}

// check looks, now and then, whether the interface is still there.
func (q *pair) check() error {
	if q.idles++; q.idles%errCheck != 0 {
		return nil
	}
	for _, p := range q.ports {
		if b := p.cur.Load(); b != nil {
			if err := b.err(); err != nil {
				return fmt.Errorf("%s: queue %d: %w", p.dev, p.queue, err)
			}
		} else if err := p.gone(); err != nil {
			return fmt.Errorf("%s: %w", p.dev, err) // what else stands in the way may pass: tend goes on trying
		}
	}
	return nil
}

// RecvFD implements netdev.Queue.
func (q *pair) RecvFD() int { return q.ready }

// Recall implements netdev.Borrower: a socket that may write into the guest's buffers is closed. It is opened again in the background.
func (q *pair) Recall(p *zerocopy.Posted) {
	if q.lender == nil {
		return
	}
	if q.lender == q.port.cur.Load() {
		q.port.recall(p)
	}
	q.lender = nil
	if p != nil {
		p.TakeBack()
	}
}

// Orphan implements netdev.Orphaner: the kernel is made to forget frames that it has not sent, which takes closing the socket.
func (q *pair) Orphan() { q.port.orphan() }

// Counters implements netdev.Queue.
func (q *pair) Counters() netdev.Counters {
	p := q.port
	c := netdev.Counters{SendDropped: p.dropped.Load(), RecvDropped: p.lost.Load()}
	if p == p.dev.ports[0] {
		c.RecvDropped += p.dev.prog.dropped() // which knows no queues
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if b := p.cur.Load(); b != nil {
		c.RecvDropped += b.lost()
	}
	return c
}
