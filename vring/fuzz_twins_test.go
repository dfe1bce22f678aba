package vring

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
)

// FuzzRingTwins plays the same steps on a split and on a packed ring, with both ends of each: chains of any shape, used in any order, taken
// by one device after the other. What either end sees must be the same at both, and nobody may sleep while there is work for it.
func FuzzRingTwins(f *testing.F) {
	turn := []byte{twinAdd | 2<<4, 0x31, twinDriverPublish, twinPop, twinPut, twinPublish, twinReap}
	f.Add(uint8(0), uint16(0xfffe), slices.Repeat(turn, 9))
	f.Add(uint8(0xf), uint16(0x8000), slices.Repeat(append([]byte{twinAdd | 5<<4, 0x12, twinPop, twinUnpop | 1<<4, twinEnableKick}, turn...), 5))
	f.Add(uint8(0x72), uint16(15), slices.Repeat([]byte{twinAdd, 0, twinAdd, 1, twinDriverPublish, twinPop, twinPop, twinPut | 1<<4, twinPut,
		twinPublish, twinSuccessor, twinEnableCall, twinReap, twinReap, twinEnableKick, twinRebind}, 6))
	f.Add(uint8(0x34), uint16(0), slices.Repeat(append([]byte{twinDisableKick, twinDisableCall, twinAdd, 0x7f, twinDriverPublish, twinSuccessor}, turn...), 4))
	sizes := []int{1, 2, 4, 16}
	var rigs [2][]*rig // memory alone is kept: it takes longest to make
	for _, size := range sizes {
		rigs[0] = append(rigs[0], newRigAt(f, size, 0, 0))
		rigs[1] = append(rigs[1], newRigAt(f, size, virtio.FRingPacked, 0))
	}
	f.Fuzz(func(t *testing.T, kind uint8, base uint16, script []byte) {
		var features virtio.Features
		for i, bit := range []virtio.Features{virtio.FIndirectDesc, virtio.FEventIdx, virtio.FInOrder} {
			if kind>>i&1 != 0 {
				features |= bit
			}
		}
		var w twins
		size := int(kind >> 3 & 3)
		w.half = [2]*twin{newTwin(t, rigs[0][size], features, base), newTwin(t, rigs[1][size], features|virtio.FRingPacked, base)}
		w.T, w.f = t, features
		w.play(script)
	})
}

// What the low four bits of a step say; the bits above are a number.
const (
	twinAdd = iota // the number and the next byte tell the shape
	twinDriverPublish
	twinPop
	twinPut // the number tells which
	twinPublish
	twinReap
	twinUnpop // the number tells how many
	twinEnableKick
	twinEnableCall
	twinDisableKick
	twinDisableCall
	twinSuccessor // another device goes on, where the front-end has the base from
	twinRebind
)

// twin is one ring of two.
type twin struct {
	*rig
	number  map[uint16]int // by id: which chain it is that is out
	devIdle bool           // the device sleeps until it is kicked
	drvIdle bool
}

func newTwin(t *testing.T, old *rig, f virtio.Features, base uint16) *twin {
	r := *old
	r.T, r.chain = t, Chain{Segs: make([]Seg, 0, 1)}
	if f.Has(virtio.FRingPacked) {
		base = place{slot: uint32(base&0x7fff) % uint32(r.cfg.Size), wrap: uint32(base >> 15)}.offWrap()
	}
	r.cfg.Features, r.cfg.Base, r.cfg.UsedBase = f, base, base
	low := r.table.Regions()[0].Bytes()
	tables := int(r.data-lowBase) - (r.cfg.Size*rigTableLen*virtio.DescSize+0xff)&^0xff
	var err error
	r.drv, err = NewDriver(DriverConfig{
		Size: r.cfg.Size, Desc: r.cfg.Desc, Avail: r.cfg.Avail, Used: r.cfg.Used, Features: f, Base: base,
		Indirect: low[tables:], IndirectAddr: lowBase + guestmem.GPA(tables), IndirectLen: rigTableLen,
	})
	if err != nil {
		t.Fatal(err)
	}
	h := &twin{rig: &r, number: map[uint16]int{}}
	h.open()
	return h
}

