package vring

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vhostd/vhostd/virtio"
)

// TestDeviceConformance has a subtest for each clause of virtio-v1.2 §2.7 that binds a device.
func TestDeviceConformance(t *testing.T) {
	for _, c := range []struct {
		clause string
		test   func(*testing.T)
	}{
		{"2.7/queue size is a power of two up to 32768", conformSizes},
		{"2.7/parts have their alignment and size", conformParts},
		{"2.7.4.1/no assumption about the arrangement of descriptors", conformFraming},
		{"2.7.5.1/device writes neither readable buffers nor descriptors", conformNoWrites},
		{"2.7.5.3.2/write flag of an indirect descriptor is ignored", conformIndirectWrite},
		{"2.7.5.3.2/direct descriptors, then an indirect one", conformDirectThenIndirect},
		{"2.7.6/indices wrap at 65536 and entries at the queue size", conformWrap},
		{"2.7.7.2/flags 0: must notify, used_event ignored", conformCallFlags},
		{"2.7.7.2/EVENT_IDX: notify when the index passes used_event, flags ignored", conformCallEvent},
		{"2.7.8.2/len is set before idx", conformUsedOrder},
		{"2.7.9/IN_ORDER: chains are used in the order made available", conformInOrder},
		{"2.7.10.2/flags is 0 or 1", conformKickFlags},
		{"2.7.10.2/EVENT_IDX: flags stays 0, avail_event advises", conformKickEvent},
		{"2.7.10.2/spurious notifications are handled", conformSpurious},
		{"6.3/NOTIFY_ON_EMPTY: notify when out of chains, in spite of suppression", conformNotifyOnEmpty},
	} {
		t.Run(c.clause, c.test)
	}
}

func conformSizes(t *testing.T) {
	for size := 1; size <= virtio.MaxQueueSize; size *= 2 {
		r := newRig(t, size, 0)
		for range 3 {
			id := r.add([]Buf{r.buf(0, 64)}, nil)
			r.put(r.pop(Popped).Head, 0)
			r.reap(id, 0)
		}
	}
	r := newRig(t, 256, 0)
	for _, size := range []int{-1, 0, 3, 255, 32769, 65536} {
		cfg := r.cfg
		cfg.Size = size
		if _, err := NewDevice(cfg, *r.dev.View()); err == nil || !strings.Contains(err.Error(), "power of two") {
			t.Errorf("queue size %d: %v", size, err)
		}
	}
}

func conformParts(t *testing.T) {
	r := newRig(t, 256, 0)
	for name, change := range map[string]func(*Config){
		"descriptor table is not aligned to 16": func(c *Config) { c.Desc = c.Desc[8:] },
		"available ring is not aligned to 2":    func(c *Config) { c.Avail = c.Avail[1:] },
		"used ring is not aligned to 4":         func(c *Config) { c.Used = c.Used[2:] },
		"descriptor table of 4095 bytes":        func(c *Config) { c.Desc = c.Desc[:16*256-1] },
		"available ring of 517 bytes":           func(c *Config) { c.Avail = c.Avail[:6+2*256-1] },
		"used ring of 2053 bytes":               func(c *Config) { c.Used = c.Used[:6+8*256-1] },
	} {
		cfg := r.cfg
		change(&cfg)
		if _, err := NewDevice(cfg, *r.dev.View()); err == nil || !strings.HasPrefix(err.Error(), name) {
			t.Errorf("%q, want %q", err, name)
		}
		if err := r.dev.Rebind(cfg.Desc, cfg.Avail, cfg.Used); err == nil {
			t.Errorf("Rebind: no error, want %q", name)
		}
	}
	// The available ring may be aligned to 2 bytes only.
	cfg := r.cfg
	copy(cfg.Avail[2:], make([]byte, virtio.AvailLen(256)))
	cfg.Avail = cfg.Avail[2:]
	cfg.Avail[offIdx], cfg.Avail[offIdx+1] = 0xf1, 0xff
	r.drv.RawDesc()[0] = r.desc(0, 10, 0, 0)
	dev, err := NewDevice(cfg, *r.dev.View())
	if err != nil {
		t.Fatal(err)
	}
	if s := dev.Pop(&r.chain); s != Popped || r.chain.ReadLen != 10 {
		t.Errorf("from a ring aligned to 2: %v, %d bytes", s, r.chain.ReadLen)
	}
}

func conformFraming(t *testing.T) {
	for _, f := range []virtio.Features{0, virtio.FIndirectDesc} {
		r := newRig(t, 64, f)
		for readable := range 20 {
			for writable := range 20 {
				if readable+writable == 0 {
					continue
				}
				var want shape
				var bufs []Buf
				for i := range readable + writable {
					bufs = append(bufs, r.buf(1000*i, uint32(1+i*7)))
				}
				in, out := bufs[:readable], bufs[readable:]
				want = shape{Head: r.add(in, out), Segs: bufs, Readable: readable}
				for _, b := range in {
					want.ReadLen += b.Len
				}
				for _, b := range out {
					want.WriteLen += b.Len
				}
				if diff := cmp.Diff(want, shapeOf(r.pop(Popped))); diff != "" {
					t.Fatalf("%v, %d readable, %d writable:\n%s", f, readable, writable, diff)
				}
				r.put(want.Head, want.WriteLen)
				r.reap(want.Head, want.WriteLen)
			}
		}
		if r.drv.Free() != 64 {
			t.Errorf("%d descriptors free, want 64", r.drv.Free())
		}
	}
}

