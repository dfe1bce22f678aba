package shm

import (
	"fmt"
	"unsafe"
)

// View returns the first n values of type T in b, which must be aligned for T and hold them. T must have no pointers.
func View[T any](b []byte, n int) ([]T, error) {
	var t T
	size, align := unsafe.Sizeof(t), unsafe.Alignof(t)
	if n <= 0 || uintptr(n) > uintptr(len(b))/size {
		return nil, fmt.Errorf("%d values of %d bytes do not fit in %d bytes", n, size, len(b))
	}
	p := unsafe.Pointer(unsafe.SliceData(b))
	if uintptr(p)%align != 0 {
		return nil, fmt.Errorf("memory is not aligned to %d bytes", align)
	}
	return unsafe.Slice((*T)(p), n), nil
}

// Word returns the 32-bit word at offset off of b, for sync/atomic. It must be 4-aligned in memory.
func Word(b []byte, off int) (*uint32, error) {
	if off < 0 || off > len(b)-4 {
		return nil, fmt.Errorf("word at %d is outside %d bytes", off, len(b))
	}
	v, err := View[uint32](b[off:], 1)
	if err != nil {
		return nil, err
	}
	return &v[0], nil
}

// Index returns the 16-bit index at offset off of b, which must be 2-aligned in memory. The 32-bit word around it is read with
// it: that word lies in the same page, so this never touches memory that is not mapped.
func Index(b []byte, off int) (IndexWord, error) {
	if off < 0 || off > len(b)-2 {
		return IndexWord{}, fmt.Errorf("index at %d is outside %d bytes", off, len(b))
	}
	p := unsafe.Pointer(&b[off])
	switch uintptr(p) % 4 {
	case 0:
		return IndexWord{word: (*uint32)(p)}, nil
	case 2:
		return IndexWord{word: (*uint32)(unsafe.Add(p, -2)), shift: 16}, nil
	}
	return IndexWord{}, fmt.Errorf("index is not aligned to 2 bytes")
}

// Addr is the address of b's first byte, for system calls that take iovecs and for alignment checks.
func Addr(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

// Bytes is the memory of v, whose type has no pointers.
func Bytes[T any](v []T) []byte {
	var t T
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(v))), len(v)*int(unsafe.Sizeof(t)))
}
