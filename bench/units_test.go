package bench

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vhostd/vhostd/internal/placement"
)

func TestHistogram(t *testing.T) {
	var h Histogram
	if h.Summary() != nil || h.Quantile(0.5) != 0 {
		t.Error("an empty histogram has a summary")
	}
	var all []time.Duration
	r := rand.New(rand.NewPCG(1, 2))
	for range 10000 {
		d := time.Duration(r.ExpFloat64() * 50000)
		all = append(all, d)
		h.Add(d)
	}
	slices.Sort(all)
	for _, q := range []float64{0, 0.01, 0.5, 0.9, 0.99, 0.999, 1} {
		want := all[min(int(q*float64(len(all))), len(all)-1)]
		if got := h.Quantile(q); got < want || got > want+want/subs+1 {
			t.Errorf("quantile %v is %v, want %v", q, got, want)
		}
	}
	l := h.Summary()
	if l.Count != 10000 || l.Min != all[0] || l.Max != all[9999] {
		t.Errorf("%+v, want %v to %v", l, all[0], all[9999])
	}
	var two Histogram
	two.Add(time.Hour) // more than there are buckets for
	two.Add(-1)
	two.Merge(&h)
	two.Merge(&Histogram{})
	if got := two.Summary(); got.Count != 10002 || got.Max != time.Hour || got.Min != -1 {
		t.Errorf("%+v", got)
	}
}

// TestBuckets: they are in order, without gaps, and hold what they are for.
func TestBuckets(t *testing.T) {
	for i := range buckets - 1 {
		if bucket(upper(i)) != i || bucket(upper(i)+1) != i+1 {
			t.Fatalf("bucket %d ends at %d, which is in %d; the next is in %d", i, upper(i), bucket(upper(i)), bucket(upper(i)+1))
		}
	}
}

func TestFrames(t *testing.T) {
	for _, n := range []int{MinFrame, 61, 62, 67, 1514, MaxFrame} {
		f := make([]byte, n)
		writeHead(f, 7, 12345, 99)
		writeBody(f, 12345)
		if !tagged(f, 7) || tagged(f, 8) || tagged(f[:offBody-1], 7) || numberOf(f) != 12345 || stampOf(f) != 99 {
			t.Fatalf("% x", f[:offBody])
		}
		f[0]++ // addresses may change
		if err := checkFrame(slices.Clone(f)); err != nil {
			t.Error(err)
		}
		for _, at := range []int{offNumber, offSum, offBody, n - 1} {
			g := slices.Clone(f)
			g[at] ^= 0x10
			if err := checkFrame(g); err == nil || !strings.Contains(err.Error(), "came back changed") {
				t.Errorf("frame of %d bytes with byte %d changed: %v", n, at, err)
			}
		}
	}
}

func TestCheck(t *testing.T) {
	good := func(change func(*Config)) Config {
		c := DefaultConfig()
		c.Path = "s"
		change(&c)
		return c
	}
	if err := good(func(*Config) {}).Check(); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*Config){
		"path of the socket is empty":        func(c *Config) { c.Path = "" },
		"must be a power of two":             func(c *Config) { c.Size = 100 },
		"queue size 0":                       func(c *Config) { c.Size, c.Packed = 0, true },
		"batches of 0 frames":                func(c *Config) { c.Batch = 0 },
		"batches of 257 frames":              func(c *Config) { c.Batch = 257 },
		"chains of 65 descriptors":           func(c *Config) { c.Chain = 65 },
		"at least 2 descriptors":             func(c *Config) { c.Indirect = true },
		"measuring for 0s":                   func(c *Config) { c.Duration = 0 },
		"spread over -1 bytes":               func(c *Config) { c.Cold = -1 },
		"processor -2":                       func(c *Config) { c.CPU = -2 },
		"no frame length":                    func(c *Config) { c.Frames = nil },
		"frames of 59 bytes, must be 60":     func(c *Config) { c.Frames = []int{64, 59} },
		"frames of 60 bytes in 61 descripto": func(c *Config) { c.Frames, c.Chain = []int{60}, 61 },
		"receive buffers of 12 bytes":        func(c *Config) { c.Buffer = 12 },
		"unknown direction":                  func(c *Config) { c.Direction = "up" },
		"a rate of -1":                       func(c *Config) { c.Rate = -1 },
		"a rate is for frames that the gues": func(c *Config) { c.Rate, c.Direction = 1, HostToGuest },
		"exclude each other":                 func(c *Config) { c.Rate, c.Think, c.Direction = 1, 1, Echo },
		"between frames is for echo":         func(c *Config) { c.Think = time.Second },
		"-1 frames under way":                func(c *Config) { c.Window, c.Direction = -1, Echo },
		"a rate and a number of frames":      func(c *Config) { c.Window, c.Rate, c.Direction, c.To = 1, 1, Through, "to" },
		"65 frames under way, must be 1 to":  func(c *Config) { c.Window, c.Chain, c.Direction = 65, 4, Echo },
		"verified with echo, or through":     func(c *Config) { c.Verify = true },
	} {
		if err := good(change).Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// TestSummarize: medians of the quiet seconds of each class, sums of all.
func TestSummarize(t *testing.T) {
	second := func(class placement.Class, quiet bool, frames uint64) Second {
		return Second{Class: class, Quiet: quiet, Length: time.Second / 2, GuestToHost: Count{frames, 100 * frames}, BackendCPU: 0.5}
	}
	r := Result{Seconds: []Second{
		second(placement.Near, true, 10), second(placement.Near, true, 30), second(placement.Near, true, 20),
		second(placement.Far, true, 5), second(placement.Near, false, 1),
	}}
	var hists []*Histogram
	for i := range r.Seconds {
		h := &Histogram{}
		h.Add(time.Duration(i + 1))
		hists = append(hists, h)
	}
	r.summarize(hists)
	rates := func(n int, frames float64, count uint64, min, p50, max time.Duration) *Rates {
		return &Rates{Seconds: n, GuestToHost: Rate{frames, 800 * frames}, BackendCPU: 0.5,
			Latency: &Latency{count, min, p50, max, max, max, max}}
	}
	want := map[placement.Class]*Rates{placement.Near: rates(3, 40, 3, 1, 2, 3), placement.Far: rates(1, 10, 1, 4, 4, 4)}
	if diff := cmp.Diff(want, r.Classes); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(rates(1, 2, 1, 5, 5, 5), r.Disturbed); diff != "" {
		t.Error(diff)
	}
	if r.GuestToHost != (Count{66, 6600}) || r.HostToGuest != (Count{}) || r.Latency.Count != 5 || r.Latency.P50 != 3 {
		t.Errorf("%+v, %+v, %+v", r.GuestToHost, r.HostToGuest, r.Latency)
	}
}
