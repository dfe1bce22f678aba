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

	ports []*port // to receive from
	ready int     // epoll descriptor of their sockets
	idles uint    // calls of Recv that found nothing
}

var _ netdev.Borrower = (*pair)(nil)

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
	if b == nil {
		p.block()
		return 0
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
	b.reap()
	if n < len(bufs) && !b.room(b.way.pieces) {
		p.block()
	}
	if b.send.pieces > 0 {
		p.wake()
	}
	return n
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
	for i := 0; i < len(q.ports) && n < limit; i++ {
		o := q.ports[i]
		b := o.cur.Load()
		switch {
		case b == nil:
			continue
		case !b.recv.inPlace:
			var m int
			if m, idle = b.take(p, limit-n); !idle && m < limit-n {
				return n + m, false, nil
			}
			n += m
		case !o.lends.Load():
			q.Recall(p)
		default:
			var disorder bool
			n, idle, disorder = b.takeInPlace(p, limit)
			if disorder {
				o.lends.Store(false)
				q.Recall(p)
				return n, true, nil
			}
		}
	}
	if n == 0 && idle {
		err = q.check()
	}
	return n, idle, err
}

// check looks, now and then, whether the interface is still there.
func (q *pair) check() error {
	if q.idles++; q.idles%errCheck != 0 {
		return nil
	}
	for _, p := range q.ports {
		if b := p.cur.Load(); b != nil {
			if err := b.sock.Err(); err != nil {
				return fmt.Errorf("%s: queue %d: %w", p.dev, p.queue, err)
			}
		} else if err := p.failed.Load(); err != nil {
			return fmt.Errorf("%s: %w", p.dev, *err)
		}
	}
	return nil
}

// RecvFD implements netdev.Queue.
func (q *pair) RecvFD() int { return q.ready }

// Recall implements netdev.Borrower: sockets that may write into the guest's buffers are closed. They are opened again in the background.
func (q *pair) Recall(p *zerocopy.Posted) {
	for _, o := range q.ports {
		if b := o.cur.Load(); b != nil && b.recv.inPlace && (b.recv.tied > 0 || !o.lends.Load()) {
			o.recall(p)
		}
	}
	if p != nil {
		p.TakeBack()
	}
}

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
