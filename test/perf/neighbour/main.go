//go:build linux

// Command neighbour measures what a guest that does its worst costs another one on the same daemon, compared with a guest that merely works as fast as
// it can, and prints a table.
//
//	go run ./test/perf/neighbour -vhostd bin/vhostd [-rounds 12] [-seconds 0.7] [-kinds kicks,control]
//
// One vhostd serve has two ports, on networks that return all frames. On one, a guest keeps frames under way (vhostd bench's driver) and counts how many come
// back: the neighbour. On the other there is another guest, in a process of its own, in short turns: a bad one, a good one that keeps frames under way as the neighbour
// does, a bad one of another kind, and so on, in another order each round. A quotient is of two turns that follow each other, and the figure is the median of
// all rounds: what comes and goes on the machine meets both, and a turn that was disturbed is one of many.
//
// # What is compared
//
// A guest has a thread of its own, which the host's scheduler gives what it gives to any process, and vhostd has one for each of its queues. Where there are
// fewer processors than these, the neighbour has less as soon as the other guest does anything; so its rate alone is shown, but is not what the bad one
// is measured by. Beside a good guest that never rests it has its fair share. What a bad one leaves it of that is the ratio; the
// columns of processor time tell whose time it was: the other guest's, which only the host can limit (cgroups), or the daemon's, for both guests.
//
// The time that processes other than these three had is taken off, as if the machine had been smaller by that much. That is good enough for a few percent; beyond
// -quiet the run says so, and its figures are no result. Frames that do not come back at all fail the run.
package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"log"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// worst is the largest part of its throughput that a neighbour may lose.
const worst = 0.20

// What the other guest is, beside what bad ones do.
const (
	good  = "good"
	alone = "alone" // there is none
)

var (
	vhostd  = flag.String("vhostd", "bin/vhostd", "the program to measure")
	rounds  = flag.Int("rounds", 12, "turns of each kind")
	seconds = flag.Float64("seconds", 0.7, "length of a turn")
	which   = flag.String("kinds", strings.Join(kindNames(), ","), "what the bad guest does, a comma list")
	quiet   = flag.Float64("quiet", 0.05, "part of the machine that other processes may have")
	play    = flag.String("play", "", "be the other guest, of this kind: for this program's own use")
	socket  = flag.String("socket", "", "with -play: where")
)

func main() {
	log.SetFlags(0)
	flag.Parse()
	if *play != "" {
		misbehave(*play, *socket)
		return
	}
	if err := measure(); err != nil {
		log.Fatal(err)
	}
}

func measure() error {
	dir, err := os.MkdirTemp("", "vhostd-neighbour-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	pid, stop, err := serve(dir)
	if err != nil {
		return err
	}
	defer stop()
	t := &table{kinds: map[string]*row{}}
	kinds := strings.Split(*which, ",")
	for range *rounds {
		if err := t.round(dir, pid, append(slices.Clone(kinds), alone)); err != nil {
			return err
		}
	}
	return t.print(kinds)
}

// table is what was measured.
type table struct {
	kinds   map[string]*row
	foreign []float64 // part of the machine that others had, by turns
}

// row is what belongs to a kind of guest.
type row struct {
	rates, ratios, daemon, other []float64
	lost                         uint64
}

func (t *table) row(kind string) *row {
	if t.kinds[kind] == nil {
		t.kinds[kind] = &row{}
	}
	return t.kinds[kind]
}

// round has a turn of each kind, two of them around one of a good guest. Good ones are compared with the one before.
func (t *table) round(dir string, pid int, kinds []string) error {
	rand.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
	for pair := range slices.Chunk(kinds, 2) {
		order := slices.Insert(slices.Clone(pair), 1, good)
		rates := map[string]float64{}
		for _, kind := range order {
			r, err := turn(dir, pid, kind)
			if err != nil {
				return fmt.Errorf("%s: %w", kind, err)
			}
			row := t.row(kind)
			row.rates, row.daemon, row.other = append(row.rates, r.rate), append(row.daemon, r.daemon), append(row.other, r.other)
			row.lost += r.lost
			t.foreign = append(t.foreign, r.foreign)
			rates[kind] = r.rate
		}
		for _, kind := range pair {
			row := t.row(kind)
			row.ratios = append(row.ratios, rates[kind]/rates[good])
		}
		if g := t.row(good); len(g.rates) > 1 {
			g.ratios = append(g.ratios, rates[good]/g.rates[len(g.rates)-2])
		}
	}
	return nil
}

// print prints the table, and tells whether it is good.
func (t *table) print(kinds []string) error {
	fmt.Printf("| the other guest | neighbour, Mframes/s | beside a good one: 1 | half of the rounds | daemon, CPUs | other guest, CPUs | lost |\n|---|---:|---:|---:|---:|---:|---:|\n")
	var errs []error
	for _, kind := range append([]string{alone, good}, kinds...) {
		r := t.row(kind)
		ratio := quantile(r.ratios, 0.5)
		fmt.Printf("| %s | %.2f | %.2f | %.2f to %.2f | %.2f | %.2f | %d |\n", kind, quantile(r.rates, 0.5)/1e6, ratio, quantile(r.ratios, 0.25), quantile(r.ratios, 0.75),
			quantile(r.daemon, 0.5), quantile(r.other, 0.5), r.lost)
		switch noise := math.Abs(ratio - 1); {
		case kind == good && noise > 0.1:
			errs = append(errs, fmt.Errorf("good ones differ by %.0f %%: this is no result", 100*noise))
		case kind != good && ratio < 1-worst:
			errs = append(errs, fmt.Errorf("%s costs a neighbour more than %.0f %% of its throughput", kind, 100*worst))
		}
		if r.lost > 0 {
			errs = append(errs, fmt.Errorf("%s: %d frames of a neighbour were lost", kind, r.lost))
		}
	}
	others := quantile(t.foreign, 0.5)
	fmt.Printf("\n%d rounds. Others had %.0f %% of the machine, %.0f %% at most.\n", *rounds, 100*others, 100*quantile(t.foreign, 1))
	if others > *quiet {
		errs = append(errs, errors.New("the machine was not quiet: this is no result"))
	}
	return errors.Join(errs...)
}

// quantile is the value that a part of v is below; 0 of none.
func quantile[T cmp.Ordered](v []T, part float64) (q T) {
	if len(v) == 0 {
		return q
	}
	v = slices.Sorted(slices.Values(v))
	return v[min(int(part*float64(len(v))), len(v)-1)]
}

const ports = `
[control]
socket = "none"
[log]
level = "warn"
[port.measured]
socket-path = "%[1]s/measured.sock"
net = "null,echo=on"
[port.other]
socket-path = "%[1]s/other.sock"
net = "null,echo=on"
`

// serve starts the daemon.
func serve(dir string) (pid int, stop func(), err error) {
	file := filepath.Join(dir, "vhostd.toml")
	if err := os.WriteFile(file, fmt.Appendf(nil, ports, dir), 0o600); err != nil {
		return 0, nil, err
	}
	cmd := exec.Command(*vhostd, "serve", "--config", file)
	logs, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return 0, nil, err
	}
	defer logs.Close()
	cmd.Stderr = logs
	if err := cmd.Start(); err != nil {
		return 0, nil, err
	}
	for range 500 {
		if _, err := os.Stat(filepath.Join(dir, "other.sock")); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return cmd.Process.Pid, func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			log.Printf("vhostd ended with %v", err)
		}
	}, nil
}