func conformNoWrites(t *testing.T) {
	r := newRig(t, 16, virtio.FIndirectDesc)
	before := r.mem(r.buf(0, 300))
	for i := range before {
		before[i] = byte(i)
	}
	a := r.add([]Buf{r.buf(0, 100), r.buf(100, 100)}, []Buf{r.buf(200, 100)})
	b := r.add([]Buf{r.buf(0, 100)}, nil)
	descs := append([]virtio.Desc(nil), r.drv.RawDesc()...)
	table := append([]virtio.Desc(nil), r.drv.RawTable(a)...)
	r.pop(Popped)
	r.pop(Popped)
	r.dev.Put(b, 0)
	r.put(a, 0)
	r.dev.EnableKick()
	if diff := cmp.Diff(descs, r.drv.RawDesc()); diff != "" {
		t.Errorf("descriptors changed:\n%s", diff)
	}
	if diff := cmp.Diff(table, r.drv.RawTable(a)); diff != "" {
		t.Errorf("indirect table changed:\n%s", diff)
	}
	for i, v := range before {
		if v != byte(i) {
			t.Fatalf("byte %d of a buffer changed", i)
		}
	}
}

func conformIndirectWrite(t *testing.T) {
	r := newRig(t, 16, virtio.FIndirectDesc)
	id := r.add([]Buf{r.buf(0, 10)}, []Buf{r.buf(10, 20)})
	r.drv.RawDesc()[id].Flags |= virtio.DescWrite
	want := shape{Head: id, Segs: []Buf{r.buf(0, 10), r.buf(10, 20)}, Readable: 1, ReadLen: 10, WriteLen: 20}
	if diff := cmp.Diff(want, shapeOf(r.pop(Popped))); diff != "" {
		t.Error(diff)
	}
}

func conformDirectThenIndirect(t *testing.T) {
	r := newRig(t, 16, virtio.FIndirectDesc)
	id := r.add([]Buf{r.buf(100, 10)}, []Buf{r.buf(200, 20)}) // an indirect chain, which moves to descriptor 5
	indirect := r.drv.RawDesc()[id]
	r.drv.RawDesc()[5] = indirect
	r.drv.RawDesc()[3] = r.desc(0, 4, virtio.DescNext, 5)
	r.drv.RawAvail()[0] = 3
	want := shape{Head: 3, Segs: []Buf{r.buf(0, 4), r.buf(100, 10), r.buf(200, 20)}, Readable: 2, ReadLen: 14, WriteLen: 20}
	if diff := cmp.Diff(want, shapeOf(r.pop(Popped))); diff != "" {
		t.Error(diff)
	}
}

func conformWrap(t *testing.T) {
	r := newRig(t, 8, 0)
	for i := range 3 * 65536 {
		id := r.add(nil, []Buf{r.buf(i%1000, 100)})
		if got := r.pop(Popped).Segs[0].Addr; got != r.buf(i%1000, 100).GPA {
			t.Fatalf("chain %d is at %#x", i, got)
		}
		r.put(id, uint32(i%100))
		r.reap(id, uint32(i%100))
	}
	if base, used := r.dev.Base(), r.dev.UsedIndex(); base != 0xfff0 || used != 0xfff0 {
		t.Errorf("base %#x, used index %#x after three times round", base, used)
	}
}

func conformUsedOrder(t *testing.T) {
	r := newRig(t, 4, 0)
	id := r.add(nil, []Buf{r.buf(0, 100)})
	copy(r.pop(Popped).Segs[0].Mem, "written")
	r.dev.Put(id, 7)
	if got := r.drv.RawUsedIndex(); got != 0xfff0 {
		t.Errorf("used index is %#x before Publish", got)
	}
	if got, want := r.drv.RawUsed()[0xfff0&3], (virtio.UsedElem{ID: uint32(id), Len: 7}); got != want {
		t.Errorf("used entry is %+v before the index moves, want %+v", got, want)
	}
	r.dev.Publish()
	if got := r.drv.RawUsedIndex(); got != 0xfff1 {
		t.Errorf("used index is %#x after Publish", got)
	}
	r.reap(id, 7)
	if got := string(r.mem(r.buf(0, 7))); got != "written" {
		t.Errorf("driver reads %q", got)
	}
}

func conformInOrder(t *testing.T) {
	r := newRig(t, 8, virtio.FInOrder)
	for round := range 100 {
		var ids []uint16
		for i := range 1 + round%4 {
			ids = append(ids, r.add([]Buf{r.buf(0, 4), r.buf(8, 4)}[:1+i%2], nil))
		}
		for _, id := range ids {
			if c := r.pop(Popped); c.Head != id {
				t.Fatalf("popped head %d, want %d", c.Head, id)
			}
			r.dev.Put(id, 0)
		}
		r.dev.Publish()
		for _, id := range ids {
			r.reap(id, 0) // the Driver checks the order
		}
	}
}
