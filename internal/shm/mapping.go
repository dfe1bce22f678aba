package shm

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Mapping is a shared mapping of part of a file.
type Mapping struct {
	Bytes  []byte // the part asked for
	whole  []byte // from the page before it; nil when backed by the heap
	source source
	huge   *hugeFile // nil for pages of the usual size
	owner  Owner     // nil: nobody; guarded by shared
}

// source is the place in a file that a Mapping shows.
type source struct{ dev, ino, off uint64 }

// Same reports whether both show the same memory: the same place of the same file, or the same piece of heap.
func (m *Mapping) Same(o *Mapping) bool {
	if m.whole == nil || o.whole == nil {
		return m == o
	}
	return m.source == o.source && len(m.Bytes) == len(o.Bytes)
}

// ErrMemoryFile refuses a file that somebody in user space, or a disk, may have to be asked for.
var ErrMemoryFile = errors.New("neither a memfd nor a file on tmpfs or hugetlbfs")

// checkMemoryFile refuses files whose pages are not the kernel's own to give. A page fault is no system call: Go cannot stop a thread that waits in one, so a
// file whose owner answers when he likes (FUSE), a network's or a slow disk's would stop the whole process at its next garbage collection. Only files
// of shared memory and huge pages have seals, whether any is set or not, and asking for them asks nobody but the kernel, unlike statfs or fstat.
func checkMemoryFile(fd int) error {
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0); err != nil {
		return fmt.Errorf("memory file: %w (%w): a page of it may never come", ErrMemoryFile, err)
	}
	return nil
}

// Map maps size bytes of fd from offset off, for reading and writing. The offset may be any byte; the file must hold the range, since
// touching a page behind its end raises SIGBUS. Other files than memfds and those on tmpfs or hugetlbfs are refused with ErrMemoryFile. The fd can be closed
// afterwards. The memory is left out of core dumps.
func Map(fd int, off, size uint64) (*Mapping, error) {
	if err := checkMemoryFile(fd); err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("fstat of the memory file: %w", err)
	}
	if size == 0 || off+size < off || off+size > uint64(st.Size) {
		return nil, fmt.Errorf("range %#x+%#x is outside a memory file of %#x bytes", off, size, st.Size)
	}
	// A hugetlb file maps only at multiples of its page size, which is its block size.
	page := uint64(max(int64(os.Getpagesize()), int64(st.Blksize)))
	if page&(page-1) != 0 || page > 1<<30 {
		page = uint64(os.Getpagesize())
	}
	start := off &^ (page - 1)
	length := (off + size - start + page - 1) &^ (page - 1) // munmap of hugetlb wants whole pages
	whole, err := unix.Mmap(fd, int64(start), int(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("mmap of %#x bytes at %#x of the memory file: %w", size, off, err)
	}
	// Best effort: a kernel without the advice still maps correctly.
	_ = unix.Madvise(whole, unix.MADV_DONTDUMP)
	huge, err := keepHuge(fd, whole, start, uintptr(page))
	if err != nil {
		return nil, errors.Join(err, unix.Munmap(whole))
	}
	b := whole[off-start:]
	m := &Mapping{Bytes: b[:size:size], whole: whole, source: source{st.Dev, st.Ino, off}, huge: huge}
	m.keep()
	return m, nil
}

// Heap returns a Mapping backed by Go's heap, which the race detector can watch.
func Heap(size int) *Mapping {
	v := make([]uint64, (size+7)/8)
	return HeapOf(Bytes(v)[:size:size])
}

// HeapOf is a Mapping of memory from Heap, which may have several.
func HeapOf(b []byte) *Mapping { return &Mapping{Bytes: b} }

// Unmap gives the memory back; every slice of it is invalid from then on. A second call does nothing.
func (m *Mapping) Unmap() error {
	m.forget()
	whole, huge := m.whole, m.huge
	m.Bytes, m.whole, m.huge = nil, nil, nil
	if whole == nil {
		return nil
	}
	return errors.Join(huge.forget(), unix.Munmap(whole))
}
