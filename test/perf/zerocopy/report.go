//go:build linux

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/zerocopy"
)

// results are all turns, in order.
type results struct {
	Turns []turn
	c     config
}

// measure takes all turns of all cases.
func measure(ctx context.Context, c config) (*results, error) {
	r := &results{c: c}
	for _, path := range c.paths {
		l, err := layPath(path, c.qdisc, c.capture)
		if err != nil {
			return r, err
		}
		for _, size := range c.sizes {
			if err := r.measureCase(ctx, l, path, size); err != nil {
				l.close()
				return r, fmt.Errorf("%s, %d bytes: %w", path, size, err)
			}
		}
		l.close()
	}
	return r, nil
}

// measureCase takes the turns of one path and size. The lock is held for a round, so that what is compared is as close together as can be.
func (r *results) measureCase(ctx context.Context, l *lab, path string, size int) error {
	var fastest float64
	err := r.locked(func() error {
		for _, m := range r.c.modes {
			n, err := rate(&r.c, l, m, size)
			if err != nil {
				return fmt.Errorf("%s: %w", m.name, err)
			}
			fastest = max(fastest, n)
		}
		return nil
	})
	for round := 0; round < r.c.pairs && err == nil; round++ {
		err = r.locked(func() error {
			for _, m := range r.c.modes {
				t := turn{Path: path, Mode: m.name, Size: size, Hot: r.c.hot, Round: round, Frames: uint64(fastest*r.c.seconds) + 1}
				if err := r.takeQuiet(ctx, l, t, m); err != nil {
					return fmt.Errorf("%s: %w", m.name, err)
				}
			}
			return nil
		})
	}
	return err
}

// takeQuiet takes a turn, and again while it is noisy.
func (r *results) takeQuiet(ctx context.Context, l *lab, t turn, m mode) error {
	for tries := 0; ; tries++ {
		done, err := take(ctx, &r.c, l, t, m)
		if err != nil {
			return err
		}
		log.Printf("%-8s %5d B  %-24s round %d: %7.1f ns/frame, %5.1f %% zero-copy, %.1f s %s", t.Path, t.Size, t.Mode, t.Round+1,
			done.perFrame(), 100*done.share(zerocopy.ZeroCopied), float64(done.Ns)/1e9, remark(done))
		if done.Noise == "" || tries >= r.c.retries {
			r.Turns = append(r.Turns, done)
			return nil
		}
	}
}

func remark(t turn) string {
	s := ""
	if t.Noise != "" {
		s += " (noisy: " + t.Noise + ")"
	}
	if t.Unproven != "" {
		s += " (NOT AS IT SHOULD BE: " + t.Unproven + ")"
	}
	return s
}

// locked runs f while the lock is held, if there is one.
func (r *results) locked(f func() error) error {
	if r.c.lock == "" {
		return f()
	}
	file, err := os.OpenFile(r.c.lock, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return err
	}
	defer file.Close() // which unlocks
	for {
		if err = unix.Flock(int(file.Fd()), unix.LOCK_EX); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("lock on %s: %w", r.c.lock, err)
	}
	return f()
}

// unproven counts the turns that were not what their mode says.
func (r *results) unproven() (n int) {
	for i := range r.Turns {
		if r.Turns[i].Unproven != "" {
			n++
		}
	}
	return n
}

// line sums up the turns of one mode in one case.
type line struct {
	Path, Mode      string
	Size            int // bytes
	Hot             bool
	Ratio, Min, Max float64 // CPU per frame by the first mode's: median, extremes
	Least           float64 // the least CPU per frame by the first mode's least: what noise adds to it is least, too
	NsPerFrame      float64 // medians from here on
	NsPerKiB        float64
	GbitPerS        float64
	ZeroCopied      float64 // part of the frames
	CopiedAnyway    float64
	BusyNsPerFrame  float64 // the cross-check
	KthreadsPerCent float64 // of the figure, beside it
	MaxPending      float64 // frames in the device's hands at most
	MaxWaitMs       float64 // longest wait of the used ring for one of them
	Rounds, Noisy   int
	Unproven        string `json:",omitempty"`
}

