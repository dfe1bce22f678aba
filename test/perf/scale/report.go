//go:build linux

package main

import (
	"fmt"
	"io"
	"time"
)

// report prints Markdown.
func report(w io.Writer, all []result, fair []fairness) error {
	p := func(format string, args ...any) { fmt.Fprintf(w, format, args...) }
	p("| guests | memory idle, KiB each | after traffic, KiB each | page tables, KiB each | threads | descriptors | idle CPU, %% of one | connect, median / p99 / most |\n")
	p("|---:|---:|---:|---:|---:|---:|---:|---:|\n")
	for _, r := range all {
		p("| %d | %.0f | %.0f | %.0f | %d | %d | %.2f | %v / %v / %v |\n", r.Guests, r.each(r.Idle.Private, r.Start.Private), r.each(r.Busy.Private, r.Start.Private),
			r.each(r.Busy.PageTables, r.Start.PageTables), r.Idle.Threads, r.Idle.FDs, 100*r.CPU, ms(r.Median), ms(r.P99), ms(r.Longest))
	}
	p("\n| guests | daemon with nobody connected, KiB | first left, KiB | last left, KiB | threads left | descriptors: nobody connected / first left / last left |\n")
	p("|---:|---:|---:|---:|---:|---:|\n")
	for _, r := range all {
		p("| %d | %d | %d | %d | %d | %d / %d / %d |\n", r.Guests, r.Start.Private, r.Left.Private, r.Again.Private, r.Again.Threads, r.Start.FDs, r.Left.FDs, r.Again.FDs)
	}
	for _, f := range fair {
		p("\n%s: one guest floods (%.0f frames/s), %d send a frame every %v each: %d frames in %v, none lost.\n\n", f.Network, f.Flooded, f.Trickling, every, f.Sent, f.Took)
		p("| wait of those that trickle | median | p99 | most |\n|---|---:|---:|---:|\n")
		for _, row := range []struct {
			name string
			q    quantiles
		}{{"used element, nobody floods", f.Alone}, {"used element", f.Queued}, {"frame has arrived", f.There}} {
			p("| %s | %v | %v | %v |\n", row.name, ms(row.q.Median), ms(row.q.P99), ms(row.q.Max))
		}
	}
	return nil
}

func (r *result) each(with, without int) float64 { return float64(with-without) / float64(r.Guests) }

func ms(d time.Duration) time.Duration { return d.Round(10 * time.Microsecond) }
