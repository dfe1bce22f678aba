package main

import (
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The placement classes of the two processors.
const (
	near = "near"
	far  = "far"
)

// nearMax is the longest round trip of a cache line between processors that share a cache.
const nearMax = 150 * time.Nanosecond

// realtime is the priority of the probe, above the polling processes it interrupts for a moment.
const realtime = 10

// placement measures the round trip of a cache line between the two processors: the best of a few short rounds, as an interruption can
// only make one longer.
func placement() string {
	const rounds, trips = 5, 2000
	best := time.Hour
	var ball atomic.Uint32
	stop := make(chan struct{})
	ready := make(chan struct{})
	go func() { // the far end
		pin(guestCPU)
		close(ready)
		for {
			if v := ball.Load(); v == quitBall {
				close(stop)
				return
			} else if v%2 == 1 {
				ball.Store(v + 1)
			}
		}
	}()
	<-ready
	done := make(chan struct{})
	go func() {
		defer close(done)
		pin(backCPU)
		for range rounds {
			from := time.Now()
			v := ball.Load()
			for range trips {
				ball.Store(v + 1)
				for ball.Load() != v+2 {
				}
				v += 2
			}
			best = min(best, time.Since(from)/trips)
		}
		ball.Store(quitBall)
	}()
	<-done
	<-stop
	if best < nearMax {
		return near
	}
	return far
}

// quitBall ends the far end; the rounds never get there.
const quitBall = 1 << 31

// pin gives the goroutine a thread of its own on one processor, at real-time priority. The thread ends with the goroutine.
func pin(cpu int) {
	runtime.LockOSThread()
	var set unix.CPUSet
	set.Set(cpu)
	_ = unix.SchedSetaffinity(0, &set)
	_ = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: realtime}, 0)
}
