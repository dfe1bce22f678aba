package vring

import (
	"bytes"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

// FuzzSplitPop drives the device end of a ring of 16, in memory that is whatever the fuzzer makes of it and changes between the steps: ring,
// indirect tables and buffers may all lie on each other. Each chain must be what the reference reads at that moment, each
// notification what it decides, and the device must have written what it is to write and nothing else.
func FuzzSplitPop(f *testing.F) {
	mem := func(idx uint16, heads []uint16, d ...virtio.Desc) []byte {
		b := make([]byte, fuzzUsed)
		copy(b, shm.Bytes(d))
		copy(b[fuzzAvail:], shm.Bytes(append([]uint16{0, idx}, heads...)))
		return b
	}
	turn := []byte{opPop, opPut, opPublish, opEnableKick}
	f.Add(uint64(0), uint16(0), turn, mem(1, nil, virtio.Desc{Addr: 0x1000, Len: 100}))
	f.Add(uint64(0), uint16(0), append(turn, opDisableKick, opPop, opUnpop|1<<3, opPop), mem(2, []uint16{0, 1},
		virtio.Desc{Len: 1, Flags: next, Next: 1}, virtio.Desc{Len: 9, Flags: write}))
	f.Add(uint64(0), uint16(0), turn, mem(9, []uint16{300}, virtio.Desc{Addr: 0x1fff, Len: 0x100, Flags: next}))
	f.Add(uint64(virtio.FIndirectDesc), uint16(0), append(turn, opPoke|1<<3, opPoke, 16, 0, 0xff, 0xff, opPop), mem(1, nil,
		virtio.Desc{Addr: 16, Len: 48, Flags: indirect}, virtio.Desc{Addr: 0xff0, Len: 100, Flags: next, Next: 2},
		virtio.Desc{Addr: 0x1000, Len: 0x1000, Flags: next, Next: 0}, virtio.Desc{Addr: 8, Len: 16, Flags: write}))
	f.Add(uint64(virtio.FIndirectDesc|virtio.FEventIdx), uint16(0), slices.Repeat(turn, 3), mem(16, nil,
		virtio.Desc{Addr: 0xff8, Len: 160, Flags: indirect | write}, virtio.Desc{Len: 1 << 31, Flags: indirect | next}))
	f.Add(uint64(virtio.FEventIdx), uint16(0xfff0), slices.Repeat([]byte{opPoke | 1<<3, opPop, opPop, opPut | 1<<3, opPublish, opEnableKick}, 20),
		mem(0xfff8, []uint16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, slices.Repeat([]virtio.Desc{{Addr: 0x300, Len: 8}}, 16)...))
	f.Fuzz(func(t *testing.T, features uint64, base uint16, script, mem []byte) {
		features &= uint64(virtio.FIndirectDesc | virtio.FEventIdx | virtio.FInOrder)
		newPlayer(t, virtio.Features(features), base, mem).play(script)
	})
}

// FuzzPackedPop is FuzzSplitPop for packed rings: the descriptor ring lies at the start of memory, the driver's event suppression structure
// and the device's behind it.
func FuzzPackedPop(f *testing.F) {
	ring := func(d ...virtio.PackedDesc) []byte { return shm.Bytes(d) }
	const avail, last = virtio.DescAvail, 15 // last is a base: its bit 15 is the wrap counter, here 0
	turn := []byte{opPop, opPut, opPublish, opEnableKick}
	f.Add(uint64(0), uint16(1<<15), turn, ring(virtio.PackedDesc{Addr: 0x1000, Len: 100, ID: 3, Flags: avail}))
	f.Add(uint64(0), uint16(1<<15), append(turn, turn...), ring(
		virtio.PackedDesc{Len: 1, Flags: next | avail}, virtio.PackedDesc{Len: 9, ID: 15, Flags: write | avail},
		virtio.PackedDesc{Len: 9, ID: 15, Flags: avail}))
	f.Add(uint64(0), uint16(last), turn, append(make([]byte, 240), ring(virtio.PackedDesc{Addr: 0xfff, Len: 2, Flags: virtio.DescUsed})...))
	f.Add(uint64(virtio.FIndirectDesc|virtio.FEventIdx), uint16(1<<15), slices.Repeat(turn, 2), ring(
		virtio.PackedDesc{Addr: 16, Len: 48, Flags: indirect | avail},
		virtio.PackedDesc{Addr: 0xff0, Len: 100, Flags: 0xfffd &^ virtio.DescUsed}, virtio.PackedDesc{Addr: 0x1000, Len: 0x1000},
		virtio.PackedDesc{Addr: 8, Len: 16, Flags: write}))
	many := make([]virtio.PackedDesc, fuzzSize)
	for i := range many {
		many[i] = virtio.PackedDesc{Addr: 0x300, Len: 8, ID: uint16(15 - i), Flags: avail}
	}
	f.Add(uint64(virtio.FEventIdx), uint16(1<<15), slices.Repeat([]byte{opPop, opPop, opPut | 1<<3, opPublish, opEnableKick, opPoke | 1<<3}, 20), ring(many...))
	f.Fuzz(func(t *testing.T, features uint64, base uint16, script, mem []byte) {
		features &= uint64(virtio.FIndirectDesc | virtio.FEventIdx | virtio.FInOrder)
		newPlayer(t, virtio.Features(features)|virtio.FRingPacked, base&(1<<15|fuzzSize-1), mem).play(script)
	})
}

// What the low three bits of a step of the script say.
const (
	opPopRun      = iota // up to as many as the bits above say
	opPop                //
	opPut                // of the chains that are out, which one is in the bits above
	opPublish            // and ask whether to call
	opEnableKick         //
	opDisableKick        //
	opUnpop              // as many as the bits above say
	opPoke               // write two bytes somewhere, as the next four bytes say; with bit 3 make one more chain available
)

// player is a device end over memory that the fuzzer made, with what the reference knows of it.
type player struct {
	*testing.T
	f      virtio.Features
	table  *guestmem.Table
	lo, hi []byte // guest memory: two regions that touch
	dev    *Device
	was    flat // what memory ought to hold

	chains []Chain        // popped, and not Put
	put    []used         // not published
	has    map[uint16]int // by id: descriptors of the chains that are popped and not published
	row    int            // of the chains popped last, none was Put since
	first  bool           // nothing has been published yet
}

func newPlayer(t *testing.T, f virtio.Features, base uint16, mem []byte) *player {
	low, high := heapRegion(t, 0, flatHole), heapRegion(t, flatHole, flatSize-flatHole)
	p := &player{T: t, f: f, lo: low.Bytes(), hi: high.Bytes(), has: map[uint16]int{}, first: true}
	copy(p.lo, mem)
	copy(p.hi, mem[min(len(mem), flatHole):])
	table, err := guestmem.NewTable(low, high)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(table.Unpin)
	p.table = table
	p.dev, err = NewDevice(Config{
		Size: fuzzSize, Desc: p.lo, Avail: p.lo[fuzzAvail:], Used: p.lo[fuzzUsed:], Features: f, Base: base, UsedBase: base,
	}, guestmem.NewView(table, nil))
	if err != nil {
		t.Fatal(err)
	}
	p.was = p.now()
	return p
}

// now is what memory holds.
func (p *player) now() flat { return append(slices.Clone(p.lo), p.hi...) }

func (p *player) play(script []byte) {
	for len(script) > 0 && p.dev.Err() == nil {
		op := script[0]
		script = script[1:]
		switch op & 7 {
		case opPopRun:
			p.doPopRun(int(op >> 3))
		case opPut:
			p.doPut(int(op >> 3))
		case opPublish:
			p.doPublish()
		case opEnableKick:
			p.doEnableKick()
		case opDisableKick:
			p.dev.DisableKick()
			p.expectNotify()
		case opUnpop:
			p.doUnpop(int(op >> 3))
		case opPoke:
			script = p.doPoke(op&8 != 0, script)
		default:
			p.doPop()
		}
		p.unchanged()
	}
}

// doPopRun pops a run, gives it back, and pops it one by one: the chains must be the same.
func (p *player) doPopRun(most int) {
	run := make([]Chain, most)
	for i := range run {
		run[i].Segs = make([]Seg, 0, 1)
	}
	n := p.dev.PopRun(run)
	p.dev.Unpop(n)
	for _, c := range run[:n] {
		p.doPop()
		got := p.chains[len(p.chains)-1]
		if diff := cmp.Diff(shapeOf(&got), shapeOf(&c)); diff != "" || c.Descs != got.Descs {
			p.Fatalf("a chain of a run of %d is another when it is popped by itself: %d and %d descriptors\n%s", n, got.Descs, c.Descs, diff)
		}
	}
	if n == 0 {
		p.doPop()
	}
}

// doPop pops, and compares with the reference.
func (p *player) doPop() {
	want := p.next()
	c := Chain{Segs: make([]Seg, 0, 1)}
	s := p.dev.Pop(&c)
	if s != want.status || (s == Broken) != (p.dev.Err() != nil) {
		p.Fatalf("Pop is %v, want %v, Err is %v", s, want.status, p.dev.Err())
	}
	if s == Empty || s == Broken {
		return
	}
	if diff := cmp.Diff(want.shape, shapeOf(&c)); diff != "" {
		p.Fatal(diff)
	}
	if s == Popped && int(c.Descs) != want.descs {
		p.Fatalf("chain of %d descriptors, want %d", c.Descs, want.descs)
	}
	for _, seg := range c.Segs {
		mem := p.table.Slice(seg.Addr, uint64(len(seg.Mem)))
		if len(mem) == 0 || &mem[0] != &seg.Mem[0] || cap(seg.Mem) != len(seg.Mem) {
			p.Fatalf("segment at %#x of %d bytes is not the guest's memory there", seg.Addr, len(seg.Mem))
		}
	}
	c.Descs = uint16(want.descs)
	p.chains = append(p.chains, c)
	p.has[c.Head] = want.descs
	p.row++
}

// next is what the reference pops now.
func (p *player) next() reading {
	if p.dev.packed != nil {
		out := 0
		for _, n := range p.has {
			out += n
		}
		r := p.was.readPacked(placeOf(p.dev.Base()), out, p.has, p.f)
		if r.status != Empty && out == fuzzSize {
			r = reading{status: Broken}
		}
		return r
	}
	base := p.dev.Base()
	if p.dev.Ahead() == 0 {
		idx := p.was.u16(fuzzAvail + 2)
		switch {
		case idx == base:
			return reading{status: Empty}
		case idx-base > fuzzSize, idx-p.dev.UsedIndex() > fuzzSize:
			return reading{status: Broken}
		}
	}
	return p.was.readSplit(p.was.u16(fuzzAvail+4+2*int(base%fuzzSize)), p.f)
}

// doPut returns a chain, with as many bytes as it takes, so that all lengths occur.
func (p *player) doPut(i int) {
	if len(p.chains) == 0 {
		return
	}
	if i %= len(p.chains); p.f.Has(virtio.FInOrder) {
		i = 0
	}
	c := p.chains[i]
	if p.dev.packed == nil { // written as it is put, and seen when it is published
		at := fuzzUsed + 4 + 8*((int(p.dev.UsedIndex())+len(p.put))%fuzzSize)
		copy(p.was[at:], shm.Bytes([]virtio.UsedElem{{ID: uint32(c.Head), Len: c.WriteLen}}))
	}
	p.dev.Put(c.Head, c.WriteLen)
	p.put = append(p.put, used{c.Head, c.WriteLen})
	p.chains = slices.Delete(p.chains, i, i+1)
	p.row = min(p.row, len(p.chains)-i)
}

// doPublish publishes what was Put, and compares what the driver sees and whether it is called.
func (p *player) doPublish() {
	n := len(p.put)
	from := p.dev.UsedIndex()
	if p.dev.packed != nil {
		p.expectUsed(placeOf(from))
	}
	p.dev.Publish()
	var want bool
	if to := p.dev.UsedIndex(); p.dev.packed != nil {
		want = p.was.calledPacked(placeOf(from), placeOf(to), p.f)
	} else {
		if n > 0 {
			copy(p.was[fuzzUsed+2:], shm.Bytes([]uint16{from + uint16(n)}))
			p.expectNotify()
		}
		want = p.was.calledSplit(from, to, p.f)
	}
	if n > 0 && p.first {
		want = want || p.f.Has(virtio.FEventIdx) && !p.silent()
		p.first = false
	}
	p.put = p.put[:0]
	if got := p.dev.NeedsCall(); got != (want && n > 0) {
		p.Fatalf("NeedsCall is %v after %d chains, want %v", got, n, want)
	}
}

// silent: the driver of a packed ring wants no notifications at all.
func (p *player) silent() bool {
	return p.dev.packed != nil && p.was.u16(fuzzAvail+2)&3 == virtio.EventDisable
}

// expectUsed writes the used descriptors of a packed ring as a device is to.
func (p *player) expectUsed(at place) {
	for _, u := range p.put {
		flags := at.used()
		if u.written > 0 {
			flags |= virtio.DescWrite
		}
		copy(p.was[at.slot*virtio.DescSize+8:], shm.Bytes([]uint64{packWord(u.written, u.id, flags)}))
		at.advance(uint32(p.has[u.id]), fuzzSize)
		delete(p.has, u.id)
	}
}

func (p *player) doEnableKick() {
	more := p.dev.EnableKick()
	p.expectNotify()
	if want := p.next().status; p.dev.Err() == nil && more != (want != Empty) || p.dev.Err() != nil && !more {
		p.Fatalf("EnableKick: %v, the next chain is %v, Err is %v", more, want, p.dev.Err())
	}
}

// expectNotify takes over what the device may change when it asks for notifications or asks for none.
func (p *player) expectNotify() {
	if p.dev.packed != nil {
		copy(p.was[fuzzUsed:][:virtio.EventLen], p.lo[fuzzUsed:])
		return
	}
	copy(p.was[fuzzUsed:][:2], p.lo[fuzzUsed:])
	if at := fuzzUsed + offAvailEvent(fuzzSize); p.f.Has(virtio.FEventIdx) {
		copy(p.was[at:][:2], p.lo[at:])
	}
	// Where flags are stored the index is, too, in one word, whatever the driver has done to it; and nowhere else.
	if idx := shm.Bytes([]uint16{p.dev.UsedIndex()}); bytes.Equal(p.lo[fuzzUsed+2:][:2], idx) {
		copy(p.was[fuzzUsed+2:], idx)
	}
}

func (p *player) doUnpop(n int) {
	n = min(n, p.row)
	p.dev.Unpop(n)
	for _, c := range p.chains[len(p.chains)-n:] {
		delete(p.has, c.Head)
	}
	p.chains = p.chains[:len(p.chains)-n]
	p.row -= n
}

// doPoke is the driver's turn: it makes a chain available as it should, or writes anywhere.
func (p *player) doPoke(proper bool, script []byte) []byte {
	var at int
	var v uint16
	switch {
	case !proper:
		var b [4]byte
		n := copy(b[:], script)
		script = script[n:]
		at, v = int(b[0])|int(b[1])<<8, uint16(b[2])|uint16(b[3])<<8
	case p.dev.packed != nil:
		next := placeOf(p.dev.Base())
		at = int(next.slot)*virtio.DescSize + 14
		v = p.was.u16(at)&^phaseFlags | next.available()
	default:
		at, v = fuzzAvail+2, p.was.u16(fuzzAvail+2)+1
	}
	at %= flatSize - 1
	for i, b := range []byte{byte(v), byte(v >> 8)} {
		p.was[at+i] = b
		if a := at + i; a < flatHole {
			p.lo[a] = b
		} else {
			p.hi[a-flatHole] = b
		}
	}
	return script
}

// unchanged checks that the device wrote what it was to write.
func (p *player) unchanged() {
	if bytes.Equal(p.was[:flatHole], p.lo) && bytes.Equal(p.was[flatHole:], p.hi) {
		return
	}
	for i, b := range p.now() {
		if b != p.was[i] {
			p.Fatalf("byte %#x of guest memory is %#x, and should be %#x", i, b, p.was[i])
		}
	}
}
