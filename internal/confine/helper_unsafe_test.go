package confine

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

func addr(b *byte) uintptr { return uintptr(unsafe.Pointer(b)) }

// peek reads a byte of the parent's memory, at an address where there need not be any.
func peek() error {
	var b byte
	local := unix.Iovec{Base: &b, Len: 1}
	_, err := unix.ProcessVMReadv(os.Getppid(), []unix.Iovec{local}, []unix.RemoteIovec{{Base: 0x400000, Len: 1}}, 0)
	return err
}

// raise asks for the capabilities that the thread has anyway, which is allowed to everybody.
func raise() error {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var d [2]unix.CapUserData
	_ = unix.Capget(&h, &d[0])
	return unix.Capset(&h, &d[0])
}
