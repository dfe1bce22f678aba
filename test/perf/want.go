package main

import (
	"fmt"

	"github.com/vhostd/vhostd/internal/placement"
)

// want is what vhostd is to reach: a ratio to DPDK with split and with packed rings, or a value of its own. Rates are to be that much or more, all else that
// much or less. The zero want is none: a figure to know.
type want struct {
	split, packed float64
	own           float64 // nanoseconds, or a share of a processor
}

// verdict says what is wanted of a work, and whether the medians are that good. Where one was not measured nothing can be said.
func (w work) verdict(packed bool, ours, theirs []float64) string {
	bar := w.want.split
	if packed {
		bar = w.want.packed
	}
	text := fmt.Sprintf("%.2f", bar)
	if w.want.own > 0 {
		bar, text = w.want.own, w.format([]float64{w.want.own})
	}
	sign := "<= "
	if w.kind == rate {
		sign = ">= "
	}
	switch {
	case w.want == want{}:
		return ""
	case len(ours) == 0 || w.want.own == 0 && len(theirs) == 0:
		return sign + text + ": not caught"
	}
	got := placement.Median(ours)
	if w.want.own == 0 {
		got /= placement.Median(theirs)
	}
	if w.kind == rate && got >= bar || w.kind != rate && got <= bar {
		return sign + text + ": yes"
	}
	return sign + text + ": **no**"
}
