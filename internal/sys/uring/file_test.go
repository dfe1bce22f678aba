package uring

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// TestSetFile: a registered descriptor can be written to although it was closed, and is given up when Close returns.
func TestSetFile(t *testing.T) {
	r, err := New(4, 4)
	if err != nil {
		t.Fatal(err)
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	if err := r.SetFile(fds[1]); err != nil {
		t.Fatal(err)
	}
	if err := unix.Close(fds[1]); err != nil {
		t.Fatal(err)
	}
	text := []byte("written")
	for range 10 {
		r.WritevFile([]unix.Iovec{{Base: &text[0], Len: 3}, {Base: &text[3], Len: 4}}, 7)
		submit(t, r)
		if c := r.wait(t); c.Data != 7 || c.Errno() != 0 || c.N() != len(text) {
			t.Fatalf("%+v", c)
		}
		got := make([]byte, 100)
		if n, err := unix.Read(fds[0], got); err != nil || string(got[:n]) != string(text) {
			t.Fatalf("read %q, %v", got[:max(n, 0)], err)
		}
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err := unix.Read(fds[0], text); n != 0 || err != nil {
		t.Errorf("reading a pipe that nobody can write to: %d, %v, want its end", n, err)
	}
}

func TestSetFileError(t *testing.T) {
	r := newRing(t, 4, 16)
	if err := r.SetFile(1 << 20); !errors.Is(err, unix.EBADF) {
		t.Errorf("%v, want EBADF", err)
	}
	text := []byte("x")
	r.WritevFile([]unix.Iovec{{Base: &text[0], Len: 1}}, 1)
	submit(t, r)
	if c := r.wait(t); c.Errno() != unix.EBADF {
		t.Errorf("nothing is registered: %v", c.Errno())
	}
}
