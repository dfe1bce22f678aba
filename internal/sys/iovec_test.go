package sys

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"
)

func TestIovecs(t *testing.T) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	var out, in Iovecs
	if n := testing.AllocsPerRun(1, func() { _, _ = in.Readv(fds[0]) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	a, b := make([]byte, 3), make([]byte, 10)
	in.Add(a)
	in.Add(b)
	if _, errno := in.Readv(fds[0]); errno != unix.EAGAIN {
		t.Errorf("reading an empty pipe: %v, want EAGAIN", errno)
	}
	for _, s := range []string{"ab", "", "cdefg"} {
		out.Add([]byte(s))
	}
	if out.Len() != 2 {
		t.Errorf("%d pieces, want 2: the empty one does not count", out.Len())
	}
	if n, errno := out.Writev(fds[1]); n != 7 || errno != 0 {
		t.Errorf("Writev is %d, %v", n, errno)
	}
	if n, errno := in.Readv(fds[0]); n != 7 || errno != 0 {
		t.Errorf("Readv is %d, %v", n, errno)
	}
	if got := append(a, b[:4]...); !bytes.Equal(got, []byte("abcdefg")) {
		t.Errorf("read %q", got)
	}
	if out.Reset(); out.Len() != 0 {
		t.Error("not empty after Reset")
	}
	for range MaxIovecs + 1 {
		out.Add(a)
	}
	if _, errno := out.Writev(fds[1]); errno != unix.EINVAL {
		t.Errorf("writing %d pieces: %v, want EINVAL", out.Len(), errno)
	}
}
