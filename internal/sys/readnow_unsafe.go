package sys

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ReadNow is a read that does not wait, whatever the flags of the open file are: others may have the file too, and clear O_NONBLOCK or take what there was to
// read at any moment. A kernel that knows no such read of an eventfd (before 5.8) is asked for a plain one.
func ReadNow(fd int, b []byte) (int, error) {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	const here = ^uintptr(0) // not at an offset
	for {
		n, _, errno := unix.Syscall6(unix.SYS_PREADV2, uintptr(fd), uintptr(unsafe.Pointer(&v)), 1, here, here, unix.RWF_NOWAIT)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		case unix.ENOSYS, unix.EOPNOTSUPP:
			return unix.Read(fd, b)
		default:
			return 0, syscall.Errno(errno)
		}
	}
}
