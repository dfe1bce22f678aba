package bench

import (
	"math/bits"
	"time"
)

// A Histogram counts durations in buckets that are at most 1/32 as wide as what they hold.
type Histogram struct {
	counts [buckets]uint64
	n      uint64
	min    time.Duration
	max    time.Duration
}

const (
	subBits = 5
	subs    = 1 << subBits
	maxBits = 40 // 18 minutes; what is longer counts as that
	buckets = (maxBits - subBits + 1) * subs
)

// bucket is where d is counted.
func bucket(d time.Duration) int {
	v := uint64(min(max(d, 0), 1<<maxBits-1))
	exp := max(bits.Len64(v)-subBits-1, 0)
	return exp<<subBits + int(v>>exp)
}

// upper is the longest duration that bucket i counts.
func upper(i int) time.Duration {
	exp := max(i>>subBits-1, 0)
	return time.Duration(uint64(i-exp<<subBits+1)<<exp - 1)
}

// Add counts a duration.
func (h *Histogram) Add(d time.Duration) {
	h.counts[bucket(d)]++
	if h.n == 0 || d < h.min {
		h.min = d
	}
	h.n++
	h.max = max(h.max, d)
}

// Merge adds what o counted.
func (h *Histogram) Merge(o *Histogram) {
	if o.n == 0 {
		return
	}
	for i, n := range o.counts {
		h.counts[i] += n
	}
	if h.n == 0 || o.min < h.min {
		h.min = o.min
	}
	h.n += o.n
	h.max = max(h.max, o.max)
}

// Quantile is a duration that at least q of all, 0 to 1, do not exceed: exact to 1/32, and 0 when nothing was counted.
func (h *Histogram) Quantile(q float64) time.Duration {
	want := uint64(q * float64(h.n))
	var seen uint64
	for i, n := range h.counts {
		if seen += n; n > 0 && (seen > want || seen == h.n) {
			return min(max(upper(i), h.min), h.max)
		}
	}
	return 0
}

// Latency sums a Histogram up. All values are nanoseconds.
type Latency struct {
	Count uint64        `json:"count"`
	Min   time.Duration `json:"min_ns"`
	P50   time.Duration `json:"p50_ns"`
	P90   time.Duration `json:"p90_ns"`
	P99   time.Duration `json:"p99_ns"`
	P999  time.Duration `json:"p99_9_ns"`
	Max   time.Duration `json:"max_ns"`
}

// Summary is nil when nothing was counted.
func (h *Histogram) Summary() *Latency {
	if h.n == 0 {
		return nil
	}
	return &Latency{h.n, h.min, h.Quantile(0.5), h.Quantile(0.9), h.Quantile(0.99), h.Quantile(0.999), h.max}
}
