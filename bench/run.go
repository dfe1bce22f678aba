package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/placement"
)

// Run connects to a back-end, measures, and disconnects. When ctx ends, the result is that of the time until then.
func Run(ctx context.Context, c Config) (*Result, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	s, err := open(ctx, c)
	if err != nil {
		return nil, err
	}
	defer s.close()
	var quit atomic.Bool
	defer context.AfterFunc(ctx, func() { quit.Store(true) })()
	var r *Result
	done := make(chan error)
	go func() { // a thread of its own, which ends with the goroutine
		runtime.LockOSThread()
		var err error
		r, err = measure(c, s, &quit)
		done <- err
	}()
	if err := <-done; err != nil {
		return nil, err
	}
	r.Interrupted = ctx.Err() != nil
	if err := s.stop(); err != nil {
		return nil, err
	}
	return r, nil
}

// runUp is how long frames go before a window begins.
const runUp = 5 * time.Millisecond

// window is how long a window is, at most.
const window = time.Second

// patience is how long a back-end may do nothing.
func (c Config) patience() time.Duration {
	if c.Patience > 0 {
		return c.Patience
	}
	return 10 * time.Second
}

// measure is the guest's thread.
func measure(c Config, s *session, quit *atomic.Bool) (*Result, error) {
	if c.CPU >= 0 {
		if err := placement.Pin(c.CPU); err != nil {
			return nil, err
		}
	}
	e, err := newEngine(c, s, quit)
	if err != nil {
		return nil, err
	}
	w := newWatcher(s.pid)
	if _, err := e.run(c.WarmUp); err != nil {
		return nil, err
	}
	if err := e.settle(); err != nil {
		return nil, err
	}
	w.look()
	e.late = 0
	r := &Result{PID: s.pid, Features: strings.Split(s.features.String(), ",")}
	var hists []*Histogram
	total := int((c.Duration + window - 1) / window)
	var sent, came uint64
	nothing := e.empty(sent, came)
	// On a starved machine nothing may move for a while, although the back-end is well.
	for left := c.Duration; !quit.Load() && (left > 0 || nothing != nil && c.Duration-left < c.patience()); left -= window {
		length := min(left, window)
		if left <= 0 {
			length = window
		}
		second, hist, err := e.second(w, length)
		if err != nil {
			return nil, err
		}
		r.Seconds, hists = append(r.Seconds, second), append(hists, hist)
		sent, came = sent+second.GuestToHost.Frames, came+second.HostToGuest.Frames
		nothing = e.empty(sent, came)
		if c.Progress != nil {
			c.Progress(len(r.Seconds), max(total, len(r.Seconds)), second)
		}
	}
	r.summarize(hists)
	r.Kicks, r.Lost, r.Foreign, r.Behind = s.send.kicks+s.recv.kicks, e.given, e.foreign, e.late > 0
	if quit.Load() {
		return r, nil
	}
	return r, nothing
}

// second is one window.
func (e *engine) second(w *watcher, length time.Duration) (sec Second, hist *Histogram, err error) {
	if _, err := e.run(runUp); err != nil {
		return sec, nil, err
	}
	hist = &Histogram{}
	gth, htg := e.gth, e.htg
	e.hist = hist
	sec.Length, err = e.run(length)
	e.hist = &e.scrap
	if err != nil {
		return sec, nil, err
	}
	sec.GuestToHost = Count{e.gth.Frames - gth.Frames, e.gth.Bytes - gth.Bytes}
	sec.HostToGuest = Count{e.htg.Frames - htg.Frames, e.htg.Bytes - htg.Bytes}
	sec.Latency = hist.Summary()
	if err := e.settle(); err != nil {
		return sec, nil, err
	}
	seen := w.look()
	sec.Class, sec.RTT, sec.Quiet, sec.BackendCPU = seen.class, seen.rtt, seen.quiet, seen.backendCPU
	return sec, hist, nil
}

// empty says what is wrong with a back-end that took no frame, or from which none came.
func (e *engine) empty(sent, came uint64) error {
	switch {
	case e.c.Direction == Through && came == 0:
		return fmt.Errorf("none of %d frames came out of the other port: is it one of the same switch?", e.number)
	case e.c.Direction == Echo && came == 0:
		return fmt.Errorf("none of %d frames came back: does the back-end echo? (vhostd run --net null,echo=on; dpdk-testpmd --forward-mode=io)", e.number)
	case e.c.Direction.sends() && sent == 0:
		return errors.New("the back-end took no frame")
	case e.c.Direction.receives() && came == 0:
		return errors.New("no frame came: does the back-end make any? (vhostd run --net null,generate=on; dpdk-testpmd --forward-mode=txonly)")
	}
	return nil
}

// watcher tells where the two threads are, and what they had of their processors.
type watcher struct {
	self, pid, tid int
	at             time.Time
	mine, theirs   map[int]placement.Thread
	class          placement.Class
	cpus           [2]int // ours, theirs; -1: not known
}

// newWatcher belongs to the thread that calls it.
func newWatcher(pid int) *watcher {
	w := &watcher{self: os.Getpid(), pid: pid, tid: unix.Gettid(), class: placement.Unknown, cpus: [2]int{-1, -1}}
	w.count()
	return w
}

// count reads the kernel's counters.
func (w *watcher) count() {
	w.at = time.Now()
	all := placement.Threads(w.self)
	w.mine = map[int]placement.Thread{w.tid: all[w.tid]}
	switch {
	case w.pid == w.self:
		w.theirs = all
		delete(all, w.tid)
	case w.pid > 0:
		w.theirs = placement.Threads(w.pid)
	}
}

// seen is what a watcher knows of the time since it last looked.
type seen struct {
	class      placement.Class
	rtt        time.Duration
	quiet      bool
	backendCPU float64
}

// gaveWay is how long the busiest thread may have waited for others of the same process: the back-end's own work is none that disturbs it.
func (w *watcher) gaveWay(before map[int]placement.Thread, busiest int) (sum time.Duration) {
	for id, t := range w.theirs {
		if id != busiest && t.CPU == w.theirs[busiest].CPU {
			sum += t.Ran - before[id].Ran
		}
	}
	return min(sum, w.theirs[busiest].Waited-before[busiest].Waited)
}

// look ends a window and begins the next. Both threads stand still for some milliseconds.
func (w *watcher) look() (s seen) {
	mine, theirs, at := w.mine, w.theirs, w.at
	w.count()
	took := w.at.Sub(at)
	s.backendCPU = float64(placement.Ran(theirs, w.theirs)) / float64(took)
	waited := placement.Waited(mine, w.mine)
	cpus := [2]int{placement.CPU(), -1}
	if busiest, ok := placement.Busiest(theirs, w.theirs, w.tid); ok {
		cpus[1] = w.theirs[busiest].CPU
		waited += w.theirs[busiest].Waited - theirs[busiest].Waited - w.gaveWay(theirs, busiest)
	}
	s.quiet = float64(waited)/float64(took) < placement.MaxWaited.Seconds()
	class, rtt := placement.Between(cpus[0], cpus[1])
	s.class, s.rtt = placement.Merge(w.class, class), rtt
	if cpus != w.cpus && s.class != placement.Unknown {
		s.class = placement.Moved
	}
	w.class, w.cpus = class, cpus
	w.count() // the time of the probe belongs to no window
	return s
}
