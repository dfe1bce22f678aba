package sys

import (
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrNotifier refuses a descriptor that notifies nobody.
var ErrNotifier = errors.New("want an eventfd")

// Notifier makes reads and writes of an eventfd from elsewhere return at once, and refuses what is none. About a file the kernel may ask somebody in user
// space, at a poll already, and wait for the answer for as long as it takes; an epoll descriptor passes that question on to what is in it. A pipe or a socket
// is locked while somebody else's read or write of it waits for a page of his. The flag belongs to the open file, which others have too: see ReadNow.
func Notifier(fd int) error {
	ok, err := isEventFD(fd)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("descriptor is something else: %w", ErrNotifier)
	}
	return unix.SetNonblock(fd, true)
}

// ClosesAtOnce tells of an eventfd, and of a file of shared memory, that nobody is asked and nothing waited for when it is closed. Of others it may not be so.
func ClosesAtOnce(fd int) bool {
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0); err == nil {
		return true
	}
	ok, err := isEventFD(fd)
	return err == nil && ok
}

// isEventFD asks no file that is not of the kernel's own: the device that eventfds are on has no file systems of others.
func isEventFD(fd int) (bool, error) {
	own, err := eventFDs()
	if err != nil {
		return false, err
	}
	dev, err := device(fd)
	if err != nil || dev != own.device {
		return false, err
	}
	return answersOf(fd) == own.answers, nil
}

// answers tell an eventfd from others that have no file of their own, and change nothing. Most take no write at all, such as epoll's and timers, whereas an
// eventfd looks for what is written, and finds nothing at address 0. Of those that do so too, fanotify's for one, there is no read that does not wait; an eventfd
// has one, if the kernel has (see ReadNow), and refuses it for a single byte.
type answers struct{ write, read syscall.Errno }

func answersOf(fd int) (a answers) {
	_, _, a.write = unix.Syscall(unix.SYS_WRITE, uintptr(fd), 0, 8)
	_, a.read = readNow(fd, make([]byte, 1))
	return a
}

type eventFDKind struct {
	device uint64
	answers
}

// ofEventFDs is what all eventfds have in common, once it is known.
var ofEventFDs atomic.Pointer[eventFDKind]

// eventFDs looks at an eventfd of our own. What the host does not have at the moment it may have the next time.
func eventFDs() (*eventFDKind, error) {
	if k := ofEventFDs.Load(); k != nil {
		return k, nil
	}
	e, err := NewEventFD()
	if err != nil {
		return nil, err
	}
	defer e.Close()
	dev, err := device(e.FD())
	if err != nil {
		return nil, err
	}
	k := &eventFDKind{dev, answersOf(e.FD())}
	ofEventFDs.Store(k)
	return k, nil
}

// device is the number of the device that fd's file is on. Nobody is asked for it.
func device(fd int) (uint64, error) {
	var s unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &s); err != nil {
		return 0, fmt.Errorf("descriptor: %w", err)
	}
	return unix.Mkdev(s.Dev_major, s.Dev_minor), nil
}
