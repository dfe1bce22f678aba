package sys

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrNotifier refuses a descriptor that notifies nobody.
var ErrNotifier = errors.New("want an eventfd, a pipe or a socket")

// Notifier makes reads and writes of a descriptor from elsewhere return at once, and refuses what is no eventfd, pipe or socket: the kernel may ask
// somebody in user space about any other file, at a poll already, and wait for the answer for as long as it takes. The flag belongs to
// the open file, but whoever hands it over has no use for a notification that blocks.
func Notifier(fd int) error {
	known, err := notifierDevices()
	if err != nil {
		return err
	}
	dev, err := device(fd)
	if err != nil {
		return err
	}
	if !slices.Contains(known, dev) {
		return fmt.Errorf("descriptor is a file: %w", ErrNotifier)
	}
	return unix.SetNonblock(fd, true)
}

// notifierDevices are the device numbers of the file systems, inside the kernel, that anonymous inodes, pipes and sockets are of.
var notifierDevices = sync.OnceValues(func() (devices []uint64, err error) {
	var pipe, pair [2]int
	event, err := NewEventFD()
	if err != nil {
		return nil, err
	}
	defer event.Close()
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	if pair, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	for _, fd := range []int{event.FD(), pipe[0], pair[0]} {
		dev, err := device(fd)
		if err != nil {
			return nil, err
		}
		devices = append(devices, dev)
	}
	return devices, nil
})

// device is the number of the device that fd's file is on. Nobody is asked for it.
func device(fd int) (uint64, error) {
	var s unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &s); err != nil {
		return 0, fmt.Errorf("descriptor: %w", err)
	}
	return unix.Mkdev(s.Dev_major, s.Dev_minor), nil
}
