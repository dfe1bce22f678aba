package backend

import (
	"context"
	"time"
)

// What a guest and its front-end may have done for nothing, before it has to wait: others share the processors and the process's memory map.
const (
	sessionBurst = 200 // front-ends, one after the other at once
	sessionRate  = 50  // a second in the long run
	barrenKicks  = 64  // kicks of a queue in which there was nothing to do, one after the other
	barrenPause  = 100 * time.Microsecond
)

// budget is what is left of a number of things that may happen at once, and come back at a rate.
type budget struct {
	left float64
	at   time.Time // zero: nothing has happened yet
}

// spend takes one, and tells how long to wait before it may happen.
func (b *budget) spend(burst, rate float64, now time.Time) time.Duration {
	if b.at.IsZero() {
		b.left, b.at = burst, now
	}
	b.left = min(b.left+rate*now.Sub(b.at).Seconds(), burst) - 1
	b.at = now
	return time.Duration(max(-b.left, 0) / rate * float64(time.Second))
}

// pause waits, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
