package udp

import (
	"slices"
	"time"

	"github.com/vhostd/vhostd/internal/sys/uring"
	"github.com/vhostd/vhostd/zerocopy"
)

// batchSends is how many sends the io_uring takes in one system call.
const batchSends = 64

// ringEngine sends by io_uring.
type ringEngine struct {
	ring    *uring.Ring
	starts  []int      // first datagram of each send that was not submitted yet
	sending *pageSends // in send: what is handed over
	noGSO   bool
	noTrain time.Time // trains were refused: none until then
}

// What a train may be at most: datagrams that leave in one send, for the kernel's network stack to go through once and for the card, or else the
// kernel, to cut (UDP_SEGMENT).
const (
	maxTrain      = 64
	maxTrainBytes = 65000
	// trainPause is how long none is tried after one was refused: the way out has no checksum offload, or takes only shorter packets.
	trainPause = time.Minute
)

// newRingEngine opens an io_uring for up to pending frames.
func newRingEngine(pending int) (*ringEngine, error) {
	// Every send has two completions; the requests of one batch come on top of what is in flight.
	ring, err := uring.New(batchSends, 2*(pending+batchSends))
	if err != nil {
		return nil, err
	}
	return &ringEngine{ring: ring}, nil
}

func (e *ringEngine) send(f *flights, p *pageSends) (refused uint64) {
	e.sending = p
	defer func() { e.sending = nil }()
	trains := !e.noGSO && !time.Now().Before(e.noTrain)
	for i := 0; i < p.msgs.Len(); {
		e.starts = e.starts[:0]
		for n := 1; i < p.msgs.Len(); i += n {
			if n = 1; trains {
				n = p.train(i)
			}
			if !e.queue(f, p, i, n) {
				break
			}
			e.starts = append(e.starts, i)
			if n > 1 { // nothing is to leave behind it before it is known whether its frames have to leave once more, as copies
				i += n
				break
			}
		}
		// The ring's own failure (memory) is the end of the frames that it did not take: they were not sent.
		if lost, err := e.ring.Submit(); err != nil {
			for _, slot := range p.slots[e.starts[len(e.starts)-lost]:i] {
				f.end(slot, zerocopy.Dropped)
				refused++
			}
		}
		refused += e.reap(f)
	}
	return refused
}

// train is how many datagrams from i on can leave in one send.
func (p *pageSends) train(i int) int {
	total, frags := p.lens[i], p.frags[i]
	n := 1
	for j := i + 1; j < len(p.lens) && n < maxTrain && p.lens[j] <= p.lens[i]; j++ {
		total, frags = total+p.lens[j], frags+p.frags[j]
		if total > maxTrainBytes || frags > maxFrags || p.fds[j] != p.fds[i] || p.chunks[j] != p.chunks[i] || *p.msgs.To(j) != *p.msgs.To(i) {
			break
		}
		n++
		if p.lens[j] < p.lens[i] {
			break // a shorter one is the last
		}
	}
	return n
}

// queue puts the n datagrams from i on into the ring as one send, if there is room. It completes by the slot of the first.
func (e *ringEngine) queue(f *flights, p *pageSends, i, n int) bool {
	if e.ring.Room() == 0 {
		return false
	}
	h := p.msgs.Header(i)
	if n > 1 {
		h = p.msgs.Train(i, n, p.lens[i])
		for k := i; k < i+n-1; k++ {
			f.slots[p.slots[k]].next = p.slots[k+1]
		}
		f.trains++
	}
	if p.chunks[i] < 0 {
		return e.ring.SendmsgZC(p.fds[i], h, uint64(p.slots[i]))
	}
	return e.ring.SendmsgZCFixed(p.fds[i], h, p.chunks[i], uint64(p.slots[i]))
}

// sendApart sends copies of the datagrams of a train that the kernel refused in this turn. Their slots wait for it to let go of the pages.
func (e *ringEngine) sendApart(f *flights, first int) (refused uint64) {
	e.noTrain = time.Now().Add(trainPause)
	p := e.sending
	p.msgs.Apart()
	i := slices.Index(p.slots, first)
	for slot := first; slot >= 0; slot = f.slots[slot].next {
		s := &f.slots[slot]
		if s.copied = p.msgs.SendOne(p.fds[i], i) == 0; !s.copied {
			s.refused = true
			refused++
		}
		f.throttle.giveBack()
		i++
	}
	return refused
}

func (e *ringEngine) poke() { e.ring.Poke() }

func (e *ringEngine) reap(f *flights) (refused uint64) {
	for {
		c, ok := e.ring.Next()
		if !ok {
			return refused
		}
		slot := int(c.Data)
		// A refusal comes before Submit returns; one that came later would be the end of the frames, as there is nothing left to send again.
		if c.Errno() != 0 && c.More() && f.slots[slot].next >= 0 && e.sending != nil {
			refused += e.sendApart(f, slot)
			continue
		}
		for slot >= 0 {
			next := f.slots[slot].next // before the slot is somebody else's
			refused += e.complete(f, slot, c)
			slot = next
		}
	}
}

// complete takes the kernel's word on one datagram of a send, and returns 1 if it was refused.
func (e *ringEngine) complete(f *flights, slot int, c uring.Completion) (refused uint64) {
	s := &f.slots[slot]
	switch {
	case !c.Notif() && c.Errno() != 0:
		refused = 1
		f.throttle.giveBack()
		if s.refused = true; !c.More() {
			f.end(slot, zerocopy.Dropped)
		}
	case !c.Notif() && !c.More():
		f.end(slot, zerocopy.Copied) // sent, and the kernel never referred to its pages
	case !c.Notif():
	case s.refused:
		f.end(slot, zerocopy.Dropped)
	case s.copied:
		f.end(slot, zerocopy.CopiedFallback)
	default:
		f.done(slot, c.Copied())
	}
	return refused
}

func (e *ringEngine) fd() int { return e.ring.FD() }

func (e *ringEngine) close() error { return e.ring.Close() }
