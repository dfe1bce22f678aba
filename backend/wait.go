package backend

import (
	"errors"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
)

// kickless is how often a ring is looked at that has no kick descriptor, and a device that cannot be polled.
const kickless = time.Millisecond

// waitSet is what a worker waits for, beside its wake descriptor. It is filled with the queue locked, and used without.
type waitSet struct {
	kick     int  // -1: not waited for
	pollKick bool // look again after a while
	device   int  // -1: not waited for
	reap     int  // tells of frames in flight; -1: not waited for
	write    bool // device is waited for until it can be written, else read
}

// none waits for the control side only.
func (w *waitSet) none() { *w = waitSet{kick: -1, device: -1, reap: -1} }

// wait sleeps until something that the queue waits for happens.
func (q *queue) wait() {
	q.mu.Lock()
	w := q.waits
	q.live.waits++
	q.mu.Unlock()
	fds := [4]unix.PollFd{
		{Fd: int32(q.wake.FD()), Events: unix.POLLIN},
		{Fd: int32(w.kick), Events: unix.POLLIN},
		{Fd: int32(w.device), Events: unix.POLLIN},
		{Fd: int32(w.reap), Events: unix.POLLIN},
	}
	if w.write {
		fds[2].Events = unix.POLLOUT
	}
	var timeout *unix.Timespec
	if w.pollKick {
		ts := unix.NsecToTimespec(int64(kickless))
		timeout = &ts
	}
	from := time.Now()
	err := q.sleep(fds[:], timeout)
	q.poll.slept(time.Since(from))
	if err != nil && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
		panic("bug: waiting for a queue's descriptors: " + err.Error())
	}
	if fds[0].Revents != 0 {
		q.wake.Drain()
	}
	q.awake(w.kick, fds[1].Revents)
}

// brief is how long a worker sleeps without Go's scheduler, at most, on a queue whose last sleep was shorter than busy. See sys.PollBriefly for its
// upper bound.
const (
	brief = 5 * time.Millisecond
	busy  = 50 * time.Millisecond
)

// sleep waits for a descriptor. On a busy queue sleeps are many and short, and Go's scheduler has no part in them, as long as it has a processor
// for every worker. It is given a turn now and then all the same: of a goroutine that has not had one for 10 ms it suspects that it hogs its processor,
// takes that away at any system call, and has its monitor look again every 20 us.
func (q *queue) sleep(fds []unix.PollFd, timeout *unix.Timespec) error {
	if q.poll.brief && timeout == nil && enoughProcs() {
		if now := time.Now(); now.Sub(q.poll.yielded) > brief {
			q.poll.yielded = now
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

// awake takes note of what ended the wait.
func (q *queue) awake(kick int, kicked int16) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.window != nil {
		q.window.Awake()
	}
	if kicked != 0 && kick == q.kick {
		q.live.kicks++
		if !drainKick(kick) {
			// Not something that notifies: from now on the ring is polled, as if it had no kick descriptor.
			q.live.kickErrors++
			setFD(&q.kick, -1)
		}
	}
}

// drainKick empties a kick descriptor. It reports false for one that would only make the worker spin: at its end, or not readable.
func drainKick(fd int) bool {
	var b [8]byte
	n, err := unix.Read(fd, b[:])
	return n > 0 || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR)
}

// signal adds one to an eventfd of the front-end; -1 is none. A full counter is signalled already.
func signal(fd int) bool {
	if fd < 0 {
		return true
	}
	one := [8]byte{1}
	_, err := unix.Write(fd, one[:])
	return err == nil || errors.Is(err, unix.EAGAIN)
}

// poller decides how long to look for more work before sleeping. A sleep that was shorter than the limit would have been better spent
// polling, so the time grows; a longer one shrinks it, to nothing on a quiet queue.
type poller struct {
	limit, span time.Duration
	until       time.Time
	brief       bool      // the last sleep was shorter than busy
	yielded     time.Time // to Go's scheduler
}

// minPoll is the shortest span that is tried.
const minPoll = 2 * time.Microsecond

// worked says that there was work.
func (p *poller) worked() { p.until = time.Time{} }

// more tells whether to look again at once.
func (p *poller) more() bool {
	if p.span == 0 {
		return false
	}
	now := time.Now()
	if p.until.IsZero() {
		p.until = now.Add(p.span)
		return true
	}
	return now.Before(p.until)
}

// slept learns from a sleep.
func (p *poller) slept(d time.Duration) {
	p.until = time.Time{}
	p.brief = d < busy
	if d < p.limit {
		p.span = min(max(2*p.span, minPoll), p.limit)
		return
	}
	if p.span /= 2; p.span < minPoll {
		p.span = 0
	}
}
