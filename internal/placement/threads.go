package placement

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Thread is what the kernel has counted of one thread.
type Thread struct {
	Ran    time.Duration // on a processor
	Waited time.Duration // for a processor, although it could have run
	CPU    int           // where it ran last
}

// Clock reads the processor time that a process has used so far, with all its threads, ended ones included. A kernel thread is a process.
func Clock(pid int) (time.Duration, error) {
	var ts unix.Timespec
	// The clock's id, as the C library's clock_getcpuclockid makes it: CPUCLOCK_SCHED of a process.
	const schedClock = 2
	if err := unix.ClockGettime(int32(^pid<<3|schedClock), &ts); err != nil {
		return 0, fmt.Errorf("processor clock of process %d: %w", pid, err)
	}
	return time.Duration(ts.Nano()), nil
}

// Threads are those of a process, by thread id. Threads that end meanwhile are left out; a process that is gone, or whose threads this one
// may not see, has none.
func Threads(pid int) map[int]Thread {
	all := map[int]Thread{}
	dirs, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	for _, dir := range dirs {
		tid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		if t, err := readThread(dir); err == nil {
			all[tid] = t
		}
	}
	return all
}

// readThread reads one /proc/PID/task/TID.
func readThread(dir string) (t Thread, err error) {
	sched, err := os.ReadFile(dir + "/schedstat")
	if err != nil {
		return t, err
	}
	if _, err := fmt.Sscan(string(sched), &t.Ran, &t.Waited); err != nil {
		return t, err
	}
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return t, err
	}
	t.CPU, err = lastCPU(stat)
	return t, err
}

// lastCPU reads field 39 of a thread's stat file. The name in field 2 may have any characters, blanks and parentheses included.
func lastCPU(stat []byte) (int, error) {
	const processor = 39 - 3 // counted from field 3, the first behind the name
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) <= processor {
		return -1, fmt.Errorf("stat of a thread has %d fields", len(fields)+2)
	}
	return strconv.Atoi(string(fields[processor]))
}

// Busiest is the thread that ran longest since before, not counting except; ok is false when none ran.
func Busiest(before, now map[int]Thread, except int) (tid int, ok bool) {
	var most time.Duration
	for id, t := range now {
		if d := t.Ran - before[id].Ran; id != except && d > most {
			tid, most, ok = id, d, true
		}
	}
	return tid, ok
}

// Ran is how long the threads in now ran since before.
func Ran(before, now map[int]Thread) (sum time.Duration) {
	for id, t := range now {
		sum += t.Ran - before[id].Ran
	}
	return sum
}

// Waited is how long the threads in now waited for a processor since before.
func Waited(before, now map[int]Thread) (sum time.Duration) {
	for id, t := range now {
		sum += t.Waited - before[id].Waited
	}
	return sum
}
