package l2switch

import (
	"sync"
	"time"
)

// bucketRate is a token bucket: it fills at rate tokens a second up to burst. Several threads may take from it.
type bucketRate struct {
	rate, burst float64 // a rate of 0 is no limit
	*fill
}

// fill is the state of a token bucket.
type fill struct {
	sync.Mutex
	tokens float64
	at     time.Duration
}

// newBucket returns a full bucket. A burst of 0 is a tenth of a second's worth, and at least least.
func newBucket(rate, burst uint64, least float64) bucketRate {
	b := bucketRate{rate: float64(rate), burst: float64(burst)}
	if rate == 0 {
		return bucketRate{}
	}
	if burst == 0 {
		b.burst = b.rate / 10
	}
	b.burst = max(b.burst, least)
	b.fill = &fill{tokens: b.burst}
	return b
}

// keep goes on with what was in a bucket like this one.
func (b *bucketRate) keep(before bucketRate) {
	if b.fill != nil && b.rate == before.rate && b.burst == before.burst {
		b.fill = before.fill
	}
}

// take takes n tokens if there are as many.
func (b *bucketRate) take(n float64, now time.Duration) bool {
	if b.rate == 0 {
		return true
	}
	b.Lock()
	defer b.Unlock()
	b.refill(b, now)
	if b.tokens < n {
		return false
	}
	b.tokens -= n
	return true
}

// refill adds what has come since the last look. now may be a little earlier, of another thread.
func (f *fill) refill(b *bucketRate, now time.Duration) {
	if d := now - f.at; d > 0 {
		f.tokens = min(f.tokens+d.Seconds()*b.rate, b.burst)
		f.at = now
	}
}

// give puts n tokens back.
func (b *bucketRate) give(n float64) {
	if b.rate == 0 {
		return
	}
	b.Lock()
	defer b.Unlock()
	b.tokens = min(b.tokens+n, b.burst)
}

// limiter is a Limit at work.
type limiter struct {
	on            bool
	frames, bytes bucketRate
}

// newLimiter returns a limiter. The largest frame fits its burst whatever that is.
func newLimiter(l Limit, maxLen int) limiter {
	return limiter{
		on: l.Frames|l.Bytes != 0, frames: newBucket(l.Frames, l.BurstFrames, 1), bytes: newBucket(l.Bytes, l.BurstBytes, float64(maxLen)),
	}
}

// pass takes a frame of n bytes from both buckets, or from none.
func (l *limiter) pass(n int, now time.Duration) bool {
	if !l.frames.take(1, now) {
		return false
	}
	if !l.bytes.take(float64(n), now) {
		l.frames.give(1)
		return false
	}
	return true
}

// What is storm-controlled.
const (
	stormBroadcast = iota
	stormMulticast
	stormUnknown
	numStorms
)

// limit makes the buckets.
func (r *rules) limit(before *rules) {
	// A segmented frame counts as it is, and is longer than the MTU.
	const largest = maxMTU + etherLen + tagLen
	c := r.cfg
	r.fromGuest, r.toGuest = newLimiter(c.FromGuest, largest), newLimiter(c.ToGuest, largest)
	for i, rate := range []uint64{c.Storm.Broadcast, c.Storm.Multicast, c.Storm.UnknownUnicast} {
		r.storm[i] = newBucket(rate, 0, 1)
	}
	if before == nil {
		return
	}
	r.fromGuest.frames.keep(before.fromGuest.frames)
	r.fromGuest.bytes.keep(before.fromGuest.bytes)
	r.toGuest.frames.keep(before.toGuest.frames)
	r.toGuest.bytes.keep(before.toGuest.bytes)
	for i := range r.storm {
		r.storm[i].keep(before.storm[i])
	}
}
