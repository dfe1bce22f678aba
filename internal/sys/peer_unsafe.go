package sys

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peerGroups are the supplementary groups of a socket's peer; none before Linux 4.13, which does not tell.
func peerGroups(fd int) ([]int, error) {
	ids := make([]uint32, 64)
	for {
		size := uint32(len(ids)) * 4
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&ids[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == unix.ERANGE: // size is what it takes
			ids = make([]uint32, size/4)
			continue
		case errors.Is(errno, unix.ENOPROTOOPT), errno == unix.ENODATA: // an old kernel; a socketpair's end that has no groups
			return nil, nil
		case errno != 0:
			return nil, errno
		}
		groups := make([]int, size/4)
		for i := range groups {
			groups[i] = int(ids[i])
		}
		return groups, nil
	}
}
