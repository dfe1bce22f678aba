package backend

import (
	"errors"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
)

// kickless is how often a ring is looked at that has no kick descriptor, a device that cannot be polled, and all of them while the kernel cannot wait.
const kickless = time.Millisecond

// waitSet is what a worker waits for on behalf of a queue, beside its wake descriptor, and what came of it. It belongs to the worker's thread.
type waitSet struct {
	kick     int  // -1: not waited for
	pollKick bool // look again after a while
	device   int  // -1: not waited for
	reap     int  // tells of frames in flight; -1: not waited for
	write    bool // device is waited for until it can be written, else read

	slept  bool // the worker has waited since
	kicked bool // and kick was readable
}

// none waits for the control side only.
func (s *waitSet) none() { *s = waitSet{kick: -1, device: -1, reap: -1} }

// perQueue is how many descriptors append adds: kick, device, reap.
const perQueue = 3

// append adds what is waited for to fds.
func (s *waitSet) append(fds []unix.PollFd) []unix.PollFd {
	device := unix.PollFd{Fd: int32(s.device), Events: unix.POLLIN}
	if s.write {
		device.Events = unix.POLLOUT
	}
	return append(fds, unix.PollFd{Fd: int32(s.kick), Events: unix.POLLIN}, device, unix.PollFd{Fd: int32(s.reap), Events: unix.POLLIN})
}

// wait sleeps until something that a queue waits for happens.
func (w *worker) wait(queues []*queue) {
	w.fds = append(w.fds[:0], unix.PollFd{Fd: int32(w.wake.FD()), Events: unix.POLLIN})
	var timeout *unix.Timespec
	for _, q := range queues {
		w.fds = q.waits.append(w.fds)
		if q.waits.pollKick {
			ts := unix.NsecToTimespec(int64(kickless))
			timeout = &ts
		}
	}
	if w.barren > barrenKicks {
		time.Sleep(barrenPause) // a storm of kicks adds up to one meanwhile
	}
	from := time.Now()
	err := w.sleep(w.fds, timeout)
	w.poll.slept(time.Since(from))
	switch {
	case err == nil, errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
	case errors.Is(err, unix.ENOMEM):
		time.Sleep(kickless) // the kernel had no memory for the wait: as if there were nothing to wait for
	default:
		panic("bug: waiting for a queue's descriptors: " + err.Error())
	}
	if w.fds[0].Revents != 0 {
		w.wake.Drain()
	}
	for i, q := range queues {
		if q.waits.slept, q.waits.kicked = true, w.fds[1+perQueue*i].Revents != 0; q.waits.kicked {
			w.barren++
		}
	}
}

// brief is how long a worker sleeps without Go's scheduler, at most, of a worker whose last sleep was shorter than busy. See sys.PollBriefly for its
// upper bound.
const (
	brief = 5 * time.Millisecond
	busy  = 50 * time.Millisecond
)

// sleep waits for a descriptor. On a busy queue sleeps are many and short, and Go's scheduler has no part in them, as long as it has a processor
// for every worker. It is given a turn now and then all the same: of a goroutine that has not had one for 10 ms it suspects that it hogs its processor,
// takes that away at any system call, and has its monitor look again every 20 us.
func (w *worker) sleep(fds []unix.PollFd, timeout *unix.Timespec) error {
	if w.poll.brief && timeout == nil && enoughProcs() {
		if now := time.Now(); now.Sub(w.poll.yielded) > brief {
			w.poll.yielded = now
			runtime.Gosched()
		}
		n, errno := sys.PollBriefly(fds, brief)
		if errno != 0 {
			return errno
		}
		if n > 0 {
			return nil
		}
	}
	_, err := unix.Ppoll(fds, timeout, nil)
	return err
}

// awake takes note of what ended the wait, with the queue locked. The descriptor may be another by now.
func (q *queue) awake() {
	q.waits.slept = false
	q.live.waits++
	if q.window != nil {
		q.window.Awake()
	}
	if q.waits.kicked && q.waits.kick == q.kick {
		q.live.kicks++
		var count [8]byte
		_, _ = sys.ReadNow(q.kick, count[:]) // of an eventfd there is one error: somebody else has taken the count
	}
}
