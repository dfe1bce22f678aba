package sys

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestPollBriefly: readiness, the end of the time, and that a thread in it stops nobody else: not a collection, which stops the world.
func TestPollBriefly(t *testing.T) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	poll := func(limit time.Duration) (int, bool) {
		set := [2]unix.PollFd{{Fd: -1}, {Fd: int32(fds[0]), Events: unix.POLLIN}}
		for {
			n, errno := PollBriefly(set[:], limit)
			switch errno {
			case 0:
				return n, set[1].Revents == unix.POLLIN
			case unix.EINTR:
			default:
				t.Error(errno)
				return n, false
			}
		}
	}
	if n, ready := poll(time.Millisecond); n != 0 || ready {
		t.Errorf("nothing to read: %d, %v", n, ready)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if n, ready := poll(time.Hour); n != 1 || !ready {
			t.Errorf("something to read: %d, %v", n, ready)
		}
	}()
	for range 20 {
		runtime.GC()
		time.Sleep(time.Millisecond)
	}
	if _, err := unix.Write(fds[1], []byte{1}); err != nil {
		t.Fatal(err)
	}
	<-done
	if n := testing.AllocsPerRun(10, func() { poll(time.Millisecond) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
