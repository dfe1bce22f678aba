package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/config"
)

// Each queue that a guest starts has a thread, and a process of Go that cannot have one more ends. So that no guest can bring that about for all others, a fleet
// opens no more ports than there may be threads for.

// otherThreads is what is kept for Go's runtime, the control side and uplinks.
const otherThreads = 256

// threadLimit is how many threads this process may have, and what says so.
func threadLimit() (limit int, says string) {
	limit, says = math.MaxInt32, "Go's runtime"
	lower := func(n int, what string) {
		if n > 0 && n < limit {
			limit, says = n, what
		}
	}
	for _, path := range append(cgroupLimits(), "/proc/sys/kernel/threads-max", "/proc/sys/kernel/pid_max") {
		if b, err := os.ReadFile(path); err == nil {
			n, _ := strconv.Atoi(strings.TrimSpace(string(b))) // "max" is no number, and no limit
			lower(n, path)
		}
	}
	var nproc unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NPROC, &nproc); err == nil && os.Geteuid() != 0 && nproc.Cur < math.MaxInt32 {
		lower(int(nproc.Cur), "RLIMIT_NPROC (LimitNPROC=)")
	}
	return limit, says
}

// cgroupLimits are the files with the limits of this process's control groups, of either version, up to the top.
func cgroupLimits() (paths []string) {
	b, _ := os.ReadFile("/proc/self/cgroup")
	for line := range strings.Lines(string(b)) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, dir, _ := strings.Cut(rest, ":")
		root := "/sys/fs/cgroup"
		switch controllers {
		case "":
		case "pids":
			root += "/pids"
		default:
			continue
		}
		for ; dir != "/" && dir != "." && dir != ""; dir = filepath.Dir(dir) {
			paths = append(paths, filepath.Join(root, dir, "pids.max"))
		}
	}
	return paths
}

// allowThreads has Go's runtime allow what the host does: its own limit of 10000 is a guard against programs gone wrong.
func (f *fleet) allowThreads() {
	f.threads, f.threadsBy = threadLimit()
	debug.SetMaxThreads(max(f.threads, 10000))
}

// room tells why there may be too few threads for a further port of so many queue pairs; nil: there are enough.
func (f *fleet) room(pairs int) error {
	used := otherThreads
	for i, p := range f.all() {
		if m, ok := p.(*member); ok && i.kind == config.KindPort && m.err() == nil {
			used += 2 * m.port.pairs()
		}
	}
	if used+2*pairs > f.threads {
		return fmt.Errorf("the port can take %d threads, one for each queue, and %d are left of the %d that %s allows", 2*pairs, max(f.threads-used, 0), f.threads, f.threadsBy)
	}
	return nil
}
