package bench

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/vhostuser"
)

// Where guest memory lies: in the guest's addresses, and in those that the front-end names rings by, which are its own affair.
const (
	memBase  = 1 << 30
	userBase = 0x5500_0000_0000
	hugePage = 2 << 20
	page     = 4096
)

// memory is the guest's: one region, one file.
type memory struct {
	fd   int
	m    *shm.Mapping
	used int // bytes that are allocated
}

// newMemory makes size bytes, all there: nothing of it faults later.
func newMemory(size int, huge bool) (*memory, error) {
	flags, unit := unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING, page
	if huge {
		flags, unit = flags|unix.MFD_HUGETLB|unix.MFD_HUGE_2MB, hugePage
	}
	size = roundUp(size, unit)
	fd, err := unix.MemfdCreate("vhostd-bench", flags)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	mem := &memory{fd: fd}
	if err := unix.Fallocate(fd, 0, 0, int64(size)); err != nil {
		mem.close()
		if huge && errors.Is(err, unix.ENOSPC) {
			return nil, fmt.Errorf("%d huge pages of 2 MiB are needed: see /proc/sys/vm/nr_hugepages (%w)", size/hugePage, err)
		}
		return nil, fmt.Errorf("guest memory of %d bytes: %w", size, err)
	}
	if mem.m, err = shm.Map(fd, 0, uint64(size)); err != nil {
		mem.close()
		return nil, err
	}
	for i := 0; i < size; i += page {
		mem.m.Bytes[i] = 0 // a page fault each, here and not later
	}
	return mem, nil
}

func (m *memory) close() {
	if m.m != nil {
		_ = m.m.Unmap()
	}
	_ = unix.Close(m.fd)
}

// region is how the front-end tells of it.
func (m *memory) region() vhostuser.MemoryRegion {
	return vhostuser.MemoryRegion{GuestAddr: memBase, Size: uint64(len(m.m.Bytes)), UserAddr: userBase}
}

// area is a part of guest memory.
type area struct {
	mem []byte
	at  guestmem.GPA // of mem[0]
}

// user is where the area begins in the front-end's addresses.
func (a area) user() uint64 { return uint64(a.at) - memBase + userBase }

// alloc returns n zeroed bytes from the next page. What newMemory was asked for is enough for all.
func (m *memory) alloc(n int) area {
	from := m.used
	m.used = roundUp(from+n, page)
	return area{m.m.Bytes[from : from+n : from+n], memBase + guestmem.GPA(from)}
}

func roundUp(n, unit int) int { return (n + unit - 1) / unit * unit }