// open makes the device end.
func (h *twin) open() {
	var err error
	if h.dev, err = NewDevice(h.cfg, guestmem.NewView(h.table, nil)); err != nil {
		h.Fatal(err)
	}
	h.devIdle = false
}

// twins is a split and a packed ring that are driven in step.
type twins struct {
	*testing.T
	f      virtio.Features
	half   [2]*twin
	added  int      // chains so far, which are numbered
	takes  []uint32 // by number: what the device may say that it wrote, 0 or 1
	ready  int      // available, and not popped
	mine   []int    // numbers of the chains that the device has, in the order they were popped
	put    []int    // not published
	used   int      // published, not reaped
	fresh  int      // added, not published
	row    int      // of the chains popped last, none was Put since
	unsaid bool     // the device has not said yet whether it wants kicks, and the ring tells what the last one wanted
}

func (w *twins) play(script []byte) {
	for len(script) > 0 {
		n := int(script[0] >> 4)
		op := script[0] & 15
		script = script[1:]
		switch op {
		case twinAdd:
			if len(script) > 0 {
				w.add(n%5+1, int(script[0]))
				script = script[1:]
			}
		case twinDriverPublish:
			w.driverPublish()
		case twinPop:
			w.pop()
		case twinPut:
			w.doPut(n)
		case twinPublish:
			w.publish()
		case twinReap:
			w.reap()
		case twinUnpop:
			w.unpop(n)
		case twinSuccessor:
			w.successor()
		default:
			w.notifications(op)
		}
		w.same("free descriptors and chains that are out", func(h *twin) any {
			if h.dev.Err() != nil || h.drv.Err() != nil {
				w.Fatal(h.dev.Err(), h.drv.Err())
			}
			return []int{h.drv.Free(), h.drv.Out()}
		})
	}
}

// same does one thing to both rings, and returns what came of it, which must be the same.
func (w *twins) same(what string, do func(h *twin) any) any {
	w.Helper()
	split, packed := do(w.half[0]), do(w.half[1])
	if diff := cmp.Diff(split, packed); diff != "" {
		w.Fatalf("%s: split and packed differ:\n%s", what, diff)
	}
	return split
}

func (w *twins) add(n, shape int) {
	bufs := make([]Buf, n)
	for i := range bufs {
		bufs[i] = Buf{GPA: w.half[0].high - guestmem.GPA(shape)*16 + guestmem.GPA(i), Len: uint32(shape)*32 + uint32(i) + 1}
		if shape&1 != 0 {
			bufs[i].GPA = farBase + guestmem.GPA(shape*i)
		}
	}
	readable := shape % (n + 1)
	err := w.same("Add", func(h *twin) any {
		shift := h.high - w.half[0].high
		b := slices.Clone(bufs)
		for i := range b {
			if shape&1 == 0 {
				b[i].GPA += shift
			}
		}
		id, err := h.drv.Add(b[:readable], b[readable:])
		if err != nil {
			return err.Error()
		}
		if _, out := h.number[id]; out {
			h.Fatalf("Add returned id %d, which is out", id)
		}
		h.number[id] = w.added
		return ""
	})
	if err == "" {
		w.takes = append(w.takes, uint32(min(n-readable, w.added%2))) // 0 is what packed rings say in another way
		w.added++
		w.fresh++
	}
}

func (w *twins) driverPublish() {
	w.same("NeedsKick without event indices", func(h *twin) any {
		h.drv.Publish()
		kick := h.drv.NeedsKick()
		if kick && w.fresh == 0 || !kick && w.fresh > 0 && h.devIdle {
			h.Fatalf("kick: %v after %d chains, the device sleeps: %v", kick, w.fresh, h.devIdle)
		}
		h.devIdle = h.devIdle && !kick
		return kick || w.f.Has(virtio.FEventIdx) || w.unsaid
	})
	w.ready, w.fresh = w.ready+w.fresh, 0
}

