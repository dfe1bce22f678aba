package vring

import (
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// mapRing moves the device end of r to a ring in mapped memory, which the race detector does not see, and returns its parts and
// the word that holds avail.idx.
func mapRing(t *testing.T, r *rig) (p parts, availWord *uint32) {
	t.Helper()
	fd, err := unix.MemfdCreate("ring", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	const size = 1 << 16
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	m, err := shm.Map(fd, 0, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Unmap() })
	n := r.dev.Size()
	desc, avail, used := m.Bytes, m.Bytes[1<<14:], m.Bytes[1<<15:]
	if virtio.DescTableLen(n) > 1<<14 || virtio.AvailLen(n) > 1<<14 {
		t.Fatalf("queue size %d is too large", n)
	}
	if err := r.dev.Rebind(desc, avail, used); err != nil {
		t.Fatal(err)
	}
	p, err = newParts(n, desc, avail, used)
	if err != nil {
		t.Fatal(err)
	}
	p.desc[0].Addr = uint64(r.data)
	return p, &view[uint32](avail, 1)[0]
}

// storeIndex publishes an index of the available ring, with flags 0.
func storeIndex(word *uint32, idx uint16) { atomic.StoreUint32(word, uint32(idx)<<16) }
