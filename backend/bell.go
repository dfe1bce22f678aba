package backend

import (
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
)

// bell is how a queue signals eventfds of the front-end's. Such a write can wait: whoever handed the descriptor over has the open file too, and can make it block
// again and fill the counter at any moment, and the kernel knows no write to an eventfd that does not heed the file's flags. It would hold up the queue, whoever wants
// its lock and, at a door, another guest's worker. So while there are writes, a watch looks now and then whether one has not come back since its last look. Is
// that for a counter that is full, the watch empties it, which lets the write through, and the session ends. When it looks is left to chance: else each write could be
// kept waiting for a little less than from one look to the next, time and again.
type bell struct {
	writes  atomic.Uint64 // that have begun, and that have ended: odd while one is under way
	fd      atomic.Int32  // that is written to
	watched atomic.Bool   // timer is set
	timer   *time.Timer   // of the watch
	seen    uint64        // writes at the last look; the watch's own
	mu      sync.Mutex    // the watch has fd: it is not closed meanwhile
}

const (
	bellLook  = 5 * time.Millisecond // between two looks of the watch, at most
	bellPause = time.Second          // until the next session of a front-end that kept a write waiting
)

var errBell = errors.New("a descriptor for notifications kept a write waiting")

func (q *queue) newBell() {
	q.bell.timer = time.AfterFunc(time.Hour, q.watch)
	q.bell.timer.Stop()
}

// signal adds one to an eventfd of the front-end; -1 is none. A full counter is signalled already. The queue is locked.
func (q *queue) signal(fd int) bool {
	switch {
	case fd < 0:
		return true
	case q.s.mute.Load():
		return false
	}
	b := &q.bell
	b.fd.Store(int32(fd))
	b.writes.Add(1)
	if !b.watched.Load() && b.watched.CompareAndSwap(false, true) {
		b.set()
	}
	one := [8]byte{1}
	_, err := unix.Write(fd, one[:])
	b.writes.Add(1)
	return err == nil || errors.Is(err, unix.EAGAIN)
}

// setBell is setFD for a descriptor that is signalled.
func (q *queue) setBell(fd *int, to int) {
	q.bell.mu.Lock()
	defer q.bell.mu.Unlock()
	setFD(fd, to)
}

// watch is a look at the writes.
func (q *queue) watch() {
	b := &q.bell
	n := b.writes.Load()
	switch {
	case n != b.seen:
		b.seen = n
	case n%2 == 0: // all is quiet
		b.watched.Store(false)
		if b.writes.Load() == n || !b.watched.CompareAndSwap(false, true) {
			return
		}
	default:
		q.letThrough(n)
	}
	b.set()
}

// set has the watch look again.
func (b *bell) set() { b.timer.Reset(rand.N(bellLook)) }

// letThrough ends write n if it waits. More than once, since others may wait to fill the counter as well.
func (q *queue) letThrough(n uint64) {
	b := &q.bell
	b.mu.Lock()
	defer b.mu.Unlock()
	for until := time.Now().Add(bellLook); b.writes.Load() == n && full(int(b.fd.Load())) && time.Now().Before(until); {
		q.s.mute.Store(true) // nothing more is written
		var count [8]byte
		_, _ = sys.ReadNow(int(b.fd.Load()), count[:])
		runtime.Gosched()
	}
	if q.s.mute.Load() {
		q.s.fail(errBell)
	}
}

// full tells that an eventfd takes no write: not merely that this thread was late to make it. What the kernel itself signals (asynchronous I/O, say) can bring the
// counter to where a poll tells of an error, and a write waits as well.
func full(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	_, err := unix.Poll(p, 0)
	return err == nil && p[0].Revents&unix.POLLOUT == 0
}
