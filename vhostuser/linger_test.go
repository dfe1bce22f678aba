package vhostuser

import (
	"errors"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Descriptors in messages that nobody has read go with the connection, and whoever sent them may have that wait.
func TestF18CloseWithUnreadDescriptors(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	c, err := NewConnFD(pair[0], ConnOptions{})
	if err != nil {
		t.Fatal(err)
	}
	fd, release := lingering(t)
	if _, err := unix.SendmsgN(pair[1], []byte{1}, unix.UnixRights(fd), nil, 0); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	start := time.Now()
	c.Close()
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("the close took %v", d)
	}
	release()
}

// lingering is a socket whose close waits, for as long as whoever made it likes, for a peer that does not read.
func lingering(t *testing.T) (fd int, release func()) {
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
