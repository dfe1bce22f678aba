package vhosttest

import (
	"errors"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Lingering is a socket whose close waits, for as long as whoever made it likes, for a peer that does not read.
func Lingering(t testing.TB) (fd int, release func()) {
	t.Helper()
	must := func(fd int, err error) int {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	l := must(unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
	release = sync.OnceFunc(func() { unix.Close(l) })
	t.Cleanup(release)
	if err := errors.Join(unix.Bind(l, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(l, 1)); err != nil {
		t.Fatal(err)
	}
	at, err := unix.Getsockname(l)
	if err != nil {
		t.Fatal(err)
	}
	s := must(unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
	if err := unix.Connect(s, at); err != nil {
		t.Fatal(err)
	}
	unix.SetNonblock(s, true)
	for {
		if _, err := unix.Write(s, make([]byte, 1<<16)); err != nil {
			break
		}
	}
	unix.SetNonblock(s, false)
	if err := unix.SetsockoptLinger(s, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 30}); err != nil {
		t.Fatal(err)
	}
	return s, release
}
