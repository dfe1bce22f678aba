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
	wasteLimit   = 1024 // chains that hold no frame, or one whose header makes no sense, more than good ones
	wasteMost    = wasteLimit + 256
	wastePause   = time.Millisecond // for a batch of them
)

// wasted weighs the chains of a queue that were worked on for nothing against the frames that it carried, and tells whether there were too many: the worker
// then has a pause after each batch, and the processor is others'. A guest that sends as many good frames as bad chains is not held up, and one that mends
// its ways soon is not.
func (q *queue) wasted(frames int) bool {
	bad := q.live.invalid
	if q.window != nil {
		bad += q.window.Stats.Malformed
	} else {
		bad += q.posted.Stats.Malformed
	}
	if bad == q.bad && q.waste == 0 {
		return false
	}
	q.waste = min(max(q.waste+int(bad-q.bad)-frames, 0), wasteMost)
	q.bad = bad
	return q.waste > wasteLimit
}

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
