package vring

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vhostd/vhostd/virtio"
)

func TestDriverFillsTheRing(t *testing.T) {
	r := newRig(t, 8, 0)
	for range 4 {
		r.add([]Buf{r.buf(0, 1), r.buf(0, 1)}, nil)
	}
	if _, err := r.drv.Add([]Buf{r.buf(0, 1)}, nil); !errors.Is(err, ErrFull) || r.drv.Free() != 0 || r.drv.Out() != 4 {
		t.Errorf("Add to a full ring: %v; %d free, %d out", err, r.drv.Free(), r.drv.Out())
	}
	for name, bufs := range map[string][]Buf{"without buffers": nil, "of 9 buffers, queue size 8": make([]Buf, 9)} {
		if _, err := r.drv.Add(bufs, nil); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("Add: %v, want %q", err, name)
		}
	}
	r.put(r.pop(Popped).Head, 0)
	r.reap(0, 0)
	r.add(nil, []Buf{r.buf(0, 1), r.buf(0, 1)})
}

// TestDriverDescriptors: golden descriptors, direct and indirect.
func TestDriverDescriptors(t *testing.T) {
	d := func(addr uint64, n uint32, flags, next uint16) virtio.Desc {
		return virtio.Desc{Addr: addr, Len: n, Flags: flags, Next: next}
	}
	r := newRig(t, 8, 0)
	r.add([]Buf{r.buf(0, 1), r.buf(10, 2)}, []Buf{r.buf(20, 3)})
	at := uint64(r.data)
	want := []virtio.Desc{d(at, 1, 1, 1), d(at+10, 2, 1, 2), d(at+20, 3, 2, 0)}
	if diff := cmp.Diff(want, r.drv.RawDesc()[:3]); diff != "" {
		t.Error(diff)
	}
	r = newRig(t, 8, virtio.FIndirectDesc)
	at = uint64(r.data)
	r.add([]Buf{r.buf(0, 1)}, nil) // one buffer takes no table
	id := r.add([]Buf{r.buf(0, 1), r.buf(10, 2)}, []Buf{r.buf(20, 3)})
	want = []virtio.Desc{d(at, 1, 1, 1), d(at+10, 2, 1, 2), d(at+20, 3, 2, 0)}
	if diff := cmp.Diff(want, r.drv.RawTable(id)[:3]); diff != "" {
		t.Error(diff)
	}
	tables := uint64(r.drv.indirectAddr) + rigTableLen*16
	want = []virtio.Desc{d(at, 1, 0, 0), d(tables, 48, 4, 0)}
	if diff := cmp.Diff(want, r.drv.RawDesc()[:2]); diff != "" {
		t.Error(diff)
	}
}

// TestDriverInOrderBatch: one used entry may stand for several chains, also where the ring wraps.
func TestDriverInOrderBatch(t *testing.T) {
	r := newRig(t, 8, virtio.FInOrder)
	used := uint16(0xfff0)
	for round := range 50 {
		n := 1 + round%8
		var ids []uint16
		for i := range n {
			ids = append(ids, r.add(nil, []Buf{r.buf(0, uint32(10+i))}))
		}
		r.drv.RawUsed()[used&7] = virtio.UsedElem{ID: uint32(ids[n-1]), Len: 5}
		used += uint16(n)
		deviceIndex(r.drv, used)
		for i, id := range ids {
			want := uint32(10 + i) // skipped: used to its full length
			if i == n-1 {
				want = 5
			}
			r.reap(id, want)
		}
	}
	r.add(nil, []Buf{r.buf(0, 1)})
	id := r.add(nil, []Buf{r.buf(0, 1)})
	r.drv.RawUsed()[used&7] = virtio.UsedElem{ID: uint32(id)}
	deviceIndex(r.drv, used+1)
	if _, _, ok := r.drv.Reap(); ok || r.drv.Err() == nil || !strings.Contains(r.drv.Err().Error(), "out of order") {
		t.Errorf("a chain used out of order: %v, %v", ok, r.drv.Err())
	}
}

// deviceIndex stores used.idx as a device would.
func deviceIndex(d *Driver, idx uint16) { storeIndex(d.usedWord, idx) }

func TestDriverCatchesTheDevice(t *testing.T) {
	for want, e := range map[string]struct {
		elem virtio.UsedElem
		idx  uint16
	}{
		"used id 8, queue size 8":                  {virtio.UsedElem{ID: 8}, 1},
		"used id 65536, queue size 8":              {virtio.UsedElem{ID: 1 << 16}, 1},
		"used id 3, which the device does not":     {virtio.UsedElem{ID: 3}, 1},
		"used length 11 of id 0":                   {virtio.UsedElem{ID: 0, Len: 11}, 1},
		"2 entries ahead of the last one reaped":   {virtio.UsedElem{ID: 0, Len: 1}, 2},
		"65535 entries ahead of the last one reap": {virtio.UsedElem{ID: 0, Len: 1}, 0xffff},
	} {
		r := newRig(t, 8, 0)
		r.add(nil, []Buf{r.buf(0, 10)})
		r.drv.RawUsed()[0xfff0&7] = e.elem
		deviceIndex(r.drv, 0xfff0+e.idx)
		_, _, ok := r.drv.Reap()
		if ok || r.drv.Err() == nil || !strings.Contains(r.drv.Err().Error(), want) {
			t.Errorf("%v, %v; want %q", ok, r.drv.Err(), want)
		}
		deviceIndex(r.drv, 0xfff1)
		r.drv.RawUsed()[0xfff0&7] = virtio.UsedElem{}
		if _, _, ok := r.drv.Reap(); ok || r.drv.EnableCall() {
			t.Errorf("%q, and the driver goes on", want)
		}
	}
	r := newRig(t, 8, 0)
	id := r.add(nil, []Buf{r.buf(0, 10)})
	r.dev.Pop(&r.chain)
	r.put(id, 0)
	r.add(nil, []Buf{r.buf(0, 10)})
	r.put(id, 0) // twice
	r.reap(id, 0)
	if _, _, ok := r.drv.Reap(); ok || r.drv.Err() == nil {
		t.Errorf("a chain used twice: %v, %v", ok, r.drv.Err())
	}
}

func TestDriverConfig(t *testing.T) {
	r := newRig(t, 8, 0)
	good := DriverConfig{Size: 8, Desc: r.cfg.Desc, Avail: r.cfg.Avail, Used: r.cfg.Used}
	for name, change := range map[string]func(*DriverConfig){
		"size":            func(c *DriverConfig) { c.Size = 9 },
		"descriptors":     func(c *DriverConfig) { c.Desc = c.Desc[:100] },
		"avail alignment": func(c *DriverConfig) { c.Avail = c.Avail[2:] },
		"indirect tables": func(c *DriverConfig) {
			c.Features, c.IndirectLen, c.Indirect = virtio.FIndirectDesc, 4, make([]byte, 8*4*16-1)
		},
	} {
		cfg := good
		change(&cfg)
		if _, err := NewDriver(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	d, err := NewDriver(good)
	if err != nil {
		t.Fatal(err)
	}
	if d.RawTable(0) != nil || d.Size() != 8 || d.RawUsedIndex() != 0 {
		t.Error("a new ring is not empty")
	}
}
