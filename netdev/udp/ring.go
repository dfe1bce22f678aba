package udp

import (
	"github.com/vhostd/vhostd/internal/sys/uring"
	"github.com/vhostd/vhostd/zerocopy"
)

// batchSends is how many sends the io_uring takes in one system call.
const batchSends = 64

// ringEngine sends by io_uring.
type ringEngine struct{ ring *uring.Ring }

// newRingEngine opens an io_uring for up to pending frames.
func newRingEngine(pending int) (*ringEngine, error) {
	// Every send has two completions; the requests of one batch come on top of what is in flight.
	ring, err := uring.New(batchSends, 2*(pending+batchSends))
	if err != nil {
		return nil, err
	}
	return &ringEngine{ring}, nil
}

func (e *ringEngine) send(f *flights, p *pageSends) (refused uint64) {
	for i := 0; i < p.msgs.Len(); {
		first := i
		for ; i < p.msgs.Len() && e.queue(p, i); i++ {
		}
		// The ring's own failure (memory) is the end of the frames that it did not take: they were not sent.
		if lost, err := e.ring.Submit(); err != nil {
			for _, slot := range p.slots[max(first, i-lost):i] {
				f.end(slot, zerocopy.Dropped)
				refused++
			}
		}
		refused += e.reap(f)
	}
	return refused
}

// queue puts datagram i into the ring, if there is room.
func (e *ringEngine) queue(p *pageSends, i int) bool {
	if p.chunks[i] < 0 {
		return e.ring.SendmsgZC(p.fds[i], p.msgs.Header(i), uint64(p.slots[i]))
	}
	return e.ring.SendmsgZCFixed(p.fds[i], p.msgs.Header(i), p.chunks[i], uint64(p.slots[i]))
}

func (e *ringEngine) poke() { e.ring.Poke() }

func (e *ringEngine) reap(f *flights) (refused uint64) {
	for {
		c, ok := e.ring.Next()
		if !ok {
			return refused
		}
		slot := int(c.Data)
		s := &f.slots[slot]
		switch {
		case !c.Notif() && c.Errno() != 0:
			refused++
			f.throttle.giveBack()
			if s.refused = true; !c.More() {
				f.end(slot, zerocopy.Dropped)
			}
		case !c.Notif() && !c.More():
			f.end(slot, zerocopy.Copied) // sent, and the kernel never referred to its pages
		case !c.Notif():
		case s.refused:
			f.end(slot, zerocopy.Dropped)
		default:
			f.done(slot, c.Copied())
		}
	}
}

func (e *ringEngine) fd() int { return e.ring.FD() }

func (e *ringEngine) close() error { return e.ring.Close() }
