package placement

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// getcpu is getcpu(2).
func getcpu() (cpu, node int, err error) {
	var c, n uint32
	if _, _, errno := unix.RawSyscall(unix.SYS_GETCPU, uintptr(unsafe.Pointer(&c)), uintptr(unsafe.Pointer(&n)), 0); errno != 0 {
		return 0, 0, errno
	}
	return int(c), int(n), nil
}
