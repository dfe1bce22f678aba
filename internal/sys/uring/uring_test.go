package uring

import (
	"bytes"
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/sys"
)

func newRing(t *testing.T, sends, completions int) *Ring {
	t.Helper()
	r, err := New(sends, completions)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) || errors.Is(err, ErrOld) {
		require.Skip(t, "uring", "%v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// socket returns a UDP socket on the loopback interface, and its address.
func socket(t *testing.T) (int, sys.Sockaddr) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	a, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	port := a.(*unix.SockaddrInet4).Port
	return fd, sys.NewSockaddr(netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(port)), 0)
}

func (r *Ring) wait(t *testing.T) Completion {
	t.Helper()
	for {
		if c, ok := r.Next(); ok {
			return c
		}
		fds := []unix.PollFd{{Fd: int32(r.FD()), Events: unix.POLLIN}}
		if n, err := unix.Poll(fds, 20000); n == 0 && err == nil {
			t.Fatal("no completion within 20 s")
		}
		r.Poke()
	}
}

func submit(t *testing.T, r *Ring) {
	t.Helper()
	if lost, err := r.Submit(); err != nil {
		t.Fatalf("%d lost: %v", lost, err)
	}
}

func TestSendmsgZC(t *testing.T) {
	r := newRing(t, 8, 64)
	fd, to := socket(t)
	in := sys.NewInbox(4, 100)
	for i := range 200 { // the rings wrap
		var m sys.Msgs
		for j := range 3 {
			m.Begin(&to)
			m.Add([]byte{byte(i), byte(j)})
			m.Add([]byte("payload"))
		}
		for j := range 3 {
			if !r.SendmsgZC(fd, m.Header(j), uint64(100*i+j)) {
				t.Fatal("no room in an empty ring")
			}
		}
		submit(t, r)
		if n, errno := in.Recv(fd); n != 3 || errno != 0 {
			t.Fatalf("%d datagrams, %v", n, errno)
		}
		for j := range 3 {
			b, from := in.Datagram(j)
			if want := append([]byte{byte(i), byte(j)}, "payload"...); !bytes.Equal(b, want) || *from != to {
				t.Fatalf("datagram %d of round %d: %q from %v", j, i, b, from.AddrPort())
			}
		}
		notified := 0
		for range 6 {
			c := r.wait(t)
			if c.Data/100 != uint64(i) || c.Errno() != 0 || c.Notif() == c.More() {
				t.Fatalf("completion %+v in round %d", c, i)
			}
			if c.Notif() {
				notified++
				if !c.Copied() {
					t.Error("sent to a socket of this host without a copy")
				}
			}
		}
		if _, ok := r.Next(); ok || notified != 3 {
			t.Fatalf("%d notifications, and more: %v", notified, ok)
		}
	}
}

func TestRefusedSend(t *testing.T) {
	r := newRing(t, 4, 16)
	fd, to := socket(t)
	var m sys.Msgs
	m.Begin(&to)
	m.Add(make([]byte, 1<<16)) // longer than any datagram
	m.Begin(&to)
	m.Add([]byte("behind it"))
	r.SendmsgZC(fd, m.Header(0), 7)
	r.SendmsgZC(fd, m.Header(1), 8)
	r.SendmsgZC(-1, m.Header(1), 9)
	submit(t, r)
	ends := map[uint64]unix.Errno{}
	for len(ends) < 3 {
		c := r.wait(t)
		if errno := c.Errno(); errno != 0 {
			ends[c.Data] = errno
		}
		if !c.More() && ends[c.Data] == 0 {
			ends[c.Data] = 0
		}
	}
	if ends[7] != unix.EMSGSIZE || ends[8] != 0 || ends[9] != unix.EBADF {
		t.Errorf("ended with %v", ends)
	}
}

func TestFullRing(t *testing.T) {
	r := newRing(t, 3, 16)
	fd, to := socket(t)
	var m sys.Msgs
	m.Begin(&to)
	m.Add([]byte("x"))
	for i := range 4 { // 3 are rounded up
		if r.Room() != 4-i || !r.SendmsgZC(fd, m.Header(0), 0) {
			t.Fatalf("room for %d after %d", r.Room(), i)
		}
	}
	if r.SendmsgZC(fd, m.Header(0), 0) || r.Queued() != 4 {
		t.Errorf("a full ring takes more: %d", r.Queued())
	}
	submit(t, r)
	if r.Queued() != 0 || r.Room() != 4 {
		t.Errorf("%d are queued after Submit", r.Queued())
	}
	for range 8 {
		r.wait(t)
	}
}

// TestPollFromElsewhere: another thread than the one that submitted hears of the completion.
func TestPollFromElsewhere(t *testing.T) {
	r := newRing(t, 4, 16)
	fd, to := socket(t)
	done := make(chan Completion)
	go func() {
		for {
			fds := []unix.PollFd{{Fd: int32(r.FD()), Events: unix.POLLIN}}
			if n, _ := unix.Poll(fds, 20000); n == 0 {
				close(done)
				return
			} else if n == 1 {
				c, _ := r.Next()
				done <- c
				return
			}
		}
	}()
	var m sys.Msgs
	m.Begin(&to)
	m.Add([]byte("x"))
	r.SendmsgZC(fd, m.Header(0), 42)
	submit(t, r)
	if c := <-done; c.Data != 42 {
		t.Errorf("polled %+v", c)
	}
}
