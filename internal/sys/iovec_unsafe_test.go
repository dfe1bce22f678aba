package sys

import (
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// BenchmarkIovecsWritev is a vectored write that costs the kernel next to nothing, as Iovecs does it and as a system call that tells the
// scheduler.
func BenchmarkIovecsWritev(b *testing.B) {
	fd, err := unix.Open("/dev/null", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fd)
	var v Iovecs
	v.Add(make([]byte, 12))
	v.Add(make([]byte, 52))
	b.Run("scheduler=unaware", func(b *testing.B) {
		for range b.N {
			if _, errno := v.Writev(fd); errno != 0 {
				b.Fatal(errno)
			}
		}
	})
	b.Run("scheduler=told", func(b *testing.B) {
		for range b.N {
			_, _, errno := syscall.Syscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(v.v))), uintptr(v.Len()))
			if errno != 0 {
				b.Fatal(errno)
			}
		}
	})
}
