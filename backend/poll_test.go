package backend

import (
	"testing"
	"time"
)

// TestPoller has work come at gaps, and thread wake-ups take their time: polling catches what comes within its limit, and costs next to nothing
// where it cannot.
func TestPoller(t *testing.T) {
	const us = time.Microsecond
	for _, c := range []struct {
		name      string
		gaps      []time.Duration
		wake      time.Duration
		caught    [2]int        // of 100 events, from and to
		mostSpent time.Duration // polling in vain, an event
	}{
		{"back to back", []time.Duration{us}, 40 * us, [2]int{99, 100}, 0},
		{"within the limit", []time.Duration{25 * us}, 20 * us, [2]int{99, 100}, us},
		{"just beyond, quick to wake", []time.Duration{35 * us}, 20 * us, [2]int{0, 0}, 2 * us},
		{"just beyond, slow to wake", []time.Duration{35 * us}, 45 * us, [2]int{0, 0}, 2 * us},
		{"far beyond", []time.Duration{50 * us}, 10 * us, [2]int{0, 0}, 2 * us},
		{"quiet", []time.Duration{10 * time.Millisecond}, 40 * us, [2]int{0, 0}, 0},
		{"a pause now and then", []time.Duration{3 * us, 3 * us, 3 * us, 3 * us, 3 * us, 3 * us, 3 * us, 3 * us, 3 * us, 500 * us}, 40 * us, [2]int{60, 90}, 5 * us},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := poller{limit: 30 * us}
			now := time.Unix(1, 0)
			caught, spent := 0, time.Duration(0)
			const events = 10_000
			for i := range events {
				work := now.Add(c.gaps[i%len(c.gaps)])
				from := now
				for now.Before(work) && p.more(now) {
					now = now.Add(us / 2)
				}
				if !now.Before(work) {
					p.worked()
					caught++
					continue
				}
				spent += now.Sub(from)
				asleep := work.Sub(now) + c.wake
				now = now.Add(asleep)
				p.slept(asleep)
				p.worked()
			}
			if percent := caught * 100 / events; percent < c.caught[0] || percent > c.caught[1] {
				t.Errorf("%d %% of the work was found by polling, want %v", percent, c.caught)
			}
			if mean := spent / events; mean > c.mostSpent {
				t.Errorf("%v of polling in vain for each event, want %v at most", mean, c.mostSpent)
			}
		})
	}
}

// TestPollerWithoutLimit never polls.
func TestPollerWithoutLimit(t *testing.T) {
	var p poller
	for range 100 {
		if p.more(time.Now()) {
			t.Fatal("polling, without a limit")
		}
		p.slept(time.Microsecond)
		p.worked()
	}
}
