//go:build linux

// Command neighbour measures what a guest that does its worst costs another one on the same daemon, compared with a guest that merely works as fast as
// it can, and prints a table.
//
//	go run ./test/perf/neighbour -vhostd bin/vhostd [-pairs 5] [-seconds 2] [-kinds kicks,control]
//
// One vhostd serve has two ports, on networks that return all frames. On one, a guest keeps frames under way (vhostd bench's driver) and counts how many come
// back; on the other there is, in turns, a guest at full load (A) and a bad one (B), each in a process of its own. Both are there for as long as they are
// measured, so that all four threads of guests and all workers compete for the same processors, in A as in B: what the table tells is what the
// badness costs, not what a busy neighbour does. Frames that do not come back at all fail the run.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vhostd/vhostd/bench"
)

// worst is the largest part of its throughput that a neighbour may lose.
const worst = 0.20

var (
	vhostd  = flag.String("vhostd", "bin/vhostd", "the program to measure")
	pairs   = flag.Int("pairs", 5, "turns of each kind")
	seconds = flag.Float64("seconds", 2, "length of a turn")
	which   = flag.String("kinds", strings.Join(kindNames(), ","), "what the bad guest does, a comma list")
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
	stop, err := serve(dir)
	if err != nil {
		return err
	}
	defer stop()
	fmt.Printf("| the other guest | beside a good one, Mframes/s | beside the bad one | ratio | least | lost |\n|---|---|---|---|---|---|\n")
	late := false
	for kind := range strings.SplitSeq(*which, ",") {
		r, err := compare(dir, kind)
		if err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
		fmt.Printf("| %s | %.2f | %.2f | %.2f | %.2f | %d |\n", kind, r.good/1e6, r.bad/1e6, r.ratio, r.least, r.lost)
		late = late || r.ratio < 1-worst || r.lost > 0
	}
	if late {
		return fmt.Errorf("a bad guest costs its neighbour more than %.0f %% of its throughput, or frames", 100*worst)
	}
	return nil
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
func serve(dir string) (stop func(), err error) {
	file := filepath.Join(dir, "vhostd.toml")
	if err := os.WriteFile(file, fmt.Appendf(nil, ports, dir), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(*vhostd, "serve", "--config", file)
	logs, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	defer logs.Close()
	cmd.Stderr = logs
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	for range 500 {
		if _, err := os.Stat(filepath.Join(dir, "other.sock")); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			log.Printf("vhostd ended with %v", err)
		}
	}, nil
}

// result is what a kind costs: medians of frames per second, and of the quotients of turns that follow each other.
type result struct {
	good, bad, ratio, least float64
	lost                    uint64
}

func compare(dir, kind string) (r result, err error) {
	var good, bad, ratios []float64
	for range *pairs {
		a, lostA, err := turn(dir, "good")
		if err != nil {
			return r, err
		}
		b, lostB, err := turn(dir, kind)
		if err != nil {
			return r, err
		}
		good, bad, ratios = append(good, a), append(bad, b), append(ratios, b/a)
		r.lost += lostA + lostB
	}
	r.good, r.bad, r.ratio, r.least = median(good), median(bad), median(ratios), slices.Min(ratios)
	return r, nil
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

// turn measures the neighbour beside another guest.
func turn(dir, kind string) (rate float64, lost uint64, err error) {
	other := exec.Command(os.Args[0], "-play", kind, "-socket", filepath.Join(dir, "other.sock"))
	other.Stderr = os.Stderr
	ready, err := other.StdoutPipe()
	if err != nil {
		return 0, 0, err
	}
	if err := other.Start(); err != nil {
		return 0, 0, err
	}
	defer func() {
		if other.ProcessState == nil {
			_ = other.Process.Kill()
			_ = other.Wait()
		}
	}()
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		return 0, 0, fmt.Errorf("the other guest: %w", errors.Join(err, other.Wait()))
	}
	c := bench.DefaultConfig()
	c.Path, c.Direction, c.Window, c.LostAfter = filepath.Join(dir, "measured.sock"), bench.Echo, 64, 5*time.Second
	c.Duration, c.WarmUp = time.Duration(*seconds*float64(time.Second)), 300*time.Millisecond
	res, err := bench.Run(context.Background(), c)
	if err != nil {
		return 0, 0, err
	}
	if err := syscall.Kill(other.Process.Pid, 0); err != nil {
		return 0, 0, fmt.Errorf("the other guest has ended before its turn: %w", err)
	}
	var took time.Duration
	for _, s := range res.Seconds {
		took += s.Length
	}
	return float64(res.HostToGuest.Frames) / took.Seconds(), res.Lost, nil
}
