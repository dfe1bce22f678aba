package backend

import "time"

// poller decides how long to look for more work before sleeping. A sleep that was shorter than the limit would have been better spent
// polling, so the time grows; a longer one shrinks it, to nothing on a quiet queue.
//
// How long a sleep was is known only with the time that it took the thread to wake, which is as long as many a gap. So a short sleep is a guess that polling would
// pay, and polling that found nothing within the limit is the proof that it does not: where that is so most of the time, it is left for a while.
type poller struct {
	limit, span time.Duration
	until       time.Time // of the polling that goes on; zero: none does
	credit      int       // what polling has brought: 1 for work that was found, -missed for none within the limit
	pause       int       // sleeps to go until polling is tried again

	brief   bool      // the last sleep was shorter than busy
	yielded time.Time // to Go's scheduler
}

const (
	minPoll = 4 * time.Microsecond // the shortest span that is tried
	// wakeUp is what it takes a thread to wake on another processor: 20 to 43 us were measured.
	wakeUp    = 35 * time.Microsecond
	missed    = 2
	maxCredit = 8
	pauses    = 64
)

// worked says that there was work.
func (p *poller) worked() {
	if p.polling() {
		p.until = time.Time{}
		p.credit = min(p.credit+1, maxCredit)
	}
}

// polling tells whether more has said yes, and there was no work since.
func (p *poller) polling() bool { return !p.until.IsZero() }

// more tells whether to look again at once.
func (p *poller) more(now time.Time) bool {
	if p.span == 0 {
		return false
	}
	if p.until.IsZero() {
		p.until = now.Add(p.span)
		return true
	}
	return now.Before(p.until)
}

// slept learns from a sleep.
func (p *poller) slept(d time.Duration) {
	polled := p.polling()
	p.until = time.Time{}
	p.brief = d < busy
	switch {
	case p.limit == 0:
	case d >= p.limit+wakeUp:
		if p.span /= 2; p.span < minPoll {
			p.span = 0
		}
	case p.pause > 0:
		p.pause--
	case polled && p.span == p.limit:
		if p.credit -= missed; p.credit < 0 {
			p.span, p.credit, p.pause = 0, 0, pauses
		}
	default:
		p.span = min(max(2*p.span, minPoll), p.limit)
	}
}
