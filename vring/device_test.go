package vring

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
)

// TestDeviceBaseMovesToAnotherDevice: GET_VRING_BASE of one back-end is SET_VRING_BASE of the next, which must go on where the
// first one stopped, call included.
func TestDeviceBaseMovesToAnotherDevice(t *testing.T) {
	for _, f := range []virtio.Features{0, virtio.FEventIdx} {
		r := newRig(t, 16, f)
		for round := range 40 {
			a := r.add([]Buf{r.buf(0, 10)}, nil)
			b := r.add([]Buf{r.buf(0, 20)}, nil)
			r.put(r.pop(Popped).Head, 0)
			r.reap(a, 0)
			cfg := r.cfg
			cfg.Base = r.dev.Base()
			dev, err := NewDevice(cfg, *r.dev.View())
			if err != nil {
				t.Fatal(err)
			}
			r.dev = dev
			if c := r.pop(Popped); c.Head != b || c.ReadLen != 20 {
				t.Fatalf("round %d: head %d, %d bytes", round, c.Head, c.ReadLen)
			}
			r.put(b, 0)
			if !r.dev.NeedsCall() {
				t.Fatal("the new device does not call")
			}
			r.reap(b, 0)
			r.pop(Empty)
		}
	}
}

// TestDeviceStartsAtUsedIndex: whatever the front-end says, and never in two places. A base of its own made Unpop count chains that did not
// exist, and panic, once it had been led past the used index; a driver that wrote there while the ring was opened could bring that about.
func TestDeviceStartsAtUsedIndex(t *testing.T) {
	for _, base := range []uint16{100, 0xfff0 - 12, 0xfff0} {
		r := newRig(t, 16, 0)
		cfg := r.cfg
		cfg.Base = base
		dev, err := NewDevice(cfg, *r.dev.View())
		if err != nil {
			t.Fatal(err)
		}
		if dev.Base() != 0xfff0 || dev.UsedIndex() != 0xfff0 {
			t.Errorf("base %#x: the ring starts at %#x and %#x, the used index is 0xfff0", base, dev.Base(), dev.UsedIndex())
		}
		for range 12 {
			r.add([]Buf{r.buf(0, 10)}, nil)
			if s := dev.Pop(&r.chain); s != Popped {
				t.Fatalf("Pop is %v: %v", s, dev.Err())
			}
		}
		if dev.Unpop(12); dev.Base() != 0xfff0 {
			t.Errorf("base is %#x after Unpop, want 0xfff0", dev.Base())
		}
	}
}

func TestDeviceUsedIndexBeyondAvailable(t *testing.T) {
	r := newRig(t, 16, 0)
	view[uint16](r.cfg.Used, 2)[1] = 100
	dev, err := NewDevice(r.cfg, *r.dev.View())
	if err != nil {
		t.Fatal(err)
	}
	if s := dev.Pop(&r.chain); s != Broken {
		t.Errorf("Pop with a used index beyond the available one is %v, want broken", s)
	}
}

func TestDeviceUnpop(t *testing.T) {
	r := newRig(t, 16, 0)
	var ids []uint16
	for range 5 {
		ids = append(ids, r.add([]Buf{r.buf(0, 10)}, nil))
	}
	for range 3 {
		for range 5 {
			r.pop(Popped)
		}
		r.pop(Empty)
		r.dev.Unpop(4)
		if n := r.dev.Available(); n != 4 || r.dev.Base() != 0xfff1 {
			t.Errorf("%d available, base %#x after Unpop", n, r.dev.Base())
		}
		for _, id := range ids[1:] {
			if c := r.pop(Popped); c.Head != id {
				t.Errorf("popped head %d again, want %d", c.Head, id)
			}
		}
		r.dev.Unpop(5)
	}
	r.pop(Popped)
	for _, n := range []int{-1, 2} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("Unpop(%d) with one chain out does not panic", n)
				}
			}()
			r.dev.Unpop(n)
		}()
	}
}

// TestDeviceWaitsForMoreThanItGot: a device that holds too few chains gives them back and sleeps; it is to be woken by the next
// one, not by those it knows of.
func TestDeviceWaitsForMoreThanItGot(t *testing.T) {
	for _, f := range []virtio.Features{0, virtio.FEventIdx} {
		r := newRig(t, 16, f)
		r.add(nil, []Buf{r.buf(0, 10)})
		r.add(nil, []Buf{r.buf(0, 10)})
		r.drv.NeedsKick()
		r.pop(Popped)
		r.pop(Popped)
		r.pop(Empty)
		r.dev.Unpop(2)
		before := r.dev.Available()
		if !r.dev.EnableKick() || r.dev.Available() != before {
			t.Errorf("%v: %d available before EnableKick, %d after", f, before, r.dev.Available())
		}
		r.add(nil, []Buf{r.buf(0, 10)})
		if !r.drv.NeedsKick() {
			t.Errorf("%v: no kick for the third chain", f)
		}
		r.add(nil, []Buf{r.buf(0, 10)})
		if r.dev.EnableKick(); r.dev.Available() != 4 {
			t.Errorf("%v: %d available, want 4", f, r.dev.Available())
		}
	}
}