// lines are the sums, in the order in which they were measured.
func (r *results) lines() (all []line) {
	for _, path := range r.c.paths {
		for _, size := range r.c.sizes {
			base := r.of(path, size, r.c.modes[0])
			for _, m := range r.c.modes {
				if turns := r.of(path, size, m); len(turns) > 0 { // none: it was broken off
					all = append(all, sum(turns, base))
				}
			}
		}
	}
	return all
}

func (r *results) of(path string, size int, m mode) (some []turn) {
	for _, t := range r.Turns {
		if t.Path == path && t.Size == size && t.Mode == m.name {
			some = append(some, t)
		}
	}
	return some
}

func sum(turns, base []turn) line {
	first := &turns[0]
	l := line{Path: first.Path, Mode: first.Mode, Size: first.Size, Hot: first.Hot, Rounds: len(turns)}
	var ratios []float64
	for i := range turns {
		ratios = append(ratios, turns[i].perFrame()/base[i].perFrame())
		if turns[i].Noise != "" {
			l.Noisy++
		}
		if turns[i].Unproven != "" {
			l.Unproven = turns[i].Unproven
		}
	}
	over := func(f func(t *turn) float64) float64 {
		var v []float64
		for i := range turns {
			v = append(v, f(&turns[i]))
		}
		return median(v)
	}
	l.Ratio, l.Min, l.Max = median(ratios), slices.Min(ratios), slices.Max(ratios)
	l.Least = least(turns) / least(base)
	l.NsPerFrame = over((*turn).perFrame)
	l.NsPerKiB = l.NsPerFrame * 1024 / float64(l.Size)
	l.GbitPerS = over(func(t *turn) float64 { return float64(t.Frames) * float64(8*t.Size) / float64(t.Ns) })
	l.ZeroCopied = over(func(t *turn) float64 { return t.share(zerocopy.ZeroCopied) })
	l.CopiedAnyway = over(func(t *turn) float64 { return t.share(zerocopy.CopiedAnyway) })
	l.BusyNsPerFrame = over(func(t *turn) float64 { return float64(t.BusyNs) / float64(t.Frames) })
	l.KthreadsPerCent = over(func(t *turn) float64 { return 100 * float64(t.KthreadsNs) / float64(t.CPUNs) })
	l.MaxPending = over(func(t *turn) float64 { return float64(t.MaxPending) })
	l.MaxWaitMs = over(func(t *turn) float64 { return float64(t.MaxWaitNs) / 1e6 })
	return l
}

func least(turns []turn) float64 {
	f := turns[0].perFrame()
	for i := range turns {
		f = min(f, turns[i].perFrame())
	}
	return f
}

// median is the middle one, or the mean of the two.
func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	n := len(s)
	return (s[(n-1)/2] + s[n/2]) / 2
}

// print writes the table, which is Markdown, or JSON with every turn.
func (r *results) print(w io.Writer, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(struct {
			Command string
			Lines   []line
			Turns   []turn
		}{strings.Join(os.Args[1:], " "), r.lines(), r.Turns})
	}
	t := tabwriter.NewWriter(w, 0, 0, 1, ' ', 0)
	fmt.Fprintln(t, "| path\t| bytes\t| mode\t| ratio\t| min - max\t| of least\t| ns/frame\t| ns/KiB\t| Gbit/s\t| zero-copy\t| busy ns/frame\t| kthreads\t| pending\t| wait ms\t| noisy\t|")
	fmt.Fprintln(t, "|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|")
	for _, l := range r.lines() {
		name := l.Path
		if l.Hot {
			name += ", hot"
		}
		fmt.Fprintf(t, "| %s\t| %d\t| %s\t| %.2f\t| %.2f - %.2f\t| %.2f\t| %.0f\t| %.0f\t| %.1f\t| %.1f %%\t| %.0f\t| %.1f %%\t| %.0f\t| %.2f\t| %d of %d\t|", name, l.Size, l.Mode,
			l.Ratio, l.Min, l.Max, l.Least, l.NsPerFrame, l.NsPerKiB, l.GbitPerS, 100*l.ZeroCopied, l.BusyNsPerFrame, l.KthreadsPerCent, l.MaxPending, l.MaxWaitMs, l.Noisy, l.Rounds)
		if l.Unproven != "" {
			fmt.Fprintf(t, " NOT AS IT SHOULD BE: %s", l.Unproven)
		}
		fmt.Fprintln(t)
	}
	return t.Flush()
}
