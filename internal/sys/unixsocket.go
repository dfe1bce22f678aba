package sys

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

// CheckPath refuses paths that a UNIX socket cannot have.
func CheckPath(path string) error {
	if path == "" {
		return errors.New("the path of the socket is empty")
	}
	if len(path) > maxPath {
		return fmt.Errorf("socket path of %d bytes, limit %d: %s", len(path), maxPath, path)
	}
	return nil
}

// SocketFile is a socket that this process has put into the file system; nil stands for none.
type SocketFile struct {
	Path string
	info fs.FileInfo // to tell it from a later one of the same name
}

// Remove deletes the path unless somebody else has put another file there.
func (f *SocketFile) Remove() error {
	if f == nil {
		return nil
	}
	info, err := os.Lstat(f.Path)
	if err != nil || !os.SameFile(info, f.info) {
		return nil
	}
	return os.Remove(f.Path)
}

// ListenUnix makes a listening socket at path with exactly the permissions mode. A socket left over from a process that has ended
// is replaced; one that somebody listens on, or a file of another kind, is an error. The file is removed by SocketFile.Remove alone.
func ListenUnix(path string, mode uint32) (*net.UnixListener, *SocketFile, error) {
	if err := CheckPath(path); err != nil {
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

// OwnSocket gives the socket at path an owner and a group, of which -1 leaves what there is, and a mode; all of it or, where one is refused, nothing. What is
// looked at is what is changed: whoever may write to its directory, such as a VMM, can put a link to somebody else's file in its place at any time.
func OwnSocket(path string, uid, gid int, mode uint32) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return fmt.Errorf("%s is no socket any more: somebody has put another file there", path)
	}
	old := st.Mode & 0o777
	if op, err := own(fd, uid, gid, mode, mode != old); err != nil {
		_, _ = own(fd, int(st.Uid), int(st.Gid), old, true)
		return &fs.PathError{Op: op, Path: path, Err: err}
	}
	return nil
}

// own tells what failed, if something did. The owner comes last: a file of somebody else's takes a capability to change the mode of, and to give it away takes
// another one, which is all that a confined vhostd keeps. One that is somebody else's is taken for that time.
func own(fd, uid, gid int, mode uint32, changes bool) (op string, err error) {
	first := uid
	if changes && uid >= 0 {
		first = os.Geteuid()
	}
	if err := unix.Fchownat(fd, "", first, gid, unix.AT_EMPTY_PATH); err != nil {
		return "chown", err
	}
	if changes {
		if err := unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), mode); err != nil { // fchmod(2) does not take such a descriptor
			return "chmod", err
		}
	}
	if first != uid {
		if err := unix.Fchownat(fd, "", uid, -1, unix.AT_EMPTY_PATH); err != nil {
			return "chown", err
		}
	}
	return "", nil
}

// settle gives the new socket the permissions that the umask took, and remembers which file it is.
func settle(path string, mode uint32) (*SocketFile, error) {
	if err := OwnSocket(path, -1, -1, mode); err != nil {
		return nil, err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	return &SocketFile{path, info}, nil
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