func TestDeviceRebindAndSetView(t *testing.T) {
	r := newRig(t, 16, 0)
	a := r.add([]Buf{r.buf(0, 10)}, nil)
	r.pop(Popped)
	b := r.add([]Buf{r.buf(0, 20)}, nil)

	// The same guest memory, mapped anew.
	fresh := heapRegion(t, lowBase, len(r.table.Regions()[0].Bytes()))
	copy(fresh.Bytes(), r.table.Regions()[0].Bytes())
	table, err := guestmem.NewTable(fresh)
	if err != nil {
		t.Fatal(err)
	}
	defer table.Unpin()
	size := r.dev.Size()
	part := func(old []byte, n int) []byte {
		off := len(r.table.Regions()[0].Bytes()) - len(old)
		return fresh.Bytes()[off : off+n]
	}
	desc, avail := part(r.cfg.Desc, virtio.DescTableLen(size)), part(r.cfg.Avail, virtio.AvailLen(size))
	used := part(r.cfg.Used, virtio.UsedLen(size))
	if err := r.dev.Rebind(desc, avail, used); err != nil {
		t.Fatal(err)
	}
	r.dev.SetView(guestmem.NewView(table, nil))
	if r.dev.View().Table() != table {
		t.Error("View is not of the new table")
	}
	c := r.pop(Popped)
	if c.Head != b || &c.Segs[0].Mem[0] != &table.Slice(r.buf(0, 20).GPA, 20)[0] {
		t.Error("the chain lies in the old memory")
	}
	r.dev.Put(a, 0)
	r.dev.Put(b, 0)
	r.dev.Publish()
	if got, want := view[virtio.UsedElem](used[4+8:], 1)[0], (virtio.UsedElem{ID: uint32(b)}); got != want {
		t.Errorf("used entry in the new mapping is %+v, want %+v", got, want)
	}
	if r.drv.RawUsedIndex() != 0xfff0 {
		t.Error("the old mapping was written")
	}
}

func TestDeviceDirtyLog(t *testing.T) {
	for _, f := range []virtio.Features{0, virtio.FEventIdx} {
		r := newRigAt(t, 4, f, 0xfffe)
		r.T = t
		log := &recorder{}
		cfg := r.cfg
		cfg.LogUsed, cfg.UsedLogAddr = true, 0x5000
		dev, err := NewDevice(cfg, guestmem.NewView(r.table, log))
		if err != nil {
			t.Fatal(err)
		}
		r.dev = dev
		for range 3 {
			r.add([]Buf{r.buf(0, 1)}, nil)
			r.dev.Put(r.pop(Popped).Head, 0)
		}
		r.dev.Publish() // entries 2, 3 and 0 of the ring, then the index
		r.dev.Publish() // nothing
		want := []Buf{{0x5000 + 4 + 2*8, 16}, {0x5000 + 4, 8}, {0x5000 + 2, 2}}
		if diff := cmp.Diff(want, log.writes); diff != "" {
			t.Errorf("%v: Publish logged:\n%s", f, diff)
		}
		log.writes = nil
		r.dev.DisableKick()
		r.dev.EnableKick()
		want = []Buf{{0x5000, 2}, {0x5000, 2}}
		if f.Has(virtio.FEventIdx) {
			want = []Buf{{0x5000 + 4 + 4*8, 2}}
		}
		if diff := cmp.Diff(want, log.writes); diff != "" {
			t.Errorf("%v: DisableKick and EnableKick logged:\n%s", f, diff)
		}
	}
	r := newRig(t, 4, 0) // the front-end did not ask for the used ring
	log := &recorder{}
	r.dev.SetView(guestmem.NewView(r.table, log))
	r.add([]Buf{r.buf(0, 1)}, nil)
	r.put(r.pop(Popped).Head, 0)
	r.dev.EnableKick()
	if len(log.writes) != 0 {
		t.Errorf("logged without LogUsed: %v", log.writes)
	}
}

// TestDeviceAllocatesNothing: for any shape of chain, once the Chain has grown to it.
func TestDeviceAllocatesNothing(t *testing.T) {
	for _, f := range []virtio.Features{0, virtio.FEventIdx, virtio.FIndirectDesc} {
		for _, buffers := range []int{1, 4} {
			t.Run(fmt.Sprintf("%v/chain=%d", f, buffers), func(t *testing.T) {
				r := newRig(t, 256, f)
				bufs := make([]Buf, buffers)
				for i := range bufs {
					bufs[i] = r.buf(2000*i, 1500)
				}
				bufs[0] = Buf{r.high - 10, 20} // two regions
				n := testing.AllocsPerRun(1000, func() {
					for range 8 {
						r.drv.Add(bufs, nil)
					}
					r.drv.Publish()
					for r.dev.Pop(&r.chain) == Popped {
						r.dev.Put(r.chain.Head, 0)
					}
					r.dev.Publish()
					r.dev.NeedsCall()
					r.dev.EnableKick()
					for _, _, ok := r.drv.Reap(); ok; _, _, ok = r.drv.Reap() {
					}
				})
				if n != 0 || r.drv.Err() != nil || r.drv.Free() != 256 {
					t.Errorf("%v allocations, %d descriptors free, %v", n, r.drv.Free(), r.drv.Err())
				}
			})
		}
	}
}
