package udp

import "time"

// Bounds of the throttle.
const (
	throttleWindow = 64 // reports after which the share of copies is looked at
	throttleProbe  = 8  // frames that try again after a pause
	minPause       = 10 * time.Millisecond
	maxPause       = time.Second
)

type throttleState uint8

const (
	open    throttleState = iota // zero-copy as it comes
	pausing                      // copy until the pause is over
	probing                      // a few frames try again
)

// throttle turns what the kernel reports into whether zero-copy is worth trying. Half of the frames of a window copied anyway, as with a
// local receiver or a capture on the path, start a pause; then a few frames try again, and the next pause is longer or there is none.
// It never stays shut for good.
type throttle struct {
	always         bool // never pauses
	state          throttleState
	pause          time.Duration
	until          time.Time // end of the pause; when probing, of the wait for the probes' reports
	budget         int       // frames that may still probe
	pages, copied  int       // reports since the last decision
	Pauses, Probes uint64
}

// allow reports whether a frame may go without a copy.
func (t *throttle) allow() bool {
	if t.always || t.state == open {
		return true
	}
	if t.state == pausing || t.budget == 0 {
		now := time.Now()
		if now.Before(t.until) {
			return false
		}
		t.state, t.budget, t.until = probing, throttleProbe, now.Add(maxPause)
		t.pages, t.copied = 0, 0
		t.Probes++
	}
	t.budget--
	return true
}

// giveBack says that nothing will be reported of a frame that was allowed.
func (t *throttle) giveBack() {
	if t.state == probing && t.budget < throttleProbe {
		t.budget++
	}
}

// report takes what the kernel said of a frame.
func (t *throttle) report(copied bool) {
	if t.always || t.state == pausing {
		return
	}
	if copied {
		t.copied++
	} else {
		t.pages++
	}
	n := t.pages + t.copied
	if t.state == open && n < throttleWindow || t.state == probing && n < throttleProbe {
		return
	}
	if 2*t.copied >= n {
		t.pause = min(max(2*t.pause, minPause), maxPause)
		t.state, t.until = pausing, time.Now().Add(t.pause)
		t.Pauses++
	} else {
		if t.state == probing {
			t.pause = 0
		}
		t.state = open
	}
	t.pages, t.copied = 0, 0
}
