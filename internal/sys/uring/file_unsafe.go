package uring

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// SetFile makes fd the descriptor that WritevFile writes to: the kernel looks it up once instead of at every request. It keeps what fd
// refers to open until Close, whatever becomes of fd.
func (r *Ring) SetFile(fd int) error {
	fds := []int32{int32(fd)}
	if err := register(r.fd, registerFiles, &fds[0], len(fds)); err != nil {
		return fmt.Errorf("registering descriptor %d: %w", fd, err)
	}
	r.file = true
	return nil
}

// WritevFile is Writev to the descriptor of SetFile.
func (r *Ring) WritevFile(v []unix.Iovec, data uint64) bool {
	return r.queue(sqe{
		opcode: opWritev, flags: sqeFixedFile, addr: uint64(uintptr(unsafe.Pointer(&v[0]))), length: uint32(len(v)), op: rwfNowait, data: data,
	})
}

// dropFile gives up the descriptor of SetFile. Closing the ring does so as well, but only some time after it has returned.
func (r *Ring) dropFile() error {
	if !r.file {
		return nil
	}
	r.file = false
	if err := register[byte](r.fd, unregisterFiles, nil, 0); err != nil {
		return fmt.Errorf("unregistering the descriptor: %w", err)
	}
	return nil
}
