package vhostuser

import (
	"testing"
	"time"
)

// TestPace: a burst passes at once, what follows at the rate, messages that stop all queues count for several, and a rest makes up for it.
func TestPace(t *testing.T) {
	now := time.Unix(1000, 0)
	p := NewPace(0)
	for i := range paceBurst {
		if d := p.spend(1, now); d != 0 {
			t.Fatalf("message %d of the burst waits for %v", i, d)
		}
	}
	const gap = time.Second / DefaultMessageRate
	for i := range 3 {
		if d := p.spend(1, now); d != time.Duration(i+1)*gap {
			t.Errorf("message %d after the burst waits for %v, want %v", i, d, time.Duration(i+1)*gap)
		}
	}
	now = now.Add(3 * gap)
	if d := p.spend(cost(ReqSetMemTable), now); d != paceHeavy*gap {
		t.Errorf("SET_MEM_TABLE waits for %v, want %v", d, paceHeavy*gap)
	}
	now = now.Add(time.Hour)
	for i := range paceBurst {
		if d := p.spend(cost(ReqGetFeatures), now); d != 0 {
			t.Fatalf("after an hour, message %d waits for %v", i, d)
		}
	}
	free := NewPace(-1)
	for i := range 10 * paceBurst {
		if d := free.spend(paceHeavy, now); d != 0 {
			t.Fatalf("message %d waits for %v, and there is no bound", i, d)
		}
	}
}

// TestFloodIsPaced: a front-end that floods is served at the rate, and its connection can be closed at once.
func TestFloodIsPaced(t *testing.T) {
	s := &session{conn: &Conn{closed: make(chan struct{})}, opts: Options{Pace: NewPace(0)}}
	const more = 200
	before := time.Now()
	for range paceBurst + more {
		s.rest(ReqGetFeatures)
	}
	// The sleep is never shorter than asked for, however busy the machine is.
	if took, least := time.Since(before), more*time.Second/DefaultMessageRate; took < least*9/10 {
		t.Errorf("%d messages beyond the burst took %v, want %v at least", more, took, least)
	}
	s.opts.Pace.left = -3600 * DefaultMessageRate // an hour's worth
	close(s.conn.closed)
	s.rest(ReqGetFeatures) // returns
}
