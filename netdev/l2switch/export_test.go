package l2switch

import (
	"time"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// SetClock has the switch take its time from f, from before the first frame on.
func (s *Switch) SetClock(f func() time.Duration) { s.clock = f }

// FullCheck panics when the counts of the table are not those of what is in it.
func (s *Switch) FullCheck() (entries, counted, shares int) {
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	for i := range s.table.buckets {
		for w := range s.table.buckets[i].keys {
			if s.table.buckets[i].keys[w].Load() != noKey {
				entries++
			}
		}
	}
	for _, p := range s.view.Load().ports {
		if p != nil {
			shares += int(p.learned.count.Load())
		}
	}
	return entries, int(s.table.count.Load()), shares
}

// ParseFuzz judges a frame as a port with a Guard of everything does, and reports whether it passed.
func ParseFuzz(c PortConfig, head []byte, length int, needsCsum bool, start, offset uint16) (why Reason, ok bool) {
	c, err := c.withDefaults(Config{})
	if err != nil {
		panic(err)
	}
	r, err := newRules(c, nil)
	if err != nil {
		panic(err)
	}
	f := frame{head: head, length: length}
	if needsCsum {
		hdr := virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, CsumStart: start, CsumOffset: offset}
		f.first, f.last = hdr.Words()
	}
	var first [plainHead]byte
	copy(first[:], head)
	f.parse(&first)
	return f.enter(r)
}

// RingLate has a port's receivers wait for frames, and be rung by somebody who found the port before it left.
func RingLate(port netdev.Device) {
	queues := port.(*device).p.queues
	for i := range queues {
		l := &queues[i].lane
		l.state.Store(forFrames)
		l.rouse(forFrames, forFrames)
	}
}

// PassLate returns what passes a frame from one port to an uplink, as somebody does who looked before that one left.
func PassLate(s *Switch, from netdev.Device, to string) func(b *zerocopy.Buffer) {
	q, p := &from.(*device).p.queues[0], s.view.Load().named(to)
	return func(b *zerocopy.Buffer) {
		q.work = new(work)
		frames, bufs := q.work.batch[:1], []*zerocopy.Buffer{b}
		r := q.port.rules.Load()
		q.read(frames, bufs, r)
		frames[0].vid = r.pvid
		w := &q.work.run
		*w = run{q: q, to: p, rules: p.rules.Load(), lane: p.lane(q), frames: frames, bufs: bufs}
		p.up.deliver(w)
		w.checkShut()
	}
}

// Held is how many frames wait for a port with their senders' pages.
func Held(port netdev.Device) (n int) {
	queues := port.(*device).p.queues
	for i := range queues {
		n += int(queues[i].lane.held.Load())
	}
	return n
}

// Copied is how many bytes of memory copies for a port take, in all and by the books of their senders' shares.
func Copied(port netdev.Device) (all, shares int64) {
	queues := port.(*device).p.queues
	for i := range queues {
		l := &queues[i].lane
		all += l.copied.Load()
		for j := range l.shares {
			shares += l.shares[j].copied.Load()
		}
	}
	return all, shares
}

// HoldSweep has sweeps that come to a port, in whose lane a frame waits, wait for release. One that runs is over before.
func HoldSweep(port netdev.Device) (release func()) {
	p := port.(*device).p
	p.sw.sweep.mu.Lock()
	defer p.sw.sweep.mu.Unlock()
	take := &p.queues[0].lane.take
	take.Lock()
	return take.Unlock
}

// OrphanLate returns what has an uplink keep no pages, as somebody does who looked before it left.
func OrphanLate(s *Switch, name string) func() {
	up := s.view.Load().named(name).up
	return func() {
		for _, l := range up.lines {
			l.orphan()
		}
	}
}

// Published is what tells whether anything about the ports was published since.
func Published(s *Switch) any { return s.view.Load() }
