//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/vhostd/vhostd/bench"
	"github.com/vhostd/vhostd/internal/placement"
)

// reading is what a turn was.
type reading struct {
	rate          float64 // of the neighbour's frames, per second, had these processes had the machine to themselves
	foreign       float64 // part of the machine that others had
	daemon, other float64 // processors that these had on average
	lost          uint64
}

// turn measures the neighbour beside another guest.
func turn(dir string, daemon int, kind string) (r reading, err error) {
	pids := []int{daemon, os.Getpid()}
	if kind != alone {
		other, stop, err := beside(dir, kind)
		if err != nil {
			return r, err
		}
		defer stop()
		pids = append(pids, other)
	}
	c := bench.DefaultConfig()
	c.Path, c.Direction, c.Window, c.LostAfter = filepath.Join(dir, "measured.sock"), bench.Echo, 64, 5*time.Second
	c.Duration, c.WarmUp = time.Duration(*seconds*float64(time.Second)), 200*time.Millisecond
	from, err := readClocks(pids)
	if err != nil {
		return r, err
	}
	res, err := bench.Run(context.Background(), c)
	if err != nil {
		return r, err
	}
	to, err := readClocks(pids)
	if err != nil {
		return r, fmt.Errorf("the other guest has ended before its turn: %w", err)
	}
	r.account(from, to)
	var took time.Duration
	for _, s := range res.Seconds {
		took += s.Length
	}
	r.rate, r.lost = float64(res.HostToGuest.Frames)/took.Seconds()/(1-r.foreign), res.Lost
	return r, nil
}

// beside starts the other guest, and waits until it has begun.
func beside(dir, kind string) (pid int, stop func(), err error) {
	cmd := exec.Command(os.Args[0], "-play", kind, "-socket", filepath.Join(dir, "other.sock"))
	cmd.Stderr = os.Stderr
	ready, err := cmd.StdoutPipe()
	if err != nil {
		return 0, nil, err
	}
	if err := cmd.Start(); err != nil {
		return 0, nil, err
	}
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		return 0, nil, fmt.Errorf("the other guest: %w", errors.Join(err, cmd.Wait()))
	}
	return cmd.Process.Pid, func() {
		_ = cmd.Process.Signal(syscall.SIGKILL)
		_ = cmd.Wait()
	}, nil
}

// clocks are the processors' time at one moment.
type clocks struct {
	at   time.Time
	busy time.Duration   // of all processors, and what the hypervisor took
	of   []time.Duration // by processes
}

func readClocks(pids []int) (c clocks, err error) {
	c.at = time.Now()
	for _, pid := range pids {
		ran, err := placement.Clock(pid)
		if err != nil {
			return c, err
		}
		c.of = append(c.of, ran)
	}
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return c, err
	}
	// User, nice, system, idle, waiting, interrupts, soft interrupts, stolen, in hundredths of a second.
	var n [8]int64
	if _, err := fmt.Sscanf(string(stat), "cpu %d %d %d %d %d %d %d %d", &n[0], &n[1], &n[2], &n[3], &n[4], &n[5], &n[6], &n[7]); err != nil {
		return c, fmt.Errorf("/proc/stat: %w", err)
	}
	for i, v := range n {
		if i != 3 && i != 4 {
			c.busy += time.Duration(v) * 10 * time.Millisecond
		}
	}
	return c, nil
}

// account fills in who had the processors.
func (r *reading) account(from, to clocks) {
	took := to.at.Sub(from.at)
	foreign := to.busy - from.busy
	for i := range from.of {
		foreign -= to.of[i] - from.of[i]
	}
	// Ticks are coarse: a little less than nothing is nothing. And not all, or the rate would be none.
	r.foreign = min(max(float64(foreign)/float64(took)/float64(runtime.NumCPU()), 0), 0.95)
	r.daemon = float64(to.of[0]-from.of[0]) / float64(took)
	if len(to.of) > 2 {
		r.other = float64(to.of[2]-from.of[2]) / float64(took)
	}
}
