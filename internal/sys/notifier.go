package sys

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrNotifier refuses a descriptor that notifies nobody.
var ErrNotifier = errors.New("want an eventfd")

// Notifier makes reads and writes of an eventfd from elsewhere return at once, and refuses what is none. About a file the kernel may ask somebody in user
// space, at a poll already, and wait for the answer for as long as it takes; an epoll descriptor passes that question on to what is in it. A pipe or a socket
// is locked while somebody else's read or write of it waits for a page of his. The flag belongs to the open file, which others have too: see ReadNow.
func Notifier(fd int) error {
	known, err := anonymous()
	if err != nil {
		return err
	}
	dev, err := device(fd)
	if err != nil {
		return err
	}
	if dev != known || !looksAtWrites(fd) {
		return fmt.Errorf("descriptor is something else: %w", ErrNotifier)
	}
	return unix.SetNonblock(fd, true)
}

// ClosesAtOnce tells of an eventfd, and of a file of shared memory, that nobody is asked and nothing waited for when it is closed. Of others it may not be so.
func ClosesAtOnce(fd int) bool {
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0); err == nil {
		return true
	}
	known, err := anonymous()
	if err != nil {
		return false
	}
	dev, err := device(fd)
	return err == nil && dev == known && looksAtWrites(fd)
}

// looksAtWrites tells an eventfd from others that have no file of their own, such as epoll's and timers: those take no write at all, whereas an eventfd looks
// for what is written, and finds nothing at address 0.
func looksAtWrites(fd int) bool {
	_, _, errno := unix.Syscall(unix.SYS_WRITE, uintptr(fd), 0, 8)
	return errno == unix.EFAULT
}

// anonymous is the number of the device that eventfds are on, which has no file systems of others.
var anonymous = sync.OnceValues(func() (uint64, error) {
	e, err := NewEventFD()
	if err != nil {
		return 0, err
	}
	defer e.Close()
	return device(e.FD())
})

// device is the number of the device that fd's file is on. Nobody is asked for it.
func device(fd int) (uint64, error) {
	var s unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &s); err != nil {
		return 0, fmt.Errorf("descriptor: %w", err)
	}
	return unix.Mkdev(s.Dev_major, s.Dev_minor), nil
}
