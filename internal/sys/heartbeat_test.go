package sys

import (
	"testing"
	"time"
)

func beats() (n int, beating bool) {
	heart.mu.Lock()
	defer heart.mu.Unlock()
	return heart.beats, heart.timer != nil
}

// TestHeartbeat: a timer is due, again and again, while there is any sleeper, and none when the last has gone.
func TestHeartbeat(t *testing.T) {
	beat = 50 * time.Millisecond
	t.Cleanup(func() { beat = 5 * time.Second })
	before, beating := beats()
	if beating {
		t.Fatal("it beats before the first sleeper")
	}
	first, second := Heartbeat(), Heartbeat()
	first()
	first() // counts once
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		if n, beating := beats(); !beating {
			t.Fatal("it stopped with one sleeper left")
		} else if n >= before+2 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("it does not beat")
		}
	}
	second()
	if _, beating := beats(); beating {
		t.Error("it goes on without sleepers")
	}
	Heartbeat()()
	if _, beating := beats(); beating {
		t.Error("it goes on without sleepers")
	}
}
