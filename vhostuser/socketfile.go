package vhostuser

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

// maxPath is the length of the longest socket path, in bytes.
const maxPath = len(unix.RawSockaddrUnix{}.Path) - 1

func checkPath(path string) error {
	if path == "" {
		return errors.New("vhost-user socket: the path is empty")
	}
	if len(path) > maxPath {
		return fmt.Errorf("vhost-user socket: path of %d bytes, limit %d: %s", len(path), maxPath, path)
	}
	return nil
}

// socketFile is a socket that this process has put into the file system.
type socketFile struct {
	path string
	info fs.FileInfo // to tell it from a later one of the same name
}

// remove deletes the path unless somebody else has put another file there.
func (f *socketFile) remove() error {
	if f == nil {
		return nil
	}
	info, err := os.Lstat(f.path)
	if err != nil || !os.SameFile(info, f.info) {
		return nil
	}
	return os.Remove(f.path)
}

func bindSocket(path string, mode uint32) (*net.UnixListener, *socketFile, error) {
	if err := checkPath(path); err != nil {
		return nil, nil, err
	}
	if err := removeStale(path); err != nil {
		return nil, nil, err
	}
	// The permissions of the unbound socket become those of its file, less the umask: never wider than asked for.
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		cerr := raw.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), mode) })
		return errors.Join(cerr, err)
	}}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, nil, err
	}
	sock := l.(*net.UnixListener)
	sock.SetUnlinkOnClose(false) // it would remove a successor's socket as well
	file, err := settle(path, mode)
	if err != nil {
		sock.Close()
		return nil, nil, err
	}
	return sock, file, nil
}

// settle gives the new socket the permissions that the umask took, and remembers which file it is.
func settle(path string, mode uint32) (*socketFile, error) {
	if err := os.Chmod(path, fs.FileMode(mode)); err != nil {
		return nil, err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	return &socketFile{path, info}, nil
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

func inheritListener(fd int) (*net.UnixListener, error) {
	f := os.NewFile(uintptr(fd), "vhost-user listening socket")
	if f == nil {
		return nil, fmt.Errorf("file descriptor %d: %w", fd, os.ErrInvalid)
	}
	defer f.Close()
	if on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || on == 0 {
		return nil, fmt.Errorf("file descriptor %d is not a listening socket", fd)
	}
	l, err := net.FileListener(f) // duplicates
	if err != nil {
		return nil, fmt.Errorf("file descriptor %d: %w", fd, err)
	}
	sock, ok := l.(*net.UnixListener)
	if !ok || sock.Addr().Network() != "unix" {
		l.Close()
		return nil, fmt.Errorf("file descriptor %d is not a UNIX stream socket", fd)
	}
	sock.SetUnlinkOnClose(false)
	return sock, nil
}
