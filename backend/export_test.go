package backend

import (
	"testing"
	"time"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/vhosttest"
)

// TakeHeap has sessions take the heap that stands for a guest's memory file (vhosttest.RegionSpec.Heap), until the end of the test. No session may be open.
func TakeHeap(t testing.TB) {
	newRegion = func(fd int, off uint64, guest guestmem.GPA, user guestmem.UVA, size uint64) (*guestmem.Region, error) {
		if b := vhosttest.HeapOf(fd); b != nil {
			return guestmem.NewHeapRegionOf(guest, user, b[off:off+size])
		}
		return guestmem.NewRegion(fd, off, guest, user, size)
	}
	t.Cleanup(func() { newRegion = guestmem.NewRegion })
}

// EnableGrace sets how long a ring that has just started waits to be enabled, until the end of the test. No session may be open.
func EnableGrace(t testing.TB, d time.Duration) {
	was := enableGrace
	enableGrace = d
	t.Cleanup(func() { enableGrace = was })
}

// Repeats is for how many regions the session has counted further ADD_MEM_REGs.
func (b *Backend) Repeats() int {
	b.mu.Lock()
	s := b.current
	b.mu.Unlock()
	s.queues[0].lock() // as is held while memory changes
	defer s.queues[0].unlock()
	return len(s.repeats)
}
