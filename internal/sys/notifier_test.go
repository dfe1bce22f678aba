package sys

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
)

func TestNotifier(t *testing.T) {
	e, err := NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if err := unix.SetNonblock(e.FD(), false); err != nil {
		t.Fatal(err)
	}
	if err := Notifier(e.FD()); err != nil {
		t.Errorf("eventfd: %v", err)
	}
	if flags, err := unix.FcntlInt(uintptr(e.FD()), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
		t.Errorf("eventfd has flags %#x, %v", flags, err)
	}
	if e.Drain() {
		t.Error("the eventfd was signalled")
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	open := func(fd int, err error) int {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	memory, err := unix.MemfdCreate("notifier", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(memory)
	zero, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer zero.Close()
	others := map[string]int{
		"memory file": memory, "/dev/zero": int(zero.Fd()), "pipe": int(w.Fd()),
		"socket": open(unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)),
		// What is in it is asked at each poll, and may be a file of FUSE's, whose owner answers when he likes.
		"epoll":   open(unix.EpollCreate1(unix.EPOLL_CLOEXEC)),
		"timer":   open(unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC)),
		"inotify": open(unix.InotifyInit1(unix.IN_CLOEXEC)),
	}
	// It takes what is written, as an eventfd does, and there is no read of it that does not wait.
	if fd, err := unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_REPORT_FID|unix.FAN_CLOEXEC, 0); err == nil {
		others["fanotify"] = open(fd, nil)
	} else if t.Logf("without fanotify: %v", err); require.Required("fanotify") {
		t.Error("fanotify is required")
	}
	for name, fd := range others {
		if err := Notifier(fd); !errors.Is(err, ErrNotifier) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := Notifier(1 << 20); !errors.Is(err, unix.EBADF) {
		t.Errorf("no descriptor: %v", err)
	}
}

// TestNotifierTriesAgain: an eventfd that comes when there is no descriptor left to compare it with is refused, and the next one is not.
func TestNotifierTriesAgain(t *testing.T) {
	e, err := NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	defer ofEventFDs.Store(ofEventFDs.Swap(nil))
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	err = Notifier(e.FD())
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, unix.EMFILE) {
		t.Errorf("with no descriptor left: %v", err)
	}
	if err := Notifier(e.FD()); err != nil {
		t.Error(err)
	}
}
