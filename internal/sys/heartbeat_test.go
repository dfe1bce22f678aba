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
	if n, beating := beats(); n != 0 || beating {
		t.Fatalf("before the first sleeper: %d beats, %v", n, beating)
	}
	first, second := Heartbeat(), Heartbeat()
	first()
	first() // counts once
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(beat / 10) {
		if n, beating := beats(); !beating {
			t.Fatal("it stopped with one sleeper left")
		} else if n >= 2 {
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
