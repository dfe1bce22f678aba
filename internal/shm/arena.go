package shm

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Arena is one range of addresses without holes, for interfaces that know no other kind of memory (a UMEM, a registered buffer):
//
//	[private][gap][region 0, mapped a second time][gap][region 1, ...] ...
//
// Private memory and gaps are anonymous and zero. A gap is less than the page size of the region behind it, and there is none before pages
// of the usual size. The arena's regions are the same memory as the originals, which may be unmapped before it.
type Arena struct {
	whole   []byte // what is reserved
	bytes   []byte // of it, what is used
	private int
	parts   []part
	ceded   bool // a failed system call may have left a hole in whole, and somebody else may have mapped it
}

// part is a region in an Arena. Addresses are those of the region, not the arena's.
type part struct {
	start, end uintptr // of the region
	low, high  uintptr // of the whole pages that it lies in
	page       uintptr // their size in bytes
	off        uint64  // of low in the arena
}

// NewArena returns an arena of private bytes of memory of its own, at least, and the regions. Each region must lie in one shared mapping:
// there is no way to map other memory (the heap's) a second time, which is an error that wraps EINVAL.
func NewArena(private int, regions ...[]byte) (*Arena, error) {
	a := &Arena{private: private}
	used, align, err := a.lay(regions)
	if err != nil {
		return nil, err
	}
	// Reserved without access, which costs no memory and counts for none where the host is strict about what it hands out.
	if a.whole, err = unix.Mmap(-1, 0, int(used+align), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE); err != nil {
		return nil, fmt.Errorf("reserving %#x bytes of address space: %w", used+align, err)
	}
	_ = unix.Madvise(a.whole, unix.MADV_DONTDUMP) // best effort
	skip := -(Addr(a.whole) + a.head()) & (align - 1)
	a.bytes = a.whole[skip : skip+used : skip+used]
	if err := a.fill(); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	a.keep()
	return a, nil
}

// head is the size in bytes of what is before the first region: it lies on the largest page's boundary.
func (a *Arena) head() uintptr { return alignUp(uintptr(a.private), uintptr(os.Getpagesize())) }

func alignUp(n, align uintptr) uintptr { return (n + align - 1) &^ (align - 1) }

// lay finds the parts' places, and returns the bytes that are needed from the beginning and what address the first part's has to be a multiple of.
func (a *Arena) lay(regions [][]byte) (used, align uintptr, err error) {
	usual := uintptr(os.Getpagesize())
	align = usual
	pos := uintptr(0) // from the end of the head
	for i, b := range regions {
		if len(b) == 0 {
			return 0, 0, fmt.Errorf("region %d of %d is empty", i, len(regions))
		}
		p := part{start: Addr(b), end: Addr(b) + uintptr(len(b)), page: usual}
		if h := hugeAt(p.start); h != nil {
			p.page = h.page
		}
		p.low, p.high = p.start&^(p.page-1), alignUp(p.end, p.page)
		pos = alignUp(pos, p.page)
		p.off = uint64(a.head() + pos)
		pos += p.high - p.low
		align = max(align, p.page)
		a.parts = append(a.parts, p)
	}
	if a.head()+pos == 0 {
		return 0, 0, errors.New("an arena of no bytes")
	}
	return a.head() + pos, align, nil
}

// fill maps the parts and gives the rest memory of its own.
func (a *Arena) fill() error {
	done := uint64(0)
	for i, p := range a.parts {
		if err := a.own(done, p.off); err != nil {
			return err
		}
		if err := a.duplicate(p); err != nil {
			return fmt.Errorf("mapping region %d of %d a second time, %#x bytes: %w (is it shared memory?)", i, len(a.parts), p.end-p.start, err)
		}
		done = p.off + uint64(p.high-p.low)
	}
	return a.own(done, uint64(len(a.bytes)))
}

// own makes a range of the arena memory of its own.
func (a *Arena) own(from, to uint64) error {
	if from == to {
		return nil
	}
	if err := unix.Mprotect(a.bytes[from:to], unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return fmt.Errorf("%#x bytes of private memory: %w", to-from, err)
	}
	return nil
}

// duplicate maps a part a second time, in its place. What can fail is done elsewhere first, so that the reservation stays whole.
func (a *Arena) duplicate(p part) error {
	to, n := Addr(a.bytes)+uintptr(p.off), p.high-p.low
	if h := hugeAt(p.start); h != nil {
		const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_NORESERVE | unix.MAP_FIXED
		_, _, errno := unix.Syscall6(unix.SYS_MMAP, to, n, prot, flags, uintptr(h.fd), uintptr(h.off)+p.low-h.start)
		if errno != 0 {
			a.ceded = true
			return errno
		}
		_ = unix.Madvise(a.bytes[p.off:p.off+uint64(n)], unix.MADV_DONTDUMP)
		return nil
	}
	// Old size 0: another mapping of the same memory (mremap(2)).
	again, _, errno := unix.Syscall6(unix.SYS_MREMAP, p.low, 0, n, unix.MREMAP_MAYMOVE, 0, 0)
	if errno != 0 {
		return errno
	}
	if _, _, errno = unix.Syscall6(unix.SYS_MREMAP, again, n, n, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, to, 0); errno != 0 {
		a.ceded = true
		_, _, _ = unix.Syscall(unix.SYS_MUNMAP, again, n, 0)
		return errno
	}
	return nil
}

// Bytes is the whole arena.
func (a *Arena) Bytes() []byte { return a.bytes }

// Private is the arena's beginning, of its own memory.
func (a *Arena) Private() []byte { return a.bytes[:a.private:a.private] }

// Offset says where in Bytes the memory of b lies, if b is wholly in one of the regions as they were given to NewArena.
func (a *Arena) Offset(b []byte) (off uint64, ok bool) {
	start := Addr(b)
	for i := range a.parts {
		if p := &a.parts[i]; p.start <= start && start+uintptr(len(b)) <= p.end && len(b) > 0 {
			return p.off + uint64(start-p.low), true
		}
	}
	return 0, false
}

// Close unmaps the arena; every slice of Bytes is invalid from then on. A second call does nothing.
func (a *Arena) Close() error {
	a.forget()
	whole := a.whole
	a.whole, a.bytes, a.parts, a.private = nil, nil, nil, 0
	switch {
	case whole == nil:
		return nil
	case a.ceded:
		return fmt.Errorf("%#x bytes of address space stay reserved: part of them may be somebody else's by now", len(whole))
	}
	return unix.Munmap(whole)
}
