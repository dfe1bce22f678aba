package uring

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// TestRestricted: operations that would pass a seccomp filter by are refused, as are operations with other flags, and changes of the ring; what the
// package is for is not.
func TestRestricted(t *testing.T) {
	r := newRing(t, 8, 8)
	for name, e := range map[string]sqe{
		"nop":              {opcode: 0},
		"readv":            {opcode: 1},
		"connect":          {opcode: 16},
		"openat":           {opcode: 18},
		"splice":           {opcode: 30},
		"unlinkat":         {opcode: 36},
		"socket":           {opcode: 45},
		"write in thread":  {opcode: opWritev, flags: 1 << 4}, // IOSQE_ASYNC
		"write then other": {opcode: opWritev, flags: 1 << 2}, // IOSQE_IO_LINK
	} {
		if !r.queue(e) {
			t.Fatal("the ring is full")
		}
		_, _ = r.Submit()
		if got := r.wait(t).Errno(); got != unix.EACCES {
			t.Errorf("%s: %v, want EACCES", name, got)
		}
	}
	if err := register(r.fd, registerProbe, &r.ops, numOps); !errors.Is(err, unix.EACCES) {
		t.Errorf("a probe of the ring: %v, want EACCES", err)
	}
	if err := register[byte](r.fd, registerRestrict, nil, 0); !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EBADFD) {
		t.Errorf("restrictions once more: %v, want EACCES", err)
	}
	near, far := seqpacket(t)
	b := []byte("x")
	if !r.Writev(near, []unix.Iovec{{Base: &b[0], Len: 1}}, 7) {
		t.Fatal("the ring is full")
	}
	submit(t, r)
	if c := r.wait(t); c.Errno() != 0 || c.N() != 1 {
		t.Errorf("a write: %v, %d bytes", c.Errno(), c.N())
	}
	if n, err := unix.Read(far, make([]byte, 8)); n != 1 || err != nil {
		t.Errorf("%d bytes came (%v), want 1", n, err)
	}
}
