package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/vhostd/vhostd/bench"
	"github.com/vhostd/vhostd/internal/placement"
)

// benchOutput is what vhostd bench --json prints.
type benchOutput struct {
	Version string       `json:"version"`
	Options benchOptions `json:"options"`
	*bench.Result
}

// benchOptions are those that the numbers depend on.
type benchOptions struct {
	Ring      string        `json:"ring"`
	Size      int           `json:"size"`
	Batch     int           `json:"batch"`
	Chain     int           `json:"chain"`
	Indirect  bool          `json:"indirect"`
	InOrder   bool          `json:"in_order"`
	Mergeable bool          `json:"mrg_rxbuf"`
	Buffer    int           `json:"buffer"` // 0: chosen
	Direction string        `json:"direction"`
	Frames    []int         `json:"frames"`
	Rate      float64       `json:"rate"`
	Window    int           `json:"window"`
	Think     time.Duration `json:"think_ns"`
	Memory    string        `json:"memory"`
	Cold      int           `json:"cold"`
	CPU       int           `json:"cpu"`
	Verify    bool          `json:"verify"`
}

func benchReport(f *benchFlags, r *bench.Result) benchOutput {
	c := f.Config
	return benchOutput{buildInfo().Version, benchOptions{
		Ring: f.ring, Size: c.Size, Batch: c.Batch, Chain: c.Chain, Indirect: c.Indirect, InOrder: c.InOrder, Mergeable: c.Mergeable,
		Buffer: c.Buffer, Direction: f.direction, Frames: c.Frames, Rate: c.Rate, Window: c.Window, Think: c.Think,
		Memory: f.memory, Cold: c.Cold, CPU: c.CPU, Verify: c.Verify,
	}, r}
}

// progressLine is one second in one line.
func progressLine(c bench.Config, done, total int, s bench.Second) string {
	parts := []string{fmt.Sprintf("%d/%d", done, total), string(s.Class)}
	if c.Direction != bench.HostToGuest {
		parts = append(parts, fmt.Sprintf("to the host %sframe/s %sbit/s", decimal(per(s.GuestToHost.Frames, s.Length)), decimal(per(8*s.GuestToHost.Bytes, s.Length))))
	}
	if c.Direction != bench.GuestToHost {
		parts = append(parts, fmt.Sprintf("to the guest %sframe/s %sbit/s", decimal(per(s.HostToGuest.Frames, s.Length)), decimal(per(8*s.HostToGuest.Bytes, s.Length))))
	}
	if l := s.Latency; l != nil {
		parts = append(parts, fmt.Sprintf("p50 %v p99 %v", short(l.P50), short(l.P99)))
	}
	if !s.Quiet {
		parts = append(parts, "disturbed")
	}
	return strings.Join(parts, "  ")
}

func per(n uint64, d time.Duration) float64 { return float64(n) / d.Seconds() }

// short is a duration in three digits or so.
func short(d time.Duration) time.Duration {
	for unit := time.Duration(1); ; unit *= 10 {
		if d < 1000*unit {
			return d.Round(unit)
		}
	}
}

// benchRow is a class of seconds, or those that were disturbed.
type benchRow struct {
	name string
	*bench.Rates
}

func benchRows(r *bench.Result) (rows []benchRow) {
	for _, class := range placement.Classes {
		if m := r.Classes[class]; m != nil {
			rows = append(rows, benchRow{string(class), m})
		}
	}
	if r.Disturbed != nil {
		rows = append(rows, benchRow{"disturbed", r.Disturbed})
	}
	return rows
}

// printBench prints for people.
func printBench(w io.Writer, c bench.Config, r *bench.Result) error {
	fmt.Fprintf(w, "%s\n%s\n\n", setting(c), backendLine(r))
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "PLACEMENT\tSECONDS\tTO THE HOST: FRAMES/S\tBIT/S\tTO THE GUEST: FRAMES/S\tBIT/S\tBACK-END CPU\t")
	rows := benchRows(r)
	for _, m := range rows {
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%s\t%s\t\n", m.name, m.Seconds, decimal2(m.GuestToHost.Frames), decimal2(m.GuestToHost.Bits),
			decimal2(m.HostToGuest.Frames), decimal2(m.HostToGuest.Bits), share(m.BackendCPU))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if err := printLatency(t, w, c, rows); err != nil {
		return err
	}
	fmt.Fprintln(w, "\n"+sums(c, r))
	return nil
}

