package backend

import (
	"runtime"
	"runtime/debug"
	"time"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
	"github.com/vhostd/vhostd/zerocopy"
)

// step is what a worker does next, the most urgent first.
type step uint8

const (
	again step = iota // there may be more work
	vain              // the same, but most of the work was for nothing: after a pause
	idle              // there was none: poll for a while, then arm the notifications and wait
	wait              // wait for what waits says; the notifications that are wanted are armed
	quit              // the ring has stopped
)

// turns is how many batches are moved while a queue's lock is held once.
const turns = 16

// looksPerClock is how often a polling worker looks at its queues for one look at the clock.
const looksPerClock = 8

// run is the worker's thread:
//
//	Pop a batch -> Send -> Reap -> Put/Publish -> call if needed -> if idle: poll a while, EnableKick, look again, sleep
//
// With several queues each has a turn, and the worker is idle when all are.
func (w *worker) run() {
	defer changeProcs(-1)
	defer sys.Heartbeat()()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	debug.SetPanicOnFault(true)
	arm := false
	for looks := uint(0); ; {
		queues := *w.queues.Load()
		next := wait
		for _, q := range queues {
			s := q.turn(arm)
			if s == quit {
				done := q.done
				if w.leave(q) {
					defer close(done)
					return
				}
				close(done)
				s = idle
			}
			next = min(next, s)
		}
		switch next {
		case again, vain:
			w.poll.worked()
			arm, looks, w.barren = false, 0, 0
			if next == vain {
				time.Sleep(wastePause)
			}
		case idle:
			// The clock is looked at now and then only: that takes as long as a look at a ring.
			if looks++; looks%looksPerClock == 1 || !w.poll.polling() {
				arm = !w.poll.more(time.Now())
			}
		case wait:
			w.wait(queues)
			arm, looks = false, 0
		}
	}
}

// turn works on a few batches, with the queue locked. With arm it asks for notifications where there is nothing to do. A queue that the control
// side has, or wants, is left to it, or one at whose door another worker is: they wake this one when they unlock it. To wait for the lock would be to wait for queues that this worker holds up.
func (q *queue) turn(arm bool) (next step) {
	if !q.tryLock() {
		q.waits.none()
		return wait
	}
	defer q.mu.Unlock()
	defer func() {
		if r := recover(); r != nil {
			next = q.recovered(shm.Caught(r))
		}
	}()
	if q.waits.slept {
		q.awake()
	}
	switch {
	case !q.started:
		return quit
	case q.broken != nil || q.s.fault.Load() != nil:
		q.waits.none()
		return wait
	}
	return q.batches(arm)
}

// tryLock locks the queue unless it is locked, or about to be. Who has it then wakes the worker afterwards.
func (q *queue) tryLock() bool {
	if !q.attention.Load() && q.mu.TryLock() {
		return true
	}
	q.passed.Store(true) // before another look: who unlocks looks at passed behind that
	return !q.attention.Load() && q.mu.TryLock()
}

// batches moves batches until there is nothing to do, somebody else wants the queue, or they were many.
func (q *queue) batches(arm bool) (next step) {
	worked := false
	for range turns {
		if q.fromGuest {
			next = q.transmit(arm && !worked)
		} else {
			next = q.receive(arm && !worked)
		}
		switch {
		case next == idle && worked:
			return again // polling begins at the last work
		case next != again || q.broken != nil || q.attention.Load():
			return next
		}
		if worked = true; q.worker.shared {
			return again // there may be an answer already
		}
	}
	return next
}

// recovered goes on after a fault, or waits for the end of the session.
func (q *queue) recovered(f *shm.Fault) step {
	if q.unwound(f) {
		return again
	}
	q.waits.none()
	return wait
}

// transmit moves one batch from the guest to the device.
func (q *queue) transmit(arm bool) step {
	if q.settling() {
		q.waits = waitSet{kick: -1, device: -1, reap: -1, pollKick: true}
		return wait
	}
	w := q.window
	status := vring.Popped
	if len(q.unsent) == 0 {
		var n int
		n, status = w.Pop(q.batch[:])
		q.unsent = q.batch[:n]
		if q.check {
			q.unsent = q.validate(q.unsent)
		}
	}
	frames := len(q.unsent)
	switch {
	case frames == 0:
	case q.enabled:
		frames = q.dev.Send(q.unsent)
		q.unsent = q.unsent[frames:]
	default: // a ring that is started and disabled is emptied (vhost-user: "Ring states")
		zerocopy.ReleaseAll(q.unsent, zerocopy.Dropped)
		q.unsent = nil
	}
	q.dev.Reap()
	moved := frames + w.Reap()
	q.publish()
	switch {
	case status == vring.Broken:
		q.breakRing(q.ring.Err())
		return again
	case moved > 0:
		q.ring.DisableKick()
		if q.wasted(frames) {
			return vain
		}
		return again
	case !arm:
		return idle
	}
	return q.armTransmit()
}

