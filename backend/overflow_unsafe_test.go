package backend_test

import (
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
)

// overflow has the kernel add one to an eventfd whose counter is full, which no write can: a poll then tells of an error, and not only of what there is to read. Here it is
// asynchronous I/O that signals it (io_submit(2)).
func overflow(t *testing.T, fd int) {
	t.Helper()
	const preadCmd, withEventFD = 0, 1 // IOCB_CMD_PREAD, IOCB_FLAG_RESFD
	file := must(unix.MemfdCreate("overflow", unix.MFD_CLOEXEC))
	defer unix.Close(file)
	var ctx uintptr
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(&ctx)), 0); errno != 0 {
		require.Skip(t, "aio", "no asynchronous I/O: %v", errno)
	}
	defer unix.Syscall(unix.SYS_IO_DESTROY, ctx, 0, 0)
	var b [1]byte
	cb := &struct {
		data           uint64
		key, rwFlags   uint32
		opcode, prio   uint16
		fd             uint32
		buf            *byte
		n              uint64
		offset         int64
		reserved       uint64
		flags, eventFD uint32
	}{opcode: preadCmd, fd: uint32(file), buf: &b[0], n: 1, flags: withEventFD, eventFD: uint32(fd)}
	cbs := [1]unsafe.Pointer{unsafe.Pointer(cb)}
	if n, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, ctx, 1, uintptr(unsafe.Pointer(&cbs))); n != 1 {
		t.Fatalf("io_submit: %v", errno)
	}
}
