package l2switch

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/zerocopy"
)

// sweeper copies out the pages that have waited in a lane for Config.Hold, and wakes receivers that nobody else has woken. It runs only while frames
// wait: twice in that time, and takes what it has seen before.
type sweeper struct {
	sw     *Switch
	period time.Duration
	armed  atomic.Bool

	mu    sync.Mutex // one sweep at a time, and none after stop
	timer *time.Timer
	ended bool
}

func (s *sweeper) init(sw *Switch) {
	s.sw, s.period = sw, max(sw.cfg.Hold/2, time.Microsecond)
}

// arm sees to it that there is a sweep in a while.
func (s *sweeper) arm() {
	if s.armed.Load() || !s.armed.CompareAndSwap(false, true) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.ended:
	case s.timer == nil:
		s.timer = time.AfterFunc(s.period, s.run)
	default:
		s.timer.Reset(s.period)
	}
}

// stop ends sweeping. When it returns none runs.
func (s *sweeper) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	if s.timer != nil {
		s.timer.Stop()
	}
}

// run is a sweep.
func (s *sweeper) run() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return
	}
	more := s.lanes()
	s.armed.Store(false)
	// Whoever has put a frame into a lane meanwhile, or was left with it by an uplink, has seen that a sweep was to come.
	if (more || s.held()) && s.armed.CompareAndSwap(false, true) {
		s.timer.Reset(s.period)
	}
}

// lanes sweeps all lanes, and reports whether pages wait in any.
func (s *sweeper) lanes() (more bool) {
	for _, p := range s.sw.view.Load().ports {
		if p == nil {
			continue
		}
		if p.up != nil && p.up.sweep() {
			more = true
		}
		for i := range p.queues {
			l := &p.queues[i].lane
			if l.empty() {
				continue
			}
			l.sweep()
			l.rouse(forFrames, forFrames)
			more = more || l.held.Load() > 0
		}
	}
	return more
}

// held reports whether pages wait in any lane, or came from there to an uplink that is full.
func (s *sweeper) held() bool {
	for _, p := range s.sw.view.Load().ports {
		if p == nil {
			continue
		}
		for i := range p.queues {
			if p.queues[i].lane.held.Load() > 0 {
				return true
			}
		}
		if p.up != nil && p.up.held() { // behind its lanes, which is the way that frames take
			return true
		}
	}
	return false
}

// sweep copies out the pages that were here at the last sweep already.
func (l *lane) sweep() {
	head := l.head.Load()
	if l.orphanOf(nil, l.mark) > 0 {
		l.slow.Store(true)
	}
	l.mark = head
}

// orphanOf copies the frames that wait with pages, of one sender or of all for nil, in slots before a cursor, and returns how many. It may be called by any
// goroutine: a fault in those pages ends the session whose they are, and drops the frame.
func (l *lane) orphanOf(from *queue, before uint64) (n int) {
	for {
		fault := shm.Guard(func() { n += l.orphanSome(from, before) })
		if fault == nil {
			return n
		}
		l.faulted.Add(1)
		if fault.Owner != nil {
			fault.Owner.Faulted(fault)
		}
	}
}

// orphanSome is orphanOf up to a fault. A frame that faults is dropped, so that the next call goes on behind it.
func (l *lane) orphanSome(from *queue, before uint64) (n int) {
	l.take.Lock()
	defer l.take.Unlock()
	for c := l.tail.Load(); c != l.head.Load() && c < before; c++ {
		if s := l.at(c); s.buf != nil && (from == nil || s.from == from) {
			l.orphan(s)
			n++
		}
	}
	return n
}

// orphan gives the pages of a slot's frame back: after a copy of it, if there may be one. take is held.
func (l *lane) orphan(s *slot) {
	b, data, o := s.buf, s.data, zerocopy.Dropped
	s.buf, s.data = nil, nil // lost, if the pages fault
	l.held.Add(-1)
	defer func() { b.Release(o) }()
	l.scratch = rest(l.scratch[:0], b, s.skip)
	if !l.mayCopy(s.from, len(data)+pieces(l.scratch)) {
		l.starved.Add(1)
		return
	}
	s.data = gather(append(memory(len(data)+pieces(l.scratch)), data...), l.scratch)
	freeMemory(data)
	o = zerocopy.Copied
	l.copy(s.from, memoryOf(len(s.data)))
	l.orphaned.Add(1)
}
