package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// bind makes the socket at path.
func bind(path string) (*net.UnixListener, error) {
	if limit := len(unix.RawSockaddrUnix{}.Path) - 1; len(path) > limit {
		return nil, fmt.Errorf("path of %d bytes, limit %d: %s", len(path), limit, path)
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// The mode of an unbound socket becomes that of its file: nobody else can connect at any moment.
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		cerr := raw.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(cerr, err)
	}}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	sock := l.(*net.UnixListener)
	sock.SetUnlinkOnClose(false) // it would remove a successor's socket as well
	return sock, nil
}

// removeStale removes a socket that nobody listens on.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is not a socket: remove it, or choose another path", path)
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
	}
	switch {
	case err == nil, errors.Is(err, unix.EAGAIN): // accepted, or waiting in a full backlog
		return fmt.Errorf("%s is in use by another process: stop it, or choose another path", path)
	case errors.Is(err, unix.ECONNREFUSED):
		return os.Remove(path)
	}
	return fmt.Errorf("cannot tell whether %s is in use: %w", path, err)
}
