//go:build linux

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/test/vm/machine"
)

// sample is what a transfer took.
type sample struct{ vhostd, main, vcpu, other, wall time.Duration }

// side is the CPU time of the back-end's side.
func (s sample) side() time.Duration { return s.vhostd + s.main }

func (s sample) String() string {
	ms := func(d time.Duration) time.Duration { return d.Round(time.Millisecond) }
	return fmt.Sprintf("back-end %v (vhostd %v, QEMU's main thread %v), vCPU %v, other %v, in %v",
		ms(s.side()), ms(s.vhostd), ms(s.main), ms(s.vcpu), ms(s.other), ms(s.wall))
}

func (s sample) since(from sample) sample {
	return sample{s.vhostd - from.vhostd, s.main - from.main, s.vcpu - from.vcpu, s.other - from.other, s.wall - from.wall}
}

// clocks reads the clocks of one side.
type clocks struct {
	vhostd, qemu int // process ids; vhostd's is 0 when there is none
	vcpus        []int
	from         time.Time
}

func newClocks(ctx context.Context, vm *machine.Machine, vhostd int) (*clocks, error) {
	c := &clocks{vhostd: vhostd, from: time.Now()}
	var err error
	if c.qemu, err = vm.PID(); err != nil {
		return nil, err
	}
	b, err := vm.QMP(ctx, "query-cpus-fast", nil)
	if err != nil {
		return nil, err
	}
	var cpus []struct {
		Thread int `json:"thread-id"`
	}
	if err := json.Unmarshal(b, &cpus); err != nil {
		return nil, fmt.Errorf("query-cpus-fast: %w", err)
	}
	for _, cpu := range cpus {
		c.vcpus = append(c.vcpus, cpu.Thread)
	}
	return c, nil
}

func (c *clocks) read() (s sample, err error) {
	if c.vhostd != 0 {
		if s.vhostd, err = process(c.vhostd); err != nil {
			return s, err
		}
	}
	all, err := process(c.qemu)
	if err != nil {
		return s, err
	}
	if s.main, err = thread(c.qemu, c.qemu); err != nil {
		return s, err
	}
	for _, tid := range c.vcpus {
		t, err := thread(c.qemu, tid)
		if err != nil {
			return s, err
		}
		s.vcpu += t
	}
	s.other = all - s.main - s.vcpu
	s.wall = time.Since(c.from)
	return s, nil
}

// process is the CPU time of a process, with threads that have ended.
func process(pid int) (time.Duration, error) {
	const schedClock = 2 // CPUCLOCK_SCHED, as in the C library's clock_getcpuclockid
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|schedClock), &ts); err != nil {
		return 0, fmt.Errorf("CPU clock of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// thread is the CPU time of one thread. The kernel brings the figure up to date at every tick and change of threads.
func thread(pid, tid int) (d time.Duration, err error) {
	path := fmt.Sprintf("/proc/%d/task/%d/schedstat", pid, tid)
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	if _, err := fmt.Sscan(string(b), (*int64)(&d)); err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return d, nil
}
