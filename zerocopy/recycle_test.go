package zerocopy

import (
	"errors"
	"testing"

	"github.com/vhostd/vhostd/virtio"
)

func TestBufferRecycleUbufReleasesWithoutAllocating(t *testing.T) {
	n := 0
	u := Ubuf{Arg: &n, Callback: func(u *Ubuf, _ Outcome) { *u.Arg.(*int)++ }}
	b := NewBuffer(virtio.NetHdr{})
	b.Release(Dropped)
	data := frame(100, 1)
	allocs := testing.AllocsPerRun(100, func() {
		if err := b.RecycleUbuf(u, virtio.NetHdr{}, data[:60], data[60:]); err != nil {
			t.Fatal(err)
		}
		b.Release(ZeroCopied)
	})
	if allocs != 0 {
		t.Errorf("%v allocations per frame", allocs)
	}
	if n != 101 {
		t.Errorf("the callback ran %d times, want 101", n)
	}
}

func TestBufferRecycleUbufRefusesOneThatIsOut(t *testing.T) {
	var r record
	b := NewUbufBuffer(r.ubuf(1), virtio.NetHdr{}, frame(60, 1))
	if err := b.RecycleUbuf(r.ubuf(2), virtio.NetHdr{}); !errors.Is(err, ErrUbuf) {
		t.Fatalf("RecycleUbuf: %v, want %v", err, ErrUbuf)
	}
	b.Release(Copied)
	if len(r.descs) != 1 || r.descs[0] != 1 {
		t.Fatalf("released %v", r.descs)
	}
}

func TestBufferHeldTellsOrphanFromRelease(t *testing.T) {
	var held []bool
	b := NewBuffer(virtio.NetHdr{})
	b.Release(Dropped)
	u := Ubuf{Callback: func(*Ubuf, Outcome) { held = append(held, b.Held()) }}
	for _, end := range []func(){func() { b.Release(Copied) }, func() {
		if err := b.Orphan(HeapAllocator); err != nil {
			t.Fatal(err)
		}
	}} {
		if err := b.RecycleUbuf(u, virtio.NetHdr{}, frame(60, 1)); err != nil {
			t.Fatal(err)
		}
		end()
	}
	if len(held) != 2 || held[0] || !held[1] {
		t.Fatalf("held %v after Release and Orphan", held)
	}
}
