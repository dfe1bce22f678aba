package sys

import (
	"sync"
	"time"
)

// beat is the longest time for which the world can stand still. Each costs the process four or five wake-ups of threads, however many sleepers there are: an idle
// vhostd is to stay idle, so it is not shorter.
var beat = 5 * time.Second

// heart is a Go timer that is due within beat as long as there are sleepers.
var heart struct {
	mu       sync.Mutex
	sleepers int
	timer    *time.Timer
	beats    int
}

// Heartbeat is for a goroutine that sleeps in system calls with no end in sight. It is called before the first of them, and end after the last.
//
// It is needed for a race in Go's runtime (measured with 1.26, and 1.27 has the same code): a goroutine that enters a system call looks whether the world is to stop before it says where it
// is, and who stops the world, a garbage collection among others, looks at each only once. One in between the two keeps its processor, and the world waits until
// its call ends: all queues of all guests stand still, for a minute or until that one wakes. (In 100,000 collections beside four threads that poll, it happened once.)
// What ends it otherwise is the runtime's monitor, which takes the processor away; but it sleeps until the next Go timer is due. So one always is, soon.
func Heartbeat() (end func()) {
	h := &heart
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.sleepers++; h.sleepers == 1 {
		h.timer = time.AfterFunc(beat, again)
	}
	return sync.OnceFunc(func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.sleepers--; h.sleepers == 0 {
			h.timer.Stop()
			h.timer = nil
		}
	})
}

func again() {
	heart.mu.Lock()
	defer heart.mu.Unlock()
	heart.beats++
	if heart.timer != nil {
		heart.timer.Reset(beat)
	}
}
