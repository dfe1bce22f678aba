package sys

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestNotifier(t *testing.T) {
	e, err := NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if err := unix.SetNonblock(int(r.Fd()), false); err != nil {
		t.Fatal(err)
	}
	for name, fd := range map[string]int{"eventfd": e.FD(), "pipe": int(r.Fd())} {
		if err := Notifier(fd); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
			t.Errorf("%s has flags %#x, %v", name, flags, err)
		}
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
	for name, fd := range map[string]int{"memory file": memory, "/dev/zero": int(zero.Fd())} {
		if err := Notifier(fd); !errors.Is(err, ErrNotifier) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := Notifier(1 << 20); !errors.Is(err, unix.EBADF) {
		t.Errorf("no descriptor: %v", err)
	}
}
