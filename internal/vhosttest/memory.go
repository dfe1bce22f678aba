package vhosttest

import (
	"fmt"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/vhostuser"
)

const page = 4096

// RegionSpec is a region of RAM to be.
type RegionSpec struct {
	GPA    guestmem.GPA
	Size   uint64 // bytes
	Offset uint64 // in its memory file; any number of bytes
	Heap   bool   // it lies in Go's heap, which the race detector can watch, and the file is only its name: see HeapOf
}

// Region is a region of RAM: a memory file of its own, mapped.
type Region struct {
	vhostuser.MemoryRegion        // as the front-end tells it
	FD                     int    // of the memory file
	Mem                    []byte // Size bytes
	whole                  []byte // of a region that is mapped
	used                   uint64 // bytes that are allocated
}

// Memory is the guest's RAM.
type Memory struct {
	Regions []*Region
	turn    int
}

// regionCount numbers the regions of all guests, so that each has user addresses of its own.
var regionCount atomic.Uint64

func newMemory(t testing.TB, specs []RegionSpec) *Memory {
	t.Helper()
	m := &Memory{}
	t.Cleanup(m.close)
	for _, s := range specs {
		m.Regions = append(m.Regions, NewRegion(t, s))
	}
	return m
}

// NewRegion makes a region that is no part of any Memory yet; see Memory.Add. The test closes it, unless a Memory does.
func NewRegion(t testing.TB, s RegionSpec) *Region {
	t.Helper()
	fd, err := unix.MemfdCreate(memfdName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatalf("memfd_create: %v", err)
	}
	n := s.Offset + s.Size
	if err := unix.Ftruncate(fd, int64(n)); err != nil {
		t.Fatalf("size of the memory file: %v", err)
	}
	if s.Heap {
		return &Region{MemoryRegion: newRange(s), FD: fd, Mem: heapFor(t, fd, int(n))[s.Offset:]}
	}
	b, err := unix.Mmap(fd, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatalf("mmap of the memory file: %v", err)
	}
	return &Region{MemoryRegion: newRange(s), FD: fd, Mem: b[s.Offset:n:n], whole: b}
}

func newRange(s RegionSpec) vhostuser.MemoryRegion {
	return vhostuser.MemoryRegion{
		GuestAddr: uint64(s.GPA), Size: s.Size, UserAddr: 0x5500_0000_0000 + regionCount.Add(1)<<34, MmapOffset: s.Offset,
	}
}

// heaps is the memory of regions in the heap, by the inode of their file.
var heaps sync.Map

func heapFor(t testing.TB, fd, n int) []byte {
	t.Helper()
	b := shm.Heap(n).Bytes
	ino := inode(fd)
	heaps.Store(ino, b)
	t.Cleanup(func() { heaps.Delete(ino) })
	return b
}

// HeapOf is the memory that a descriptor of a region's file stands for, or nil where that is the file's own.
func HeapOf(fd int) []byte {
	b, _ := heaps.Load(inode(fd))
	mem, _ := b.([]byte)
	return mem
}

// inode is 0 for what is no file.
func inode(fd int) uint64 {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return 0
	}
	return st.Ino
}

// Close unmaps the region and closes its file, for one that no Memory holds. A second call does nothing.
func (r *Region) Close() {
	if r.Mem == nil {
		return
	}
	if r.whole != nil {
		_ = unix.Munmap(r.whole)
	}
	_ = unix.Close(r.FD)
	r.Mem, r.whole = nil, nil
}

// Truncate cuts the region's memory file down to n bytes of the region. Pages behind that fault, for the guest as well.
func (r *Region) Truncate(n uint64) error {
	return unix.Ftruncate(r.FD, int64(r.MmapOffset+n))
}

// Gone reports whether who touches the first byte of the region gets SIGBUS.
func (r *Region) Gone() (gone bool) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() { gone = recover() != nil }()
	var b [1]byte
	copy(b[:], r.Mem)
	return false
}

func (m *Memory) close() {
	for _, r := range m.Regions {
		r.Close()
	}
}

// Add makes r part of the guest's memory, on the guest's side: the front-end's ADD_MEM_REG is the caller's.
func (m *Memory) Add(r *Region) { m.Regions = append(m.Regions, r) }

// Remove is the opposite of Add. The region stays open.
func (m *Memory) Remove(r *Region) {
	for i, o := range m.Regions {
		if o == r {
			m.Regions = append(m.Regions[:i:i], m.Regions[i+1:]...)
			return
		}
	}
}

// find returns the region that n bytes at a lie in.
func (m *Memory) find(a guestmem.GPA, n int) *Region {
	for _, r := range m.Regions {
		if off := uint64(a) - r.GuestAddr; off < r.Size && uint64(n) <= r.Size-off {
			return r
		}
	}
	return nil
}

// Of is the region with the front-end's address user.
func (m *Memory) Of(user uint64) *Region {
	for _, r := range m.Regions {
		if user-r.UserAddr < r.Size {
			return r
		}
	}
	panic(fmt.Sprintf("user address %#x is in no region", user))
}

// At is the n bytes of guest memory at a. It panics when they are not within one region.
func (m *Memory) At(a guestmem.GPA, n int) []byte {
	r := m.find(a, n)
	if r == nil {
		panic(fmt.Sprintf("%d bytes at guest address %#x are not within one region", n, uint64(a)))
	}
	off := uint64(a) - r.GuestAddr
	return r.Mem[off : off+uint64(n) : off+uint64(n)]
}

// User is the front-end's address of the guest's address a.
func (m *Memory) User(a guestmem.GPA) uint64 {
	r := m.find(a, 1)
	if r == nil {
		panic(fmt.Sprintf("guest address %#x is in no region", uint64(a)))
	}
	return r.UserAddr + uint64(a) - r.GuestAddr
}

// Alloc takes n bytes, aligned, from one region after the other: neighbours in use are seldom neighbours in memory. It panics when
// there is no room.
func (m *Memory) Alloc(n, align int) guestmem.GPA {
	for range m.Regions {
		r := m.Regions[m.turn%len(m.Regions)]
		m.turn++
		if a, ok := r.Alloc(n, align); ok {
			return a
		}
	}
	panic(fmt.Sprintf("no room for %d bytes in guest memory", n))
}

// Alloc takes n bytes, aligned, from the region.
func (r *Region) Alloc(n, align int) (guestmem.GPA, bool) {
	at := (r.used + uint64(align) - 1) &^ (uint64(align) - 1)
	if at+uint64(n) > r.Size {
		return 0, false
	}
	r.used = at + uint64(n)
	return guestmem.GPA(r.GuestAddr + at), true
}

// table is what SET_MEM_TABLE sends.
func (m *Memory) table() (regions []vhostuser.MemoryRegion, fds []int) {
	for _, r := range m.Regions {
		regions = append(regions, r.MemoryRegion)
		fds = append(fds, r.FD)
	}
	return regions, fds
}

// Mappings is how often the process maps r, its own mapping left out.
func (r *Region) Mappings(t testing.TB) int {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(r.FD, &st); err != nil {
		t.Fatalf("fstat of the memory file: %v", err)
	}
	return countMappings(t, st.Ino) - 1
}

// own is the test process's view of itself.
func own(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("/proc/self/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
