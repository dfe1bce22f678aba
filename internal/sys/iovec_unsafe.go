package sys

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MaxIovecs is the most pieces that the kernel takes in one vectored call (IOV_MAX, include/uapi/linux/uio.h).
const MaxIovecs = 1024

// Iovecs collects the pieces of a vectored read or write. It keeps its memory from one call to the next, so nothing is
// allocated once it has grown. The zero value is empty and ready.
//
// The calls do not tell Go's scheduler that they may block, which saves some 40 ns of the 500 ns that a small write costs here (see
// BenchmarkIovecsWritev): they are for non-blocking descriptors, where the longest is the copy of one 64 KiB frame, under 10 us.
// A page of guest memory that is not there holds up a call as it holds up a load by the program itself.
type Iovecs struct{ v []unix.Iovec }

// Reset empties it.
func (v *Iovecs) Reset() { v.v = v.v[:0] }

// Len is the number of pieces.
func (v *Iovecs) Len() int { return len(v.v) }

// Add appends a piece, unless b is empty. The memory has to stay where it is until Reset.
func (v *Iovecs) Add(b []byte) {
	if len(b) > 0 {
		v.v = append(v.v, unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))})
	}
}

// Readv reads from fd into the pieces, in order, and returns the number of bytes. There are at most MaxIovecs of them.
func (v *Iovecs) Readv(fd int) (int, syscall.Errno) { return v.call(unix.SYS_READV, fd) }

// Writev writes the pieces to fd, in order, and returns the number of bytes. There are at most MaxIovecs of them.
func (v *Iovecs) Writev(fd int) (int, syscall.Errno) { return v.call(unix.SYS_WRITEV, fd) }

func (v *Iovecs) call(nr uintptr, fd int) (int, syscall.Errno) {
	for {
		n, _, errno := unix.RawSyscall(nr, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(v.v))), uintptr(len(v.v)))
		switch errno {
		case 0:
			return int(n), 0
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// Pieces are what a call would read or write, until Reset.
func (v *Iovecs) Pieces() []unix.Iovec { return v.v }