func (w *twins) pop() {
	w.same("Pop", func(h *twin) any {
		s := h.dev.Pop(&h.chain)
		h.devIdle = false
		if s != Popped {
			if s != Empty || w.ready != 0 {
				h.Fatalf("Pop is %v, %d chains are available", s, w.ready)
			}
			return s
		}
		if want := w.added - w.fresh - w.ready; h.number[h.chain.Head] != want {
			h.Fatalf("popped chain %d, want %d", h.number[h.chain.Head], want)
		}
		got := shapeOf(&h.chain)
		got.Head = 0
		for i := range got.Segs {
			if got.Segs[i].GPA < farBase {
				got.Segs[i].GPA -= h.high // the rings differ in length
			}
		}
		return []any{got, h.chain.Descs}
	})
	if w.ready > 0 {
		w.mine = append(w.mine, w.added-w.fresh-w.ready)
		w.row++
		w.ready--
	}
}

// id is the id of the chain of a number.
func (h *twin) id(number int) uint16 {
	for id, n := range h.number {
		if n == number {
			return id
		}
	}
	panic("bug: no such chain")
}

func (w *twins) doPut(i int) {
	if len(w.mine) == 0 {
		return
	}
	if i %= len(w.mine); w.f.Has(virtio.FInOrder) {
		i = 0
	}
	n := w.mine[i]
	for _, h := range w.half {
		h.dev.Put(h.id(n), w.takes[n])
	}
	w.put = append(w.put, n)
	w.mine = slices.Delete(w.mine, i, i+1)
	w.row = min(w.row, len(w.mine)-i)
}

func (w *twins) publish() {
	w.same("NeedsCall without event indices", func(h *twin) any {
		h.dev.Publish()
		call := h.dev.NeedsCall()
		if call && len(w.put) == 0 || !call && len(w.put) > 0 && h.drvIdle {
			h.Fatalf("call: %v after %d chains, the driver sleeps: %v", call, len(w.put), h.drvIdle)
		}
		h.drvIdle = h.drvIdle && !call
		return call || w.f.Has(virtio.FEventIdx)
	})
	w.used += len(w.put)
	w.put = w.put[:0]
}

func (w *twins) reap() {
	got := w.same("Reap", func(h *twin) any {
		id, written, ok := h.drv.Reap()
		if ok != (w.used > 0) {
			h.Fatalf("Reap: %v, %d chains were used: %v", ok, w.used, h.drv.Err())
		}
		if !ok {
			return nil
		}
		h.drvIdle = false
		n := h.number[id]
		delete(h.number, id)
		if written != w.takes[n] {
			h.Fatalf("chain %d: %d bytes were written, want %d", n, written, w.takes[n])
		}
		return []int{n, int(written)}
	})
	if got != nil {
		w.used--
	}
}

func (w *twins) unpop(n int) {
	n = min(n, w.row)
	for _, h := range w.half {
		h.dev.Unpop(n)
	}
	w.mine, w.row, w.ready = w.mine[:len(w.mine)-n], w.row-n, w.ready+n
}

// successor has another device go on with both rings. It takes again what the first one did not return; if that is not what was popped last,
// or is not all, memory does not tell it, and a back-end returns everything first.
func (w *twins) successor() {
	if len(w.put) > 0 || w.row < len(w.mine) {
		return
	}
	for _, h := range w.half {
		h.cfg.Base, h.cfg.UsedBase = h.dev.Base(), h.dev.UsedIndex()
		h.open()
	}
	w.ready += len(w.mine)
	w.mine, w.row, w.unsaid = nil, 0, true
}

func (w *twins) notifications(op byte) {
	w.unsaid = w.unsaid && op != twinEnableKick && op != twinDisableKick
	got := w.same("notifications", func(h *twin) any {
		switch op {
		case twinEnableKick:
			more := h.dev.EnableKick()
			h.devIdle = !more
			return more
		case twinEnableCall:
			more := h.drv.EnableCall()
			h.drvIdle = !more
			return more
		case twinDisableKick:
			h.dev.DisableKick()
			h.devIdle = false
		case twinDisableCall:
			h.drv.DisableCall()
			h.drvIdle = false
		case twinRebind:
			h.dev.SetView(guestmem.NewView(h.table, nil))
			return h.dev.Rebind(h.cfg.Desc, h.cfg.Avail, h.cfg.Used)
		}
		return nil
	})
	if want := op == twinEnableKick && w.ready > 0 || op == twinEnableCall && w.used > 0; got == any(!want) {
		w.Fatalf("step %d says %v, %d chains are available and %d used", op, got, w.ready, w.used)
	}
}
