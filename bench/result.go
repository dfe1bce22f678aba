package bench

import (
	"time"

	"github.com/vhostd/vhostd/internal/placement"
)

// Count is traffic in one direction; bytes are those of the frames, without virtio-net headers.
type Count struct {
	Frames uint64 `json:"frames"`
	Bytes  uint64 `json:"bytes"`
}

func (c *Count) add(o Count) {
	c.Frames += o.Frames
	c.Bytes += o.Bytes
}

// Second is one window. Nothing of what lies between two windows is counted.
type Second struct {
	Class       placement.Class `json:"class"`
	RTT         time.Duration   `json:"rtt_ns"` // of a cache line between the two threads' processors; 0: not known
	Quiet       bool            `json:"quiet"`  // neither thread had to wait for its processor, but for threads of the same process
	Length      time.Duration   `json:"length_ns"`
	GuestToHost Count           `json:"guest_to_host"` // returned by the back-end
	HostToGuest Count           `json:"host_to_guest"`
	Latency     *Latency        `json:"latency,omitempty"`
	BackendCPU  float64         `json:"backend_cpu"` // share of a processor that the back-end's process used; 0 when not known
}

// Rates are medians over the quiet seconds of one class.
type Rates struct {
	Seconds     int      `json:"seconds"`
	GuestToHost Rate     `json:"guest_to_host"`
	HostToGuest Rate     `json:"host_to_guest"`
	Latency     *Latency `json:"latency,omitempty"` // over all frames of these seconds
	BackendCPU  float64  `json:"backend_cpu"`
}

// Rate is per second.
type Rate struct {
	Frames float64 `json:"frames_per_second"`
	Bits   float64 `json:"bits_per_second"`
}

// Result is what a run measured.
type Result struct {
	Features []string                   `json:"features"`
	PID      int                        `json:"backend_pid"` // 0: not known
	Seconds  []Second                   `json:"seconds"`
	Classes  map[placement.Class]*Rates `json:"classes"` // of quiet seconds
	// Disturbed are the seconds, of any class, in which one of the threads had to wait for its processor; nil when there were none.
	Disturbed *Rates `json:"disturbed,omitempty"`

	// Over all windows.
	GuestToHost Count    `json:"guest_to_host"`
	HostToGuest Count    `json:"host_to_guest"`
	Latency     *Latency `json:"latency,omitempty"`
	Kicks       uint64   `json:"kicks"`
	Lost        uint64   `json:"lost"`    // of those that are looked for: frames that did not come back
	Foreign     uint64   `json:"foreign"` // with these: frames that this run has not sent
	Behind      bool     `json:"behind"`  // with a rate: the back-end did not keep up with it

	Interrupted bool `json:"interrupted"` // the context ended before the duration
}

// group is seconds that are summed up together.
type group struct {
	seconds []Second
	hist    Histogram
}

func (g *group) add(s Second, h *Histogram) {
	g.seconds = append(g.seconds, s)
	g.hist.Merge(h)
}

// rates is nil for no seconds.
func (g *group) rates() *Rates {
	if len(g.seconds) == 0 {
		return nil
	}
	m := medians(g.seconds)
	m.Latency = g.hist.Summary()
	return m
}

// summarize fills in what follows from the seconds. hists are theirs.
func (r *Result) summarize(hists []*Histogram) {
	var all Histogram
	var disturbed group
	classes := map[placement.Class]*group{}
	for i, s := range r.Seconds {
		r.GuestToHost.add(s.GuestToHost)
		r.HostToGuest.add(s.HostToGuest)
		all.Merge(hists[i])
		if !s.Quiet {
			disturbed.add(s, hists[i])
			continue
		}
		if classes[s.Class] == nil {
			classes[s.Class] = &group{}
		}
		classes[s.Class].add(s, hists[i])
	}
	r.Latency, r.Disturbed = all.Summary(), disturbed.rates()
	r.Classes = map[placement.Class]*Rates{}
	for class, g := range classes {
		r.Classes[class] = g.rates()
	}
}

// medians are those of some seconds.
func medians(seconds []Second) *Rates {
	column := func(value func(s Second) float64) float64 {
		var v []float64
		for _, s := range seconds {
			v = append(v, value(s))
		}
		return placement.Median(v)
	}
	per := func(n uint64, s Second) float64 { return float64(n) / s.Length.Seconds() }
	return &Rates{
		Seconds: len(seconds),
		GuestToHost: Rate{
			column(func(s Second) float64 { return per(s.GuestToHost.Frames, s) }),
			column(func(s Second) float64 { return per(8*s.GuestToHost.Bytes, s) }),
		},
		HostToGuest: Rate{
			column(func(s Second) float64 { return per(s.HostToGuest.Frames, s) }),
			column(func(s Second) float64 { return per(8*s.HostToGuest.Bytes, s) }),
		},
		BackendCPU: column(func(s Second) float64 { return s.BackendCPU }),
	}
}