// enableGrace is how long a ring that has just started waits for SET_VRING_ENABLE. Tests alone change it.
var enableGrace = time.Second

// settling tells that the ring has started and was not enabled yet. What the guest sends on a disabled ring is discarded, but front-ends
// enable a ring a moment after they start it, and a frame that waits there at a reconnect, or is sent in between, need not be lost.
func (q *queue) settling() bool {
	return !q.enabled && !q.wasEnabled && time.Since(q.startedAt) < enableGrace
}

// armTransmit asks for every notification that can end the wait, and looks once more.
func (q *queue) armTransmit() step {
	q.waits = waitSet{kick: q.kick, pollKick: q.kick < 0, device: -1, reap: -1}
	h, ok := q.dev.(netdev.Holder)
	if len(q.unsent) > 0 || ok && h.Held() {
		// The device is full: frames that come meanwhile are of no use yet.
		q.waits = waitSet{kick: -1, device: q.dev.SendFD(), write: true, reap: -1}
		q.waits.pollKick = q.waits.device < 0
	} else if q.window.Pending() < q.ring.Size() && q.ring.EnableKick() {
		return again
	}
	// A device that is full says when it has got room for many: frames that are done with one by one would wake the worker for each.
	if c, ok := q.dev.(netdev.Completer); ok && q.window.Pending() > 0 && q.waits.device < 0 {
		q.waits.reap = c.CompletionFD()
	}
	if p, ok := q.dev.(netdev.Putter); ok {
		p.SendIdle()
	}
	q.window.Sleep()
	if q.window.Reap() > 0 {
		q.window.Awake()
		q.publish()
		return again
	}
	return wait
}

// validate drops the frames whose virtio-net header makes no sense, before a device sees them.
func (q *queue) validate(bufs []*zerocopy.Buffer) []*zerocopy.Buffer {
	keep := bufs[:0]
	for _, b := range bufs {
		if first, last := b.HeaderWords(); virtio.NetHdrAsks(first) {
			if err := virtio.ValidateNetHdr(first, last, b.Len(), q.feat); err != nil {
				q.live.invalid++
				b.Release(zerocopy.Dropped)
				continue
			}
		}
		keep = append(keep, b)
	}
	return keep
}

// receive moves frames from the device into the guest's buffers.
func (q *queue) receive(arm bool) step {
	if !q.enabled {
		q.waits.none()
		return wait
	}
	p := q.posted
	flushed := p.Flush()
	n, empty, err := q.dev.Recv(p, batchSize)
	q.publish()
	switch {
	case p.Err() != nil:
		q.breakRing(p.Err())
		return again
	case err != nil:
		q.deviceError(err)
		return wait
	case (n > 0 || p.Stats.Malformed != q.bad) && q.wasted(n):
		q.ring.DisableKick()
		return vain
	case n > 0:
		q.ring.DisableKick()
		return again
	case !arm:
		return idle
	}
	q.waits = waitSet{kick: -1, device: -1, reap: -1}
	if empty && flushed {
		q.waits.device = q.dev.RecvFD()
		return wait
	}
	// A frame waits for the guest to post more.
	if q.ring.EnableKick() {
		q.ring.DisableKick()
		return again
	}
	q.waits.kick, q.waits.pollKick = q.kick, q.kick < 0
	return wait
}

// publish lets the driver see what was returned, and calls it when it wants that.
func (q *queue) publish() {
	q.ring.Publish()
	if q.ring.NeedsCall() {
		q.notify()
	}
}

// breakRing stops a ring that the guest has broken: the front-end is told, and nothing is read from it again.
func (q *queue) breakRing(err error) {
	q.broken = err
	q.s.b.guestErrors.Add(1)
	q.s.b.log.Warn("queue stopped: the guest broke its ring", "queue", q.index, "error", err)
	q.signal(q.errfd)
}

// deviceError ends reception: nothing will come from this device.
func (q *queue) deviceError(err error) {
	if !q.live.deviceFailed {
		q.live.deviceFailed = true
		q.s.b.log.Error("the device cannot receive", "queue", q.index, "error", err)
	}
	q.waits.none()
}

// notify calls the driver.
func (q *queue) notify() {
	if q.call < 0 {
		return
	}
	q.live.calls++
	if !q.signal(q.call) {
		q.live.callErrors++
	}
}
