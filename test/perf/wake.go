package main

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/placement"
	"github.com/vhostd/vhostd/internal/sys"
)

// nobody drives the rings of a work that needs no back-end.
const nobody = "nobody"

// wakes is how many wake-ups a sample is the median of.
const wakes = 200

// wakeAlone measures what a wake-up takes on this machine, without a back-end: from before the write to an eventfd on one processor until a thread
// on the other, which waited in ppoll(2), has stored a word. What a back-end that sleeps takes for an echo has this in it.
func (o options) wakeAlone(gap time.Duration) (all []sample, err error) {
	fd, err := sys.NewEventFD()
	if err != nil {
		return nil, err
	}
	defer fd.Close()
	var woken, end atomic.Bool
	ready := make(chan error)
	go func() { // its thread ends with it
		runtime.LockOSThread()
		err := placement.Pin(backCPU)
		ready <- err
		for err == nil && !end.Load() {
			_, _ = unix.Ppoll([]unix.PollFd{{Fd: int32(fd.FD()), Events: unix.POLLIN}}, nil, nil)
			fd.Drain()
			woken.Store(true)
		}
		close(ready)
	}()
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("processor %d: %w", backCPU, err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := placement.Pin(guestCPU)
		for range o.seconds {
			if err != nil {
				break
			}
			class, _ := placement.Between(backCPU, guestCPU)
			all = append(all, sample{wakeUps(fd, &woken, gap), class})
		}
		end.Store(true)
		fd.Signal()
		<-ready
		done <- err
	}()
	err = <-done // before all is read
	return all, err
}

// wakeUps is the median of wakes wake-ups, gap apart.
func wakeUps(fd *sys.EventFD, woken *atomic.Bool, gap time.Duration) float64 {
	var took []float64
	for range wakes {
		for from := time.Now(); time.Since(from) < gap; {
		}
		woken.Store(false)
		from := time.Now()
		fd.Signal()
		for !woken.Load() {
		}
		took = append(took, float64(time.Since(from)))
	}
	return placement.Median(took)
}
