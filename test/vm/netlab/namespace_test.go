//go:build linux

package netlab

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/vhosttest"
)

// The first thread, which cannot end before the process, is for the first goroutine alone.
func init() { runtime.LockOSThread() }

// What is started in Host outlives the thread of the goroutine that asked for it.
func TestHostStartOutlivesThread(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	var started error
	thread := make(chan int)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		started = Host.Start(cmd)
		thread <- unix.Gettid()
	}()
	task := fmt.Sprintf("/proc/self/task/%d", <-thread)
	if started != nil {
		t.Fatal(started)
	}
	vhosttest.Eventually(t, "the thread's end", func() bool { _, err := os.Stat(task); return err != nil })
	_ = cmd.Process.Signal(syscall.SIGTERM) // the signal of a thread's end would have come first, and is a kill
	_ = cmd.Wait()
	if s := cmd.ProcessState.Sys().(syscall.WaitStatus).Signal(); s != syscall.SIGTERM {
		t.Errorf("the process ended by %v", s)
	}
}
