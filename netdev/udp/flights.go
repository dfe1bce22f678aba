package udp

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/zerocopy"
)

// longNap is how long a completion is left to the worker before it is taken from elsewhere: a worker that sleeps polls the engine's
// descriptor, so nobody but one that has ended leaves it at all.
const longNap = 10 * time.Millisecond

// flight is a frame whose pages the kernel refers to.
type flight struct {
	buf     *zerocopy.Buffer // nil: free
	refused bool             // it was not sent, though the kernel still refers to its pages
	copied  bool             // the same, but a copy of it was sent in its place
	next    int              // slot of the datagram behind it that is part of the same send, or -1
	page    []byte           // see sender.fit; nil until it is needed
	// registered: its pages are held by their registration too
	registered bool
}

// flights are the frames whose pages the kernel refers to. The transmitq's worker adds them; they are ended by the worker or by watch.
type flights struct {
	out atomic.Int64 // frames

	mu       sync.Mutex
	engine   engine
	slots    []flight
	free     []int
	throttle throttle
	turns    uint64 // calls of launch and turn: a sign that the worker is awake
	most     int    // frames at once
	notified [2]uint64
	fixed    uint64 // from registered memory
	trains   uint64 // sends of several frames
	limited  uint64 // copied because the kernel takes no more, see errorQueueEngine
	lost     uint64 // refused elsewhere than in the worker's turns, not yet in its count

	start   chan struct{} // tells watch that frames are in flight
	stop    *sys.EventFD  // ends watch, when all is done
	stopped bool          // Close has been called
	ended   chan struct{} // watch has returned
}

// Indices of flights.notified.
const (
	byPage = iota // the kernel sent the pages
	byCopy        // and here it copied them after all
)

// newFlights makes room for up to pending frames. It closes e where it fails.
func newFlights(e engine, pending int, p netdev.Policy) (*flights, error) {
	stop, err := sys.NewEventFD()
	if err != nil {
		_ = e.close()
		return nil, err
	}
	f := &flights{
		engine: e, slots: make([]flight, pending), throttle: throttle{always: p == netdev.On},
		start: make(chan struct{}, 1), stop: stop, ended: make(chan struct{}),
	}
	for i := range f.slots {
		f.free = append(f.free, i)
	}
	go f.watch()
	return f, nil
}

// take finds a slot for b, or says why there is none.
func (f *flights) take(b *zerocopy.Buffer) (slot int, o zerocopy.Outcome) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := len(f.free)
	switch {
	case n == 0:
		return 0, zerocopy.CopiedCap
	case !f.throttle.allow():
		return 0, zerocopy.CopiedFallback
	}
	slot = f.free[n-1]
	f.free = f.free[:n-1]
	s := &f.slots[slot]
	s.buf, s.refused, s.copied, s.next = b, false, false, -1
	f.most = max(f.most, len(f.slots)-len(f.free))
	f.out.Add(1)
	return slot, zerocopy.ZeroCopied
}

// page is private memory of a slot: one page, of which no part lies in another.
func (f *flights) page(slot int) []byte {
	s := &f.slots[slot] // the worker's own until it is launched
	if s.page == nil {
		m := make([]byte, 2*sys.PageSize)
		off := (sys.PageSize - sys.PageOffset(m)) % sys.PageSize
		s.page = m[off : off+sys.PageSize : off+sys.PageSize]
	}
	return s.page
}

// launch hands frames to the kernel, and returns how many frames were refused.
func (f *flights) launch(p *pageSends) (refused uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.turns++
	for i, slot := range p.slots {
		if f.slots[slot].registered = p.chunks[i] >= 0; p.chunks[i] >= 0 {
			f.fixed++
		}
	}
	refused = f.engine.send(f, p)
	if f.out.Load() > 0 {
		select {
		case f.start <- struct{}{}:
		default:
		}
	}
	return refused
}

// turn looks for completions on the worker's behalf.
func (f *flights) turn() (refused uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.turns++
	f.engine.poke()
	refused, f.lost = f.lost, 0
	return refused + f.engine.reap(f)
}

// done ends a frame that was sent, with the kernel's word on its pages. f is locked.
func (f *flights) done(slot int, copied bool) {
	f.throttle.report(copied)
	if copied {
		f.notified[byCopy]++
		f.end(slot, zerocopy.CopiedAnyway)
	} else {
		f.notified[byPage]++
		f.end(slot, zerocopy.ZeroCopied)
	}
}

// end releases a frame and frees its slot. f is locked.
func (f *flights) end(slot int, o zerocopy.Outcome) {
	s := &f.slots[slot]
	b := s.buf
	if b == nil {
		panic(fmt.Sprintf("bug: slot %d of %d completed without a frame", slot, len(f.slots)))
	}
	s.buf = nil
	f.free = append(f.free, slot)
	f.out.Add(-1)
	b.Release(o)
}

// giveUp ends frames that took a slot and were never launched.
func (f *flights) giveUp(slots []int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, slot := range slots {
		f.throttle.giveBack()
		f.end(slot, zerocopy.Dropped)
	}
}

// watch takes completions that the worker does not take, until close and the last of them.
func (f *flights) watch() {
	defer close(f.ended)
	for range f.start {
		for f.out.Load() > 0 && f.look() {
		}
	}
	if err := f.engine.close(); err != nil {
		panic("bug: closing what frames were sent by: " + err.Error())
	}
	_ = f.stop.Close()
}

// look waits for a while, or after close for a completion, takes what the worker does not, and reports whether any frame is left.
func (f *flights) look() bool {
	seen, stopped := f.state()
	fds, timeout := [1]unix.PollFd{{Fd: int32(f.stop.FD()), Events: unix.POLLIN}}, int(longNap/time.Millisecond)
	if stopped {
		fds[0].Fd, timeout = int32(f.engine.fd()), -1
	}
	_, _ = unix.Poll(fds[:], timeout) // whatever ends it, we look
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.turns == seen {
		f.lost += f.engine.reap(f)
	}
	return f.out.Load() > 0
}

// visit takes completions on behalf of a worker that they keep awake, other than the one that sends.
func (f *flights) visit() {
	if f.out.Load() == 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lost += f.engine.reap(f)
}

func (f *flights) state() (turns uint64, stopped bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.turns, f.stopped
}

// close waits for all frames, up to d, and returns how many the kernel still refers to. watch ends with the last of them.
func (f *flights) close(d time.Duration) (held int, refused uint64) {
	f.mu.Lock()
	f.stopped = true
	f.mu.Unlock()
	f.stop.Signal()
	close(f.start)
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-f.ended:
	case <-timer.C:
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	refused, f.lost = f.lost, 0
	return int(f.out.Load()), refused
}

// FlightStats are what became of frames that left without a copy.
type FlightStats struct {
	ByPage, ByCopy uint64 // the kernel's reports: sent from the pages, or copied after all
	InFlight, Most int    // frames in the kernel's hands, now and at most
	Pauses, Probes uint64 // of the throttle
	Registered     uint64 // frames that left from registered memory
	Trains         uint64 // sends of several frames in one
	Limited        uint64 // frames copied because of net.core.optmem_max or RLIMIT_MEMLOCK, which bind MSG_ZEROCOPY
}

func (f *flights) stats() FlightStats {
	f.mu.Lock()
	defer f.mu.Unlock()
	return FlightStats{
		ByPage: f.notified[byPage], ByCopy: f.notified[byCopy], InFlight: int(f.out.Load()), Most: f.most,
		Pauses: f.throttle.Pauses, Probes: f.throttle.Probes, Limited: f.limited,
		Registered: f.fixed, Trains: f.trains,
	}
}
