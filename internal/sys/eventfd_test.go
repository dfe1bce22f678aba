package sys

import (
	"encoding/binary"
	"math"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
)

// readable polls without waiting.
func readable(t *testing.T, fd int) bool {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if _, err := unix.Poll(fds, 0); err != nil {
		t.Fatal(err)
	}
	return fds[0].Revents&unix.POLLIN != 0
}

func TestEventFDSignalsAddUpToOneWakeUp(t *testing.T) {
	e, err := NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if readable(t, e.FD()) || e.Drain() {
		t.Fatal("a new eventfd is signalled")
	}
	e.Signal()
	e.Signal()
	if !readable(t, e.FD()) {
		t.Fatal("not readable after Signal")
	}
	if !e.Drain() || e.Drain() || readable(t, e.FD()) {
		t.Fatal("one Drain does not take all signals")
	}
}

func TestEventFDSignalAtMaximumDoesNotBlock(t *testing.T) {
	e, err := NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	var full [8]byte
	binary.NativeEndian.PutUint64(full[:], math.MaxUint64-1)
	if _, err := unix.Write(e.FD(), full[:]); err != nil {
		t.Fatal(err)
	}
	e.Signal()
	if !e.Drain() {
		t.Fatal("not signalled")
	}
}

func TestEventFDCloseTwice(t *testing.T) {
	e, err := NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if e.FD() != -1 {
		t.Fatalf("FD() = %d after Close", e.FD())
	}
}

func TestEventFDAllocatesNothing(t *testing.T) {
	if require.Race {
		t.Skip("the race detector allocates on its own account")
	}
	e, err := NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if n := testing.AllocsPerRun(100, func() { e.Signal(); e.Drain() }); n != 0 {
		t.Fatalf("%v allocations per signal", n)
	}
}

func TestEventFDBlockUntilDrain(t *testing.T) {
	e, err := NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	for range 3 {
		if !writable(t, e.FD()) {
			t.Fatal("not writable before Block")
		}
		e.Block()
		e.Block()
		if writable(t, e.FD()) {
			t.Fatal("writable after Block")
		}
		if !e.Drain() {
			t.Fatal("Drain found nothing")
		}
	}
}

func writable(t *testing.T, fd int) bool {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	if _, err := unix.Poll(fds, 0); err != nil {
		t.Fatal(err)
	}
	return fds[0].Revents&unix.POLLOUT != 0
}
