package backend

import (
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev"
)

// Faulted implements shm.Owner: the front-end has truncated the memory that it shared, which ends its session.
func (e *ending) Faulted(f *shm.Fault) { e.fail(f) }

// blame tells whose memory has faulted, and reports whether that was not this session's, but another's. Memory without an owner, a device's second mapping of
// guest memory, counts as this session's.
func (s *session) blame(f *shm.Fault) (others bool) {
	if f.Owner == nil || f.Owner == shm.Owner(s.ending) {
		s.Faulted(f)
		return false
	}
	f.Owner.Faulted(f)
	return true
}

// guard runs f, which touches guest memory, and turns a memory fault into an error. Other panics pass.
func guard(f func()) error {
	if fault := shm.Guard(f); fault != nil {
		return fault
	}
	return nil
}

// unwound takes note of a fault that has ended what the queue's worker or the control side was doing, and reports whether the queue can go on. It can when
// a frame on its way to the guest has faulted that is still in another guest's memory, and the device does not try it again: then it is that other session
// which ends, and nothing of this one's was half done. The queue is locked.
func (q *queue) unwound(f *shm.Fault) (goesOn bool) {
	others := q.s.blame(f)
	u, ok := q.dev.(netdev.Unwinder)
	switch {
	case ok && q.fromGuest:
		u.SendUnwound()
	case ok:
		u.RecvUnwound()
		if others {
			return true
		}
	}
	q.s.fail(f)
	q.fault = f
	return false
}

// checkNotifier refuses a descriptor that could keep a worker waiting; -1 is none.
func checkNotifier(fd int) error {
	if fd < 0 {
		return nil
	}
	return sys.Notifier(fd)
}

// procs counts the workers: each may spin on a processor of Go's scheduler, and the control side must not have to wait for one.
var procs struct {
	sync.Mutex
	workers, base int
	few           atomic.Bool // every worker has a processor of its own
}

// maxExtraProcs bounds what workers add to GOMAXPROCS: beyond it the operating system has more threads than it can run anyway.
const maxExtraProcs = 8

func addProc() { changeProcs(1) }

func changeProcs(n int) {
	procs.Lock()
	defer procs.Unlock()
	if procs.base == 0 {
		procs.base = runtime.GOMAXPROCS(0)
	}
	procs.workers += n
	procs.few.Store(procs.workers <= maxExtraProcs)
	// Only upwards: a change stops the world, and an unused processor costs nothing.
	if want := procs.base + min(procs.workers, maxExtraProcs); want > runtime.GOMAXPROCS(0) {
		runtime.GOMAXPROCS(want)
	}
}

// enoughProcs reports whether a worker may keep its processor while it sleeps.
func enoughProcs() bool { return procs.few.Load() }
