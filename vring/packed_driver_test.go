package vring

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vhostd/vhostd/virtio"
)

func TestPackedDriverFillsTheRing(t *testing.T) {
	r := newRig(t, 7, packed)
	for range 3 {
		r.add([]Buf{r.buf(0, 1), r.buf(0, 1)}, nil)
	}
	if _, err := r.drv.Add([]Buf{r.buf(0, 1), r.buf(0, 1)}, nil); !errors.Is(err, ErrFull) || r.drv.Free() != 1 || r.drv.Out() != 3 {
		t.Errorf("Add to a full ring: %v; %d free, %d out", err, r.drv.Free(), r.drv.Out())
	}
	for name, bufs := range map[string][]Buf{"without buffers": nil, "of 8 buffers, queue size 7": make([]Buf, 8)} {
		if _, err := r.drv.Add(bufs, nil); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("Add: %v, want %q", err, name)
		}
	}
	r.put(r.pop(Popped).Head, 0)
	r.reap(0, 0)
	r.add(nil, []Buf{r.buf(0, 1), r.buf(0, 1), r.buf(0, 1)})
}

// TestPackedDriverDescriptors: golden descriptors, direct and indirect, over the end of the ring.
func TestPackedDriverDescriptors(t *testing.T) {
	r := newRigAt(t, 3, packed|virtio.FIndirectDesc, 2|1<<15)
	r.T = t
	at := uint64(r.data)
	r.drv.tableLen = 0
	r.drv.Add([]Buf{r.buf(0, 1)}, []Buf{r.buf(20, 3)})
	r.drv.tableLen = rigTableLen
	id, _ := r.drv.Add([]Buf{r.buf(0, 1)}, []Buf{r.buf(20, 3)})
	const avail1, avail0 = virtio.DescAvail, virtio.DescUsed // with wrap counter 1 and 0
	table := uint64(r.drv.indirectAddr) + uint64(id)*rigTableLen*16
	want := []virtio.PackedDesc{
		{Addr: at + 20, Len: 3, Flags: write | avail0}, {Addr: table, Len: 32, ID: 1, Flags: indirect | avail0}, {Addr: at},
	}
	if diff := cmp.Diff(want, r.drv.RawPacked()); diff != "" {
		t.Errorf("before Publish:\n%s", diff)
	}
	r.drv.Publish()
	want[2] = virtio.PackedDesc{Addr: at, Len: 1, Flags: next | avail1}
	if diff := cmp.Diff(want, r.drv.RawPacked()); diff != "" {
		t.Errorf("after Publish:\n%s", diff)
	}
}

// use writes a used descriptor n slots from where the driver looks next.
func (r *rig) use(n int, id uint16, written uint32, flags uint16) {
	at := r.drv.packed.used.plus(n, r.drv.Size())
	r.drv.RawPacked()[at.slot] = virtio.PackedDesc{ID: id, Len: written, Flags: flags | at.used()}
}

// TestPackedDriverInOrderBatch: one used descriptor may stand for several chains.
func TestPackedDriverInOrderBatch(t *testing.T) {
	r := newRig(t, 11, packed|virtio.FInOrder)
	for round := range 50 {
		n := 1 + round%5
		var ids []uint16
		for i := range n {
			ids = append(ids, r.add(nil, []Buf{r.buf(0, uint32(10+i)), r.buf(0, 5)}))
		}
		r.use(0, ids[n-1], 5, write)
		for i, id := range ids {
			want := uint32(15 + i) // skipped: used to its full length
			if i == n-1 {
				want = 5
			}
			r.reap(id, want)
		}
		if _, _, ok := r.drv.Reap(); ok {
			t.Fatal("more than the batch was reaped")
		}
	}
	r.add(nil, []Buf{r.buf(0, 1)})
	id := r.add(nil, []Buf{r.buf(0, 1)})
	r.use(0, id, 0, 0)
	r.reap(r.drv.order[r.drv.reaped&r.drv.mask], 1) // the first of two
	r.reap(id, 0)
	a := r.add(nil, []Buf{r.buf(0, 1)})
	b, err := r.drv.Add(nil, []Buf{r.buf(0, 1)}) // not published: nobody can have used it
	if err != nil {
		t.Fatal(err)
	}
	r.use(0, b, 0, 0)
	if _, _, ok := r.drv.Reap(); ok || r.drv.Err() == nil || !strings.Contains(r.drv.Err().Error(), "out of order") {
		t.Errorf("a chain used before %d: %v, %v", a, ok, r.drv.Err())
	}
}