// printLatency prints a line for each row that has any.
func printLatency(t *tabwriter.Writer, w io.Writer, c bench.Config, rows []benchRow) error {
	var what string
	switch {
	case c.Direction == bench.HostToGuest:
		return nil
	case c.Direction == bench.Echo:
		what = "round trip of a frame"
	case c.Returns():
		what = "of a frame from one guest to the other"
	default:
		what = "from available to used, of some frames"
	}
	if c.Rate > 0 {
		what += ", from when it was due"
	}
	fmt.Fprintf(w, "\nLatency: %s\n", what)
	fmt.Fprintln(t, "PLACEMENT\tFRAMES\tMIN\tP50\tP90\tP99\tP99.9\tMAX\t")
	for _, m := range rows {
		if l := m.Latency; l != nil {
			fmt.Fprintf(t, "%s\t%d\t%v\t%v\t%v\t%v\t%v\t%v\t\n", m.name, l.Count, short(l.Min), short(l.P50), short(l.P90), short(l.P99), short(l.P999), short(l.Max))
		}
	}
	return t.Flush()
}

// setting is what was done.
func setting(c bench.Config) string {
	ring := "split"
	if c.Packed {
		ring = "packed"
	}
	var lengths []string
	for _, n := range c.Frames {
		lengths = append(lengths, fmt.Sprint(n))
	}
	pace := fmt.Sprintf("as fast as they go, in batches of %d", c.Batch)
	switch {
	case c.Rate > 0:
		pace = fmt.Sprintf("%s a second", decimal(c.Rate))
	case c.Returns() && c.Think > 0:
		pace = fmt.Sprintf("%d under way, %v apart", c.Window, c.Think)
	case c.Returns():
		pace = fmt.Sprintf("%d under way", c.Window)
	}
	return fmt.Sprintf("%s, %s rings of %d, frames of %s bytes, %s", c.Direction, ring, c.Size, strings.Join(lengths, ", "), pace)
}

func backendLine(r *bench.Result) string {
	who := "of unknown process"
	if r.PID > 0 {
		who = fmt.Sprintf("process %d", r.PID)
	}
	return fmt.Sprintf("back-end %s, features %s", who, strings.Join(r.Features, " "))
}

// sums are the totals and what went wrong.
func sums(c bench.Config, r *bench.Result) string {
	var b strings.Builder
	fmt.Fprintf(&b, "In all %d frames to the host, %d to the guest, %s", r.GuestToHost.Frames, r.HostToGuest.Frames, count(int(r.Kicks), "kick"))
	if c.Returns() {
		fmt.Fprintf(&b, ", %d lost, %d of others", r.Lost, r.Foreign)
	}
	if c.Verify {
		fmt.Fprint(&b, "; all contents as sent")
	}
	if r.Disturbed != nil {
		fmt.Fprint(&b, "\nDisturbed: something else ran on one of the two processors.")
	}
	if r.Behind {
		fmt.Fprint(&b, "\nThe back-end did not keep up with the rate.")
	}
	if r.Interrupted {
		fmt.Fprint(&b, "\nInterrupted.")
	}
	return b.String()
}

// decimal2 is decimal with two digits behind the point.
func decimal2(v float64) string {
	for _, u := range []struct {
		unit   float64
		prefix string
	}{{1e9, "G"}, {1e6, "M"}, {1e3, "k"}} {
		if v >= u.unit {
			return fmt.Sprintf("%.2f%s", v/u.unit, u.prefix)
		}
	}
	return fmt.Sprintf("%.0f", v)
}

// share of a processor.
func share(v float64) string { return fmt.Sprintf("%.1f%%", 100*v) }
