package backend

import (
	"errors"
	"time"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/zerocopy"
)

// stopAll stops every queue of a session whose workers run.
func (s *session) stopAll() error {
	defer s.pause(vhostuser.PauseAll, -1)()
	err := s.stop(s.queues...)
	for _, q := range s.queues {
		q.broken = nil // what the guest did wrong ends with its ring
	}
	return err
}

// stop ends the workers of queues, which are locked, returns every chain that they have popped to the driver, and keeps the bases. All of them
// end before the first is waited for, and they wait at the same time: however many there are, it takes the drain timeout at most. An error means that
// guest memory has gone.
func (s *session) stop(queues ...*queue) error {
	var halted []*queue
	for _, q := range queues {
		if q.halt() {
			halted = append(halted, q)
		}
	}
	await(halted, s.b.opts.DrainTimeout)
	var errs []error
	for _, q := range halted {
		errs = append(errs, q.finish())
	}
	return errors.Join(errs...)
}

// halt has the worker let go of the ring and gives back what it has not handed on. It reports false for a queue that does not run.
func (q *queue) halt() bool {
	if !q.started {
		return false
	}
	q.started, q.kicked = false, false
	q.mu.Unlock()
	q.worker.signal()
	<-q.done
	q.mu.Lock()
	if q.fault != nil {
		q.takeBack(nil)
	}
	q.try(q.recall)
	return true
}

// try runs f, which touches guest memory, unless that has faulted before.
func (q *queue) try(f func()) {
	if q.fault != nil {
		return
	}
	if f := shm.Guard(f); f != nil && q.unwound(f) {
		q.fault = f // what f did is half done, whosever memory it was
	}
}

// await reaps halted queues until nothing is out or the timeout comes; halfway, or later where this thread does not run in between, but before it gives
// up, the devices let go of the pages that they can copy.
func await(queues []*queue, timeout time.Duration) {
	deadline := time.Now().Add(timeout)
	pause := 20 * time.Microsecond
	for {
		left := time.Until(deadline)
		if left < timeout/2 {
			for _, q := range queues {
				q.orphan()
			}
		}
		out := 0
		for _, q := range queues {
			out += q.collect()
		}
		if out == 0 || left <= 0 {
			return
		}
		time.Sleep(pause)
		pause = min(2*pause, time.Millisecond)
	}
}

// collect returns to the driver what the device has released, and tells how many frames are out still.
func (q *queue) collect() int {
	if q.window == nil {
		return 0
	}
	q.try(func() {
		q.dev.Reap()
		q.window.Reap()
		q.publish()
	})
	if q.fault != nil {
		return 0 // nothing can be returned any more
	}
	return q.window.Pending()
}

// orphan has the device copy out what it can.
func (q *queue) orphan() {
	if o, ok := q.dev.(netdev.Orphaner); ok && q.window != nil && q.window.Pending() > 0 {
		q.try(o.Orphan)
	}
}

// finish ends the ring of a halted queue: what is out still is returned all the same.
func (q *queue) finish() error {
	q.try(func() {
		if q.window != nil {
			if n := q.window.Close(); n > 0 {
				q.s.b.log.Warn("frames still in flight were returned to the guest", "queue", q.index, "frames", n)
			}
		}
		q.publish()
	})
	err := q.fault
	if err != nil && q.window != nil {
		q.window.Abandon()
	}
	if q.posted != nil {
		q.rest = q.posted.Close()
	}
	q.unsent, q.fault = nil, nil
	q.fold()
	q.keepBase()
	q.ring, q.window, q.posted = nil, nil, nil
	q.s.b.log.Debug("queue stopped", "queue", q.index, "base", q.setup.base)
	return err
}

// recall gives back to the ring what was popped and not handed on, so that nothing points at memory that is about to change.
func (q *queue) recall() {
	if q.window != nil {
		q.window.Undo(len(q.unsent))
		q.unsent = nil
	}
	if q.posted != nil {
		q.takeBack(q.posted)
		q.posted.GiveBack()
	}
}

// takeBack has a device that writes into the guest's buffers behind Recv's back end that. p is nil when guest memory has gone.
func (q *queue) takeBack(p *zerocopy.Posted) {
	if b, ok := q.dev.(netdev.Borrower); ok && q.posted != nil {
		b.Recall(p)
	}
}

// quiet has nobody write into the buffers of a ring that is started and disabled.
func (q *queue) quiet() {
	if q.enabled || q.posted == nil || q.posted.Lent() == 0 {
		return
	}
	if q.try(func() { q.takeBack(q.posted) }); q.fault != nil {
		q.s.fail(q.fault)
	}
}
