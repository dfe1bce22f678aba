package vring

import (
	"math"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// mapMemory maps 64 KiB of memory, which the race detector does not see.
func mapMemory(t *testing.T) []byte {
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
	return m.Bytes
}

// mapRing moves the device end of r to a ring in mapped memory, and returns its parts and the word that holds avail.idx.
func mapRing(t *testing.T, r *rig) (p parts, availWord *uint32) {
	t.Helper()
	m := mapMemory(t)
	n := r.dev.Size()
	desc, avail, used := m, m[1<<14:], m[1<<15:]
	if virtio.DescTableLen(n) > 1<<14 || virtio.AvailLen(n) > 1<<14 {
		t.Fatalf("queue size %d is too large", n)
	}
	if err := r.dev.Rebind(desc, avail, used); err != nil {
		t.Fatal(err)
	}
	p, err := newParts(n, desc, avail, used)
	if err != nil {
		t.Fatal(err)
	}
	p.desc[0].Addr = uint64(r.data)
	return p, &view[uint32](avail, 1)[0]
}

// storeIndex publishes an index of the available ring, with flags 0.
func storeIndex(word *uint32, idx uint16) { atomic.StoreUint32(word, uint32(idx)<<16) }

// TestG08SingleFetch: a descriptor that changes all the time is still one descriptor to whoever pops it. The memory is not Go's, so
// that the race detector lets the guest have its way.
func TestG08SingleFetch(t *testing.T) {
	r := newRig(t, 16, 0)
	mapped, word := mapRing(t, r)
	stop, done := make(chan struct{}), make(chan struct{})
	defer func() { close(stop); <-done }()
	go func() {
		defer close(done)
		word := &view[uint64](shm.Bytes(mapped.desc), 2)[1] // of descriptor 0: len, flags, next
		set := func(n uint32, flags uint16) { atomic.StoreUint64(word, uint64(flags)<<32|uint64(n)) }
		for {
			select {
			case <-stop:
				return
			default:
			}
			for range 100 {
				set(100, write)
				set(50_000, 0)
				set(100, write)
				set(100, next)
				set(math.MaxUint32, indirect)
			}
		}
	}()
	statuses := map[Status]int{}
	c := Chain{Segs: make([]Seg, 0, 4)}
	for range 200_000 {
		mapped.heads[r.dev.Base()&15] = 0
		storeIndex(word, r.dev.Base()+1)
		s := r.dev.Pop(&c)
		statuses[s]++
		switch s {
		case Popped:
			consistent(t, &c)
		case Broken: // descriptor 0 was seen with next = 0 for 16 reads in a row
			r.dev.err = nil
			continue
		case Empty:
			t.Fatal("empty")
		}
		r.put(0, 0)
	}
	t.Logf("%v", statuses)
}

// consistent checks that the sums of a chain are those of its segments, each of a length that was once in the descriptor.
func consistent(t *testing.T, c *Chain) {
	t.Helper()
	var read, written int
	for i, s := range c.Segs {
		n := len(s.Mem)
		if n != 100 && n != 50_000 {
			t.Fatalf("segment of %d bytes, which never was", n)
		}
		if i < c.Readable {
			read += n
		} else {
			written += n
		}
	}
	if read != int(c.ReadLen) || written != int(c.WriteLen) {
		t.Fatalf("a chain that never was: %+v", shapeOf(c))
	}
}
