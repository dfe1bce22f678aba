package confine

import (
	"encoding/json"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// cost is what calls take in nanoseconds of processor time, by name: before Apply and after.
type cost map[string][2]float64

const (
	benchEnv   = "VHOSTD_TEST_CONFINE_BENCH"
	benchCalls = 200_000
	benchTurns = 9
)

// processorTime is what this thread has had, in nanoseconds.
func processorTime() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		panic(err)
	}
	return ts.Nano()
}

// measure is the helper of BenchmarkFilter: the least of several turns, for each call.
func measure() int {
	runtime.LockOSThread()
	null, err := unix.Open("/dev/null", unix.O_WRONLY, 0)
	if err != nil {
		return 1
	}
	calls := benchmarked(null)
	all := cost{}
	for at := range 2 {
		for name, call := range calls {
			var ns []float64
			for range benchTurns {
				start := processorTime()
				for range benchCalls {
					call()
				}
				ns = append(ns, float64(processorTime()-start)/benchCalls)
			}
			both := all[name]
			both[at] = slices.Min(ns)
			all[name] = both
		}
		if at == 0 {
			if _, err := Apply(Needs{Use: Ring, Remove: []string{"/nowhere"}}); err != nil {
				return 1
			}
		}
	}
	_ = json.NewEncoder(os.Stdout).Encode(all)
	return 0
}

// BenchmarkFilter tells what the filter adds to calls: to those of the hot loop, which the kernel finds in its bitmap, and to one that runs the program.
func BenchmarkFilter(b *testing.B) {
	if s := Supported(); !s.Seccomp {
		b.Skip("skipped: the kernel has no seccomp filters")
	}
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), benchEnv+"=1")
	out, err := cmd.Output()
	if err != nil {
		b.Fatal(err)
	}
	var all cost
	if err := json.Unmarshal(out, &all); err != nil {
		b.Fatal(err)
	}
	for name, ns := range all {
		b.Run(name, func(b *testing.B) {
			for b.Loop() { // what is reported was measured by the helper
			}
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(ns[0], "ns-before/call")
			b.ReportMetric(ns[1], "ns-after/call")
		})
	}
}
