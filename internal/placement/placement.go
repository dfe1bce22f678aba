// Package placement tells how far apart two processors are at the moment, and what the threads of a process had of theirs.
//
// # Theory of operation
//
// On a shared machine the hypervisor moves the virtual processors that a comparison runs on: sometimes two of them share a cache ("near", a
// line travels there and back in some 60 ns), sometimes not ("far", some 310 ns). What two polling threads reach together differs by up to
// four times between the two, so a rate means something only with its class, and rates are compared within a class. Nothing tells
// a guest of such moves: the round trip is measured, before and after every second that is to count. Each measurement takes a few
// milliseconds, in which it borrows both processors.
//
// A second also counts only if the threads had the processors for themselves: the kernel keeps, for each thread, how long it waited for a
// processor although it could have run (Waited).
package placement

import (
	"fmt"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Class is how far apart two threads ran.
type Class string

// The classes. Same, Moved and Unknown are those in which a rate says nothing about any other second.
const (
	Near    Class = "near"    // the processors share a cache
	Far     Class = "far"     // they do not
	Same    Class = "same"    // one processor for both threads
	Moved   Class = "moved"   // another class before than after
	Unknown Class = "unknown" // it cannot be told where one of them ran
)

// Classes are all classes, the comparable ones first.
var Classes = []Class{Near, Far, Same, Moved, Unknown}

// NearMax is the longest round trip of a cache line between processors that share a cache: some 60 ns on one kind of machine, where others take
// 310 ns, and 110 to 230 ns on another, where all share one.
const NearMax = 250 * time.Nanosecond

// MaxWaited is the most that the two threads may have waited for their processors in a second that is to count: a little more than the twentieth that the
// kernel keeps back for others from threads at real-time priority.
const MaxWaited = 60 * time.Millisecond

// realtime is the priority of the probe, above the polling threads that it interrupts for a moment.
const realtime = 10

// The probe takes the best of a few rounds of some trips, as an interruption can only make one longer, and gives up after probeLimit.
const (
	rounds     = 5
	trips      = 2000
	probeLimit = 100 * time.Millisecond
)

// Between measures the round trip of a cache line between processors a and b, and says what class that is.
func Between(a, b int) (Class, time.Duration) {
	switch {
	case a < 0 || b < 0:
		return Unknown, 0
	case a == b:
		return Same, 0
	}
	rtt, err := roundTrip(a, b)
	switch {
	case err != nil:
		return Unknown, 0
	case rtt < NearMax:
		return Near, rtt
	}
	return Far, rtt
}

// Merge is the class of a second that began in one class and ended in another.
func Merge(before, after Class) Class {
	if before != after {
		return Moved
	}
	return before
}

// ball is the cache line that travels; no other variable shares it.
type ball struct {
	_     [64]byte
	count atomic.Uint32
	_     [60]byte
	quit  atomic.Bool
}

// roundTrip plays ball between two processors.
func roundTrip(a, b int) (time.Duration, error) {
	var ball ball
	ready := make(chan error)
	farDone := make(chan struct{})
	go func() { // the far end
		defer close(farDone)
		err := pin(b)
		ready <- err
		if err == nil {
			ball.giveBack()
		}
	}()
	if err := <-ready; err != nil {
		return 0, err
	}
	var best time.Duration
	done := make(chan error)
	go func() {
		err := pin(a)
		if err == nil {
			best = ball.play(time.Now().Add(probeLimit))
		}
		ball.quit.Store(true)
		done <- err
	}()
	err := <-done
	<-farDone
	if err == nil && best == 0 {
		err = fmt.Errorf("no round trip between processors %d and %d within %v", a, b, probeLimit)
	}
	return best, err
}

// giveBack answers until the near end quits.
func (b *ball) giveBack() {
	for i := 0; ; i++ {
		if v := b.count.Load(); v%2 == 1 {
			b.count.Store(v + 1)
		} else if i%64 == 0 && b.quit.Load() {
			return
		}
	}
}

// play returns the shortest mean round trip of a round, or 0 when none ended before the deadline.
func (b *ball) play(deadline time.Time) (best time.Duration) {
	v := b.count.Load()
	for range rounds {
		from := time.Now()
		for range trips {
			b.count.Store(v + 1)
			for n := 1; b.count.Load() != v+2; n++ {
				if n%4096 == 0 && time.Now().After(deadline) {
					return best
				}
			}
			v += 2
		}
		if d := time.Since(from) / trips; best == 0 || d < best {
			best = max(d, 1)
		}
	}
	return best
}

// pin gives the goroutine a thread of its own on one processor, at real-time priority where that is allowed. The thread ends with the
// goroutine.
func pin(cpu int) error {
	runtime.LockOSThread()
	if err := Pin(cpu); err != nil {
		return err
	}
	_ = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: realtime}, 0)
	return nil
}

// Pin moves the calling thread to a processor, and keeps it there. The goroutine must be locked to its thread.
func Pin(cpu int) error {
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("processor %d: %w", cpu, err)
	}
	return nil
}

// CPU is the processor that the calling thread runs on, or -1.
func CPU() int {
	cpu, _, err := getcpu()
	if err != nil {
		return -1
	}
	return cpu
}

// Median is the middle one of some rates, the upper of the two middle ones when they are even; 0 of none.
func Median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Clone(v)
	slices.Sort(s)
	return s[len(s)/2]
}
