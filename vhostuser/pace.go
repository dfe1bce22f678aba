package vhostuser

import "time"

// How many messages a front-end may send: a front-end that starts, migrates or plugs memory sends some hundreds and rests. One that never rests would keep a
// processor busy that other sessions' workers want, and the process's memory map locked that they fault on.
const (
	DefaultMessageRate = 2000 // messages a second in the long run
	paceBurst          = 4096 // messages at once
	paceHeavy          = 8    // that a message counts for which all queues stand still, or a queue starts or ends
)

// Pace is a budget of messages. Sessions that follow each other share one: who hangs up and comes back has no more than who stays.
type Pace struct {
	rate float64 // messages a second; less than 0: as many as come
	left float64
	at   time.Time // when left was right; zero: never yet
}

// NewPace returns a full budget, of so many messages a second in the long run. 0 is DefaultMessageRate, less than 0 is no bound, for front-ends that are
// trusted.
func NewPace(rate float64) *Pace {
	if rate == 0 {
		rate = DefaultMessageRate
	}
	return &Pace{rate: rate}
}

// spend takes a message from the budget, and tells how long to wait before the next one is served.
func (p *Pace) spend(cost float64, now time.Time) time.Duration {
	if p.rate < 0 {
		return 0
	}
	if p.at.IsZero() {
		p.left, p.at = paceBurst, now
	}
	p.left = min(p.left+p.rate*now.Sub(p.at).Seconds(), paceBurst) - cost
	p.at = now
	if p.left >= 0 {
		return 0
	}
	return time.Duration(-p.left / p.rate * float64(time.Second))
}

// cost is what a request takes from the budget.
func cost(r Request) float64 {
	if frontEndTable[r].pause == PauseAll || r == ReqSetVringKick || r == ReqGetVringBase {
		return paceHeavy
	}
	return 1
}

// rest waits as long as the budget says, or until the connection is closed.
func (s *session) rest(r Request) {
	d := s.opts.Pace.spend(cost(r), time.Now())
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.conn.Closed():
	}
}
