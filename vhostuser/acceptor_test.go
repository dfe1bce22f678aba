package vhostuser

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// testListener listens in a directory of the test's own, and returns a function that connects to it.
func testListener(t *testing.T, opts ListenOptions) (*Listener, func() *net.UnixConn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sock")
	l, err := Listen(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, func() *net.UnixConn { return dialPath(t, path) }
}

func dialPath(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func accept(t *testing.T, a Acceptor) *Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := a.Accept(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestListenerOneAfterTheOther(t *testing.T) {
	checkFDs(t)
	l, dial := testListener(t, ListenOptions{})
	for range 3 {
		front := dial()
		c := accept(t, l)
		front.Close()
		c.Close()
	}
}

// TestListenerFrontEndReturnsEarly: a front-end whose successor connects before the back-end has noticed, as when a VMM
// is killed and started again, is not taken for a second one.
func TestListenerFrontEndReturnsEarly(t *testing.T) {
	checkFDs(t)
	l, dial := testListener(t, ListenOptions{})
	front := dial()
	old := accept(t, l) // stays open: the session is being taken down
	front.Close()
	next := dial()
	c := accept(t, l)
	next.Write([]byte{1})
	if n, err := c.sock.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("read %d bytes, %v", n, err)
	}
	old.Close()
}

func TestListenerRefuses(t *testing.T) {
	refused := make(chan struct{}, 1)
	l, dial := testListener(t, ListenOptions{Refused: func() { refused <- struct{}{} }})
	dial()
	second := dial() // the first is not even accepted
	second.SetDeadline(time.Now().Add(patience))
	if n, err := second.Read(make([]byte, 1)); n != 0 || !isHangUp(err) {
		t.Errorf("read %d bytes, %v; want the end of the connection", n, err)
	}
	<-refused
	accept(t, l)
}

func TestListenerClose(t *testing.T) {
	checkFDs(t)
	l, _ := testListener(t, ListenOptions{})
	result := make(chan error)
	go func() {
		_, err := l.Accept(context.Background())
		result <- err
	}()
	l.Close()
	if err := <-result; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept: %v, want net.ErrClosed", err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := os.Lstat(l.file.Path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestListenerAcceptCancelled(t *testing.T) {
	l, _ := testListener(t, ListenOptions{})
	ctx, cancel := context.WithCancel(t.Context())
	go cancel()
	if _, err := l.Accept(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Accept: %v, want context.Canceled", err)
	}
}

func TestListenMode(t *testing.T) {
	for mode, umask := range map[uint32]int{0: 0, 0o600: 0, 0o660: 0o77, 0o666: 0o22} {
		old := unix.Umask(umask)
		l, _ := testListener(t, ListenOptions{Mode: mode})
		unix.Umask(old)
		info, err := os.Stat(l.file.Path)
		if err != nil {
			t.Fatal(err)
		}
		if mode == 0 {
			mode = 0o600
		}
		if got := uint32(info.Mode().Perm()); got != mode {
			t.Errorf("umask %#o: mode %#o, want %#o", umask, got, mode)
		}
	}
}

func TestListenStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	if _, err := Listen(path, ListenOptions{}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("over a live socket: %v", err)
	}
	stale.Close()
	l, err := Listen(path, ListenOptions{})
	if err != nil {
		t.Fatalf("over a stale socket: %v", err)
	}
	defer l.Close()
	dialPath(t, path)
	accept(t, l)
}

func TestListenForeignFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, ListenOptions{}); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("over a file: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Error("the file is gone")
	}
	for _, bad := range []string{"", "/tmp/" + strings.Repeat("x", 200)} {
		if _, err := Listen(bad, ListenOptions{}); err == nil {
			t.Errorf("path of %d bytes: no error", len(bad))
		}
	}
}

// TestListenerKeepsSuccessorsSocket: closing removes the path only while the socket behind it is our own.
func TestListenerKeepsSuccessorsSocket(t *testing.T) {
	l, _ := testListener(t, ListenOptions{})
	path := l.file.Path
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	next, err := Listen(path, ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	l.Close()
	dialPath(t, path)
	accept(t, next)
}

func TestListenFD(t *testing.T) {
	checkFDs(t)
	path := filepath.Join(t.TempDir(), "sock")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 1))
	}
	if err != nil {
		t.Fatal(err)
	}
	l, err := ListenFD(fd, ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	dialPath(t, path)
	accept(t, l)
	l.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the inherited socket's path: %v", err)
	}
	connected, _ := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	defer unix.Close(connected[1])
	if _, err := ListenFD(connected[0], ListenOptions{}); err == nil {
		t.Error("a connected socket passes for a listening one")
	}
}

func TestConnected(t *testing.T) {
	checkFDs(t)
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	a, err := NewConnected(pair[0], ConnOptions{})
	if err != nil {
		t.Fatal(err)
	}
	accept(t, a)
	if _, err := a.Accept(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second Accept: %v, want net.ErrClosed", err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	fd, _ := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if _, err := NewConnected(fd, ConnOptions{}); err == nil {
		t.Error("a file passes for a socket")
	}
}

// TestDialer: it waits for the socket to be there, and connects again after each connection's end.
func TestDialer(t *testing.T) {
	checkFDs(t)
	path := filepath.Join(t.TempDir(), "sock")
	waiting := make(chan error, 8)
	d, err := NewDialer(path, DialOptions{Waiting: func(err error) { waiting <- err }})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	listener := make(chan *net.UnixListener, 1)
	go func() {
		<-waiting // nothing is there yet
		l, _ := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		listener <- l
	}()
	for range 3 {
		c := accept(t, d)
		c.Close()
	}
	(<-listener).Close()
	if len(waiting) != 0 {
		t.Errorf("told %d times in one wait", 1+len(waiting))
	}
}

func TestDialerErrors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	d, err := NewDialer(path, DialOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := d.Accept(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("nobody there: %v, want context.DeadlineExceeded", err)
	}
	result := make(chan error)
	go func() {
		_, err := d.Accept(context.Background())
		result <- err
	}()
	d.Close()
	if err := <-result; !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v, want net.ErrClosed", err)
	}
	dgram, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer dgram.Close()
	d, _ = NewDialer(path, DialOptions{})
	if _, err := d.Accept(t.Context()); !errors.Is(err, unix.EPROTOTYPE) {
		t.Errorf("socket of another type: %v, want EPROTOTYPE", err)
	}
}
