package backend

import (
	"testing"

	"github.com/vhostd/vhostd/zerocopy"
)

// TestWasted: bad chains count until as many frames have come, those of a ring that has stopped included.
func TestWasted(t *testing.T) {
	q := &queue{window: new(zerocopy.Window)}
	batch := func(bad uint64, frames int) bool {
		q.window.Stats.Malformed += bad / 2
		q.live.invalid += bad - bad/2
		return q.wasted(frames)
	}
	for range 10000 {
		if batch(32, 32) {
			t.Fatal("held up for as many bad chains as frames")
		}
	}
	if batch(wasteLimit, 0) {
		t.Error("held up at the limit")
	}
	for range 100 {
		if !batch(1, 0) {
			t.Fatal("not held up beyond the limit")
		}
	}
	q.window, q.bad, q.live = new(zerocopy.Window), 0, counters{} // as for a ring that starts anew
	if !q.wasted(1) || batch(0, wasteMost-wasteLimit) {
		t.Error("held up for longer than until the frames make up for it")
	}
	if q.waste > wasteLimit {
		t.Errorf("%d left", q.waste)
	}
}
