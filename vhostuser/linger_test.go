package vhostuser_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/vhostuser"
)

// unread sends a descriptor over sock whose close waits, in a message that nobody will read.
func unread(t *testing.T, sock int) (release func()) {
	t.Helper()
	fd, release := vhosttest.Lingering(t)
	if _, err := unix.SendmsgN(sock, []byte{1}, unix.UnixRights(fd), nil, 0); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	return release
}

func pair(t *testing.T, kind int) [2]int {
	t.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(p[1]) })
	return p
}

// soon checks that f, which closes something, does not wait for a peer's descriptor to be closed.
func soon(t *testing.T, f func()) {
	t.Helper()
	start := time.Now()
	f()
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("the close took %v", d)
	}
}

// Descriptors in messages that nobody has read go with the connection, and whoever sent them may have that wait.
func TestF18CloseWithUnreadDescriptors(t *testing.T) {
	p := pair(t, unix.SOCK_STREAM)
	c, err := vhostuser.NewConnFD(p[0], vhostuser.ConnOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer unread(t, p[1])()
	soon(t, func() { c.Close() })
}

// What comes while the connection is closed goes with it as well, and holds up neither who closes nor who was reading: of a descriptor in use, whoever is the last to
// use it is who closes it.
func TestF18CloseWhileRead(t *testing.T) {
	p := pair(t, unix.SOCK_STREAM)
	c, err := vhostuser.NewConnFD(p[0], vhostuser.ConnOptions{})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := c.Sock().SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	closed := make(chan struct{})
	release := func() {}
	soon(t, func() {
		_ = raw.Control(func(uintptr) { // as a read has the descriptor
			go func() { defer close(closed); c.Close() }()
			vhosttest.Eventually(t, "the close has begun", func() bool { return errors.Is(c.Sock().SetDeadline(time.Time{}), net.ErrClosed) })
			release = unread(t, p[1])
		})
	})
	release()
	<-closed
}

// TestHungUpWhileClosing: however long the close of its socket takes, a connection that was closed is seen to be by either end: the next one would be refused else.
func TestHungUpWhileClosing(t *testing.T) {
	p := pair(t, unix.SOCK_STREAM)
	fd, err := unix.Dup(p[1])
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*vhostuser.Conn
	for i, fd := range []int{p[0], fd} {
		if conns[i], err = vhostuser.NewConnFD(fd, vhostuser.ConnOptions{}); err != nil {
			t.Fatal(err)
		}
		defer conns[i].Close()
	}
	raw, err := conns[0].Sock().SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(uintptr) { // the socket cannot go meanwhile
		conns[0].Close()
		if !conns[0].HungUp() || !conns[1].HungUp() {
			t.Errorf("hung up: %v here, %v there", conns[0].HungUp(), conns[1].HungUp())
		}
		if err := conns[0].WriteRaw([]byte{1}, nil); !errors.Is(err, net.ErrClosed) {
			t.Errorf("writing: %v", err)
		}
	})
}

// As may who hands over a back channel that is none, or has such descriptors in it.
func TestF18BackChannelThatIsNone(t *testing.T) {
	fd, release := vhosttest.Lingering(t)
	defer release()
	datagrams := pair(t, unix.SOCK_DGRAM)
	defer unread(t, datagrams[1])()
	for name, fd := range map[string]int{"TCP": fd, "datagrams": datagrams[0]} {
		soon(t, func() {
			if _, err := vhostuser.NewConnFD(fd, vhostuser.ConnOptions{}); err == nil {
				t.Errorf("%s: taken", name)
			}
		})
	}
}

// Who is not admitted holds nobody up, whatever he has sent.
func TestF18NotAdmittedWithUnreadDescriptors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	stranger := errors.New("a stranger")
	var asked atomic.Int32
	sent := make(chan struct{})
	l, err := vhostuser.Listen(path, vhostuser.ListenOptions{Conn: vhostuser.ConnOptions{Admit: func(sys.Peer) error {
		if asked.Add(1) > 1 {
			return nil
		}
		<-sent
		return stranger
	}}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dial := func() int {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	release := unread(t, dial())
	defer release()
	close(sent)
	dial()
	soon(t, func() {
		ctx, cancel := context.WithTimeout(t.Context(), vhosttest.Patience)
		defer cancel()
		c, err := l.Accept(ctx)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	})
}

// Of descriptors that are too many for a message, those that there is no room for would be closed by the kernel, on the thread that reads.
func TestF18CloseOfDescriptorsTooMany(t *testing.T) {
	p := pair(t, unix.SOCK_STREAM)
	c, err := vhostuser.NewConnFD(p[0], vhostuser.ConnOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fd, release := vhosttest.Lingering(t)
	defer release()
	fds := append(slices.Repeat([]int{p[1]}, 2*vhostuser.MaxFDs), fd)
	if _, err := unix.SendmsgN(p[1], []byte{1}, unix.UnixRights(fds...), nil, 0); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	soon(t, func() {
		if _, err := c.ReadMessage(); !errors.Is(err, vhostuser.ErrProtocol) {
			t.Errorf("error %v", err)
		}
	})
}