func TestPackedDriverCatchesTheDevice(t *testing.T) {
	for want, e := range map[string]virtio.UsedElem{
		"used id 8, queue size 8":              {ID: 8},
		"used id 65535, queue size 8":          {ID: 0xffff},
		"used id 3, which the device does not": {ID: 3},
		"used length 11 of id 0":               {ID: 0, Len: 11},
	} {
		r := newRig(t, 8, packed)
		r.add(nil, []Buf{r.buf(0, 10)})
		r.use(0, uint16(e.ID), e.Len, write)
		_, _, ok := r.drv.Reap()
		if ok || r.drv.Err() == nil || !strings.Contains(r.drv.Err().Error(), want) {
			t.Errorf("%v, %v; want %q", ok, r.drv.Err(), want)
		}
		r.use(0, 0, 0, 0)
		if _, _, ok := r.drv.Reap(); ok || r.drv.EnableCall() {
			t.Errorf("%q, and the driver goes on", want)
		}
	}
	r := newRig(t, 8, packed)
	id := r.add(nil, []Buf{r.buf(0, 10)})
	r.use(0, id, 99, 0) // without the flag WRITE, the length is reserved
	r.reap(id, 0)
}

// TestPackedUsedIndex: what a front-end that lost its back-end needs to know is found in the ring.
func TestPackedUsedIndex(t *testing.T) {
	r := newRig(t, 7, packed)
	for range 30 {
		a, b := r.add([]Buf{r.buf(0, 1), r.buf(0, 1)}, nil), r.add([]Buf{r.buf(0, 1)}, nil)
		c := r.add([]Buf{r.buf(0, 1), r.buf(0, 1), r.buf(0, 1)}, nil)
		for range 3 {
			r.pop(Popped)
		}
		for _, id := range []uint16{b, a, c} {
			if got := r.drv.RawUsedIndex(); got != r.dev.UsedIndex() {
				t.Fatalf("used index %#x, the device has %#x", got, r.dev.UsedIndex())
			}
			r.put(id, 0)
		}
		for _, id := range []uint16{b, a, c} {
			r.reap(id, 0)
		}
	}
}

func TestPackedDriverConfig(t *testing.T) {
	r := newRig(t, 7, packed)
	good := DriverConfig{Size: 7, Desc: r.cfg.Desc, Avail: r.cfg.Avail, Used: r.cfg.Used, Features: packed}
	for name, change := range map[string]func(*DriverConfig){
		"size":            func(c *DriverConfig) { c.Size = 32769 },
		"base":            func(c *DriverConfig) { c.Base = 7 },
		"descriptors":     func(c *DriverConfig) { c.Desc = c.Desc[:100] },
		"avail alignment": func(c *DriverConfig) { c.Avail = c.Avail[2:] },
		"indirect tables": func(c *DriverConfig) {
			c.Features, c.IndirectLen, c.Indirect = packed|virtio.FIndirectDesc, 4, make([]byte, 7*4*16-1)
		},
	} {
		cfg := good
		change(&cfg)
		if _, err := NewDriver(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestPackedDriverReapsNothingAfterError: with VIRTIO_F_IN_ORDER, a used id out of order was an error at first, and was believed as soon as the
// driver had published another chain.
func TestPackedDriverReapsNothingAfterError(t *testing.T) {
	r := newRig(t, 8, packed|virtio.FInOrder)
	r.add([]Buf{r.buf(0, 10)}, nil)
	first := r.pop(Popped).Head
	at := &r.drv.RawPacked()[r.drv.packed.used.slot]
	at.ID, at.Flags = first+1, r.drv.packed.used.used()
	r.drv.out[first+1] = sent{descs: 1} // it is out, and is not the oldest
	if _, _, ok := r.drv.Reap(); ok || r.drv.Err() == nil {
		t.Fatalf("id %d, which is not the oldest, was reaped: %v", first+1, r.drv.Err())
	}
	r.drv.out[first+1] = sent{}
	if id := r.add([]Buf{r.buf(0, 10)}, nil); id != first+1 {
		t.Fatalf("id %d, want %d", id, first+1)
	}
	if id, _, ok := r.drv.Reap(); ok {
		t.Errorf("id %d was reaped after %v", id, r.drv.Err())
	}
}
