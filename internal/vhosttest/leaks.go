package vhosttest

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// memfdName marks the memory files of all guests in /proc/self/maps.
const memfdName = "vhosttest"

// NoLeaks fails the test when, at its end and after all cleanups that are registered later, there are more goroutines, descriptors
// or mappings of guest memory than now. Tests that use it must not run in parallel with others.
func NoLeaks(t testing.TB) {
	t.Helper()
	warmUp()
	before := fds(t)
	goroutines := goleak.IgnoreCurrent()
	t.Cleanup(func() {
		t.Helper()
		if err := FindGoroutines(goroutines); err != nil {
			t.Errorf("goroutines are left: %v", err)
		}
		var left []string
		var maps int
		for deadline := time.Now().Add(Patience); ; {
			left, maps = newFDs(before, fds(t)), countMappings(t, 0)
			if len(left) == 0 && maps == 0 || time.Now().After(deadline) {
				break
			}
			runtime.GC()
			time.Sleep(10 * time.Millisecond)
		}
		if len(left) > 0 {
			t.Errorf("descriptors are left: %s", strings.Join(left, ", "))
		}
		if maps > 0 {
			t.Errorf("%d mappings of guest memory are left", maps)
		}
	})
}

// FindGoroutines is goleak.Find with Patience: by itself that gives a goroutine less than half a second to end, which a loaded machine takes.
func FindGoroutines(o ...goleak.Option) (err error) {
	for deadline := time.Now().Add(Patience); ; {
		if err = goleak.Find(o...); err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// Main is goleak.VerifyTestMain with Patience.
func Main(m *testing.M) {
	code := m.Run()
	if code == 0 {
		if err := FindGoroutines(); err != nil {
			fmt.Fprintf(os.Stderr, "goroutines are left: %v\n", err)
			code = 1
		}
	}
	os.Exit(code)
}

// warmUp makes the descriptors that Go's runtime keeps for itself once a socket has been used.
var warmUp = sync.OnceFunc(func() {
	r, w, err := os.Pipe()
	if err == nil {
		_ = r.SetReadDeadline(time.Now())
		_, _ = r.Read(make([]byte, 1))
		r.Close()
		w.Close()
	}
})

// fds lists the open descriptors and what they are.
func fds(t testing.TB) map[string]string {
	t.Helper()
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	open := map[string]string{}
	for _, e := range dir {
		// The directory's own descriptor is gone by now.
		if what, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			open[e.Name()] = what
		}
	}
	return open
}

func newFDs(before, now map[string]string) []string {
	var left []string
	for fd, what := range now {
		if was, ok := before[fd]; !ok || was != what {
			left = append(left, fd+" "+what)
		}
	}
	sort.Strings(left)
	return left
}

// FDs is the number of open descriptors.
func FDs(t testing.TB) int {
	t.Helper()
	return len(fds(t))
}

// Mappings is the number of mappings of guest memory in this process, those of all guests themselves included.
func Mappings(t testing.TB) int {
	t.Helper()
	return countMappings(t, 0)
}

// countMappings counts the mappings of the memory file with an inode number, or of all memory files for 0.
func countMappings(t testing.TB, inode uint64) int {
	t.Helper()
	n := 0
	for _, line := range bytes.Split(own(t, "maps"), []byte{'\n'}) {
		f := bytes.Fields(line)
		if len(f) >= 6 && bytes.HasPrefix(f[5], []byte("/memfd:"+memfdName)) && (inode == 0 || string(f[4]) == fmt.Sprint(inode)) {
			n++
		}
	}
	return n
}

// Eventually waits until cond holds, and fails the test when it never does.
func Eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(Patience); !cond(); {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, Patience)
		}
		time.Sleep(200 * time.Microsecond)
	}
}

// Readable tells, without waiting, whether fd can be read.
func Readable(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return err == nil && n == 1 && p[0].Revents&unix.POLLIN != 0
}
