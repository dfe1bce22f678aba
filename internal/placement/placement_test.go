package placement

import (
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// allowed are the processors that this process may use.
func allowed(t *testing.T) (cpus []int) {
	t.Helper()
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		t.Fatal(err)
	}
	for i := range 1024 {
		if set.IsSet(i) {
			cpus = append(cpus, i)
		}
	}
	return cpus
}

func TestBetween(t *testing.T) {
	cpus := allowed(t)
	if class, rtt := Between(cpus[0], cpus[0]); class != Same || rtt != 0 {
		t.Errorf("one processor: %v, %v", class, rtt)
	}
	for _, c := range [][2]int{{-1, cpus[0]}, {cpus[0], -1}, {cpus[0], 1000}, {1000, cpus[0]}} {
		if class, rtt := Between(c[0], c[1]); class != Unknown || rtt != 0 {
			t.Errorf("processors %v: %v, %v", c, class, rtt)
		}
	}
	if len(cpus) < 2 {
		t.Skip("this machine has one processor")
	}
	// A busy machine may not let both ends run at once: then the answer is unknown, and not a wrong one.
	class, rtt := Between(cpus[0], cpus[1])
	switch {
	case class == Near && rtt > 0 && rtt < NearMax:
	case class == Far && rtt >= NearMax:
	case class == Unknown && rtt == 0:
	default:
		t.Errorf("processors %v: %v with a round trip of %v", cpus[:2], class, rtt)
	}
}

func TestMerge(t *testing.T) {
	if Merge(Near, Near) != Near || Merge(Near, Far) != Moved || Merge(Unknown, Unknown) != Unknown {
		t.Error("Merge is not \"both, or moved\"")
	}
}

// TestThreads sees a thread of this process that is busy, and where.
func TestThreads(t *testing.T) {
	cpu := allowed(t)[0]
	before := Threads(os.Getpid())
	ids := make(chan int)
	var stop atomic.Bool
	go func() {
		runtime.LockOSThread() // and ends with the goroutine, pinned as it is
		if err := Pin(cpu); err != nil {
			t.Error(err)
		}
		if got := CPU(); got != cpu {
			t.Errorf("CPU is %d, pinned to %d", got, cpu)
		}
		ids <- unix.Gettid()
		for !stop.Load() {
		}
	}()
	id := <-ids
	defer stop.Store(true)
	for { // until it is the busiest
		now := Threads(os.Getpid())
		if busiest, ok := Busiest(before, now, 0); ok && busiest == id && now[id].Ran > 0 {
			if now[id].CPU != cpu {
				t.Errorf("thread %d is on processor %d, pinned to %d", id, now[id].CPU, cpu)
			}
			if other, ok := Busiest(before, now, id); ok && other == id {
				t.Error("Busiest returns the thread that it is to leave out")
			}
			if Ran(before, now) < now[id].Ran-before[id].Ran || Waited(now, now) != 0 {
				t.Errorf("sums of %v and %v", Ran(before, now), Waited(now, now))
			}
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func TestThreadsOfNobody(t *testing.T) {
	if all := Threads(1 << 30); len(all) != 0 {
		t.Errorf("%d threads", len(all))
	}
}

func TestLastCPU(t *testing.T) {
	stat := "7 (a b) c) R 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 41 0 0 0\n"
	if cpu, err := lastCPU([]byte(stat)); err != nil || cpu != 41 {
		t.Errorf("processor %d, %v, want 41", cpu, err)
	}
	for _, bad := range []string{"", "7 (a) R 1 2"} {
		if _, err := lastCPU([]byte(bad)); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestMedian(t *testing.T) {
	v := []float64{3, 1, 2, 9}
	if Median(v) != 3 || Median(v[:1]) != 3 || Median(nil) != 0 || v[0] != 3 {
		t.Errorf("medians %v, %v, %v of %v", Median(v), Median(v[:1]), Median(nil), v)
	}
}
