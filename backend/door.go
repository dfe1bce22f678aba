package backend

import (
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/zerocopy"
)

// A receiveq is the netdev.Door to its guest: other threads than its worker's may deliver frames, one at a time, when the lock is free. They come from a
// worker that holds its own queue's lock already. That cannot deadlock, since they only try.
var _ netdev.Door = (*queue)(nil)

// Try implements netdev.Door.
func (q *queue) Try(d netdev.Deliverer) (state netdev.DoorState) {
	if q.attention.Load() || !q.mu.TryLock() {
		return netdev.DoorBusy
	}
	defer q.leaveDoor()
	if !q.started || !q.enabled || q.broken != nil || q.fault != nil || q.s.fault.Load() != nil {
		return netdev.DoorShut
	}
	defer func() {
		if r := recover(); r != nil {
			state = q.unwoundAtDoor(shm.Caught(r))
		}
	}()
	q.deliver(d, q.posted)
	if q.broken != nil {
		return netdev.DoorShut
	}
	return netdev.DoorOpen
}

// deliver is receive for frames that d has. The rest of a frame that was cut is the receiveq's worker's: d has done with that frame, and the guest does not say that
// it has posted more unless it is asked to, which only the worker does.
func (q *queue) deliver(d netdev.Deliverer, p *zerocopy.Posted) {
	if p.Lent() > 0 {
		return // what the device has begun goes first, as does what an earlier frame has
	}
	if p.Flush() {
		if d.Deliver(p); p.Waiting() > 0 {
			q.worker.signal()
		}
	}
	q.publish()
	if err := p.Err(); err != nil {
		q.breakRing(err)
	}
}

// unwoundAtDoor is unwound for a delivery on another thread: when it was not this guest's memory that faulted, it is the session of the frame's sender that
// ends, and nothing here was half done. What was written before that frame is still to be published, and of one that was cut there may be a rest.
func (q *queue) unwoundAtDoor(f *shm.Fault) netdev.DoorState {
	if q.unwound(f) {
		q.worker.signal()
		return netdev.DoorOpen
	}
	return netdev.DoorShut
}

// leaveDoor unlocks the queue, and wakes a worker that came meanwhile and found it locked.
func (q *queue) leaveDoor() {
	q.mu.Unlock()
	if q.passed.Load() && q.passed.CompareAndSwap(true, false) {
		q.worker.signal()
	}
}

// Wake implements netdev.Door.
func (q *queue) Wake() { q.worker.signal() }

// openDoors lets the device deliver to the session's receiveqs, or closes them.
func (b *Backend) openDoors(s *session) {
	for i := range b.opts.MaxPairs {
		d, ok := b.dev.Queue(i).(netdev.Doorway)
		switch {
		case !ok:
		case s == nil:
			d.SetDoor(nil)
		default:
			d.SetDoor(s.queues[2*i])
		}
	}
}
