package vhostuser

import (
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

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
