package main

import (
	"strings"
	"testing"
)

func TestVerdict(t *testing.T) {
	find := func(name string) work {
		for _, w := range works {
			if w.name == name {
				return w
			}
		}
		t.Fatalf("no work %s", name)
		return work{}
	}
	for _, c := range []struct {
		work         string
		packed       bool
		ours, theirs []float64
		want         string
	}{
		{"guest-to-host-64", false, []float64{21}, []float64{20}, ">= 1.05: yes"},
		{"guest-to-host-64", false, []float64{20}, []float64{20}, ">= 1.05: **no**"},
		{"guest-to-host-64", true, []float64{20}, []float64{20}, ">= 1.00: yes"},
		{"guest-to-host-64", true, []float64{20}, nil, ">= 1.00: not caught"},
		{"guest-to-host-64-headers", false, []float64{20}, []float64{20}, ""},
		{"echo-polling", false, []float64{1200}, []float64{1000}, "<= 1.20: yes"},
		{"echo-polling", true, []float64{1201}, []float64{1000}, "<= 1.20: **no**"},
		{"echo-asleep", false, []float64{60e3}, nil, "<= 60µs: yes"},
		{"echo-asleep", false, []float64{61e3}, []float64{1e3}, "<= 60µs: **no**"},
		{"idle", false, []float64{0}, []float64{1}, "<= 0.100 %: yes"},
		{"idle", true, []float64{0.002}, []float64{1}, "<= 0.100 %: **no**"},
		{"idle", true, nil, []float64{1}, "<= 0.100 %: not caught"},
	} {
		if got := find(c.work).verdict(c.packed, c.ours, c.theirs); got != c.want {
			t.Errorf("%s, packed %v, %v against %v: %q, want %q", c.work, c.packed, c.ours, c.theirs, got, c.want)
		}
	}
}

// TestWorkNames: they are words of the command line.
func TestWorkNames(t *testing.T) {
	seen := map[string]bool{}
	for name := range strings.SplitSeq(workNames(), ",") {
		if name == "" || seen[name] {
			t.Errorf("work %q: empty, or twice", name)
		}
		seen[name] = true
	}
}
