package sys

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ReadNow is a read that does not wait, whatever the flags of the open file are: others may have the file too, and clear O_NONBLOCK or take what there was to
// read at any moment. A kernel that knows no such read of an eventfd (before 5.8) is asked for a plain one.
func ReadNow(fd int, b []byte) (int, error) {
	n, errno := readNow(fd, b)
	switch errno {
	case 0:
		return n, nil
	case unix.ENOSYS, unix.EOPNOTSUPP:
		return unix.Read(fd, b)
	}
	return 0, errno
}

// readNow is a read that does not wait, or the error of a kernel or a file that knows none.
func readNow(fd int, b []byte) (int, syscall.Errno) {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	const here = ^uintptr(0) // not at an offset
	for {
		n, _, errno := unix.Syscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&v)), 1, here, here, unix.RWF_NOWAIT)
		if errno != unix.EINTR {
			return int(n), errno
		}
	}
}
