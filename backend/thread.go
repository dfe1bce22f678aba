package backend

import (
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
)

// worker is an operating system thread and the queues that it serves: one, or with Options.PairWorkers both of a pair. The thread runs while a
// ring of these is started.
type worker struct {
	shared bool // it serves two queues

	wakeMu sync.Mutex // guards wake against its end: a late release may still want to signal
	wake   *sys.EventFD

	mu     sync.Mutex               // innermost; guards changes of queues
	queues atomic.Pointer[[]*queue] // whose rings are started, transmitqs first: what they send may be there for the receiveq at once

	// The thread's own.
	poll   poller
	fds    []unix.PollFd
	barren int // kicks since there was work
}

func newWorker(o Options) (*worker, error) {
	wake, err := sys.NewEventFD()
	if err != nil {
		return nil, err
	}
	w := &worker{shared: o.PairWorkers, wake: wake, poll: poller{limit: o.Poll}}
	w.queues.Store(new([]*queue))
	return w, nil
}

// signal ends the worker's wait. Any goroutine may call it, at any time.
func (w *worker) signal() {
	w.wakeMu.Lock()
	defer w.wakeMu.Unlock()
	if w.wake.FD() >= 0 {
		w.wake.Signal()
	}
}

// close frees the descriptor of a worker whose queues have stopped.
func (w *worker) close() {
	w.wakeMu.Lock()
	defer w.wakeMu.Unlock()
	_ = w.wake.Close()
}

// join gives the worker a queue whose ring has started. If it sleeps, it has to be woken.
func (w *worker) join(q *queue) {
	w.mu.Lock()
	defer w.mu.Unlock()
	queues := append(slices.Clone(*w.queues.Load()), q)
	slices.SortFunc(queues, func(a, b *queue) int { return b.index - a.index })
	w.queues.Store(&queues)
	if len(queues) == 1 {
		addProc()
		go w.run()
	}
}

// leave takes a queue whose ring has stopped from the worker, and reports whether it was the last one.
func (w *worker) leave(q *queue) (last bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	queues := slices.DeleteFunc(slices.Clone(*w.queues.Load()), func(o *queue) bool { return o == q })
	w.queues.Store(&queues)
	return len(queues) == 0
}
