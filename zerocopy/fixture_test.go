package zerocopy

import (
	"bytes"
	"testing"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// guest is a driver and its memory, which the race detector watches.
type guest struct {
	t      testing.TB
	table  *guestmem.Table
	ram    []byte
	driver *vring.Driver
	ring   *vring.Device
	next   guestmem.GPA // of the memory that alloc gives out
}

const (
	ramSize   = 1 << 20
	ramBase   = guestmem.GPA(0x10000)
	startBase = 0xfff0 // rings wrap soon
	features  = virtio.FVersion1 | virtio.FNetMrgRxbuf | virtio.FInOrder
)

func newTable(t testing.TB) *guestmem.Table {
	t.Helper()
	r, err := guestmem.NewHeapRegion(ramBase, 0x7f0000000000, ramSize)
	if err != nil {
		t.Fatal(err)
	}
	table, err := guestmem.NewTable(r)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func newGuest(t testing.TB, size int, f virtio.Features) *guest {
	t.Helper()
	g := &guest{t: t, table: newTable(t), next: ramBase}
	g.ram = g.table.Regions()[0].Bytes()
	desc := g.mem(g.alloc(virtio.DescTableLen(size)), virtio.DescTableLen(size))
	avail := g.mem(g.alloc(virtio.AvailLen(size)), virtio.AvailLen(size))
	used := g.mem(g.alloc(virtio.UsedLen(size)), virtio.UsedLen(size))
	base := uint16(startBase)
	if f.Has(virtio.FRingPacked) {
		base = uint16(size-1) | 1<<15 // the last descriptor of the first lap
	}
	var err error
	g.driver, err = vring.NewDriver(vring.DriverConfig{Size: size, Desc: desc, Avail: avail, Used: used, Features: f, Base: base})
	if err != nil {
		t.Fatal(err)
	}
	g.ring, err = vring.NewDevice(vring.Config{
		Size: size, Desc: desc, Avail: avail, Used: used, Features: f, Base: base, UsedBase: base,
	}, guestmem.NewView(g.table, nil))
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// alloc takes n bytes of guest memory, 16-aligned.
func (g *guest) alloc(n int) guestmem.GPA {
	a := g.next
	g.next += guestmem.GPA(n+15) &^ 15
	if g.next > ramBase+ramSize {
		g.t.Fatal("the guest has no more memory")
	}
	return a
}

func (g *guest) mem(a guestmem.GPA, n int) []byte { return g.table.Slice(a, uint64(n)) }

// frame is n bytes that no other frame has.
func frame(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = seed + byte(i*7)
	}
	return b
}

// send makes a frame available, in one buffer with its header, and returns the buffer's id and memory (of the frame alone).
func (g *guest) send(hdr virtio.NetHdr, data []byte) (id uint16, mem []byte) {
	g.t.Helper()
	a := g.alloc(virtio.NetHdrSize + len(data))
	mem = g.mem(a, virtio.NetHdrSize+len(data))
	hdr.Encode(mem[:virtio.NetHdrSize])
	copy(mem[virtio.NetHdrSize:], data)
	id, err := g.driver.Add([]vring.Buf{{GPA: a, Len: uint32(len(mem))}}, nil)
	if err != nil {
		g.t.Fatal(err)
	}
	g.driver.Publish()
	return id, mem[virtio.NetHdrSize:]
}

// sendParts makes a chain available whose buffers have the given lengths, of which the first bytes are the header.
func (g *guest) sendParts(data []byte, lens ...int) uint16 {
	g.t.Helper()
	return g.sendBytes(append(make([]byte, virtio.NetHdrSize), data...), lens...)
}

// sendBytes is sendParts of a frame that has its header with it.
func (g *guest) sendBytes(all []byte, lens ...int) uint16 {
	g.t.Helper()
	var bufs []vring.Buf
	for _, n := range lens {
		a := g.alloc(n)
		all = all[copy(g.mem(a, n), all):]
		bufs = append(bufs, vring.Buf{GPA: a, Len: uint32(n)})
	}
	id, err := g.driver.Add(bufs, nil)
	if err != nil {
		g.t.Fatal(err)
	}
	g.driver.Publish()
	return id
}

// post gives the device a receive buffer of n bytes.
func (g *guest) post(lens ...int) (id uint16, mem [][]byte) {
	g.t.Helper()
	var bufs []vring.Buf
	for _, n := range lens {
		a := g.alloc(n)
		bufs = append(bufs, vring.Buf{GPA: a, Len: uint32(n)})
		mem = append(mem, g.mem(a, n))
	}
	id, err := g.driver.Add(nil, bufs)
	if err != nil {
		g.t.Fatal(err)
	}
	g.driver.Publish()
	return id, mem
}

// returned reaps everything the driver can see.
func (g *guest) returned() []uint16 {
	g.ring.Publish()
	var ids []uint16
	for {
		id, _, ok := g.driver.Reap()
		if !ok {
			break
		}
		ids = append(ids, id)
	}
	if err := g.driver.Err(); err != nil {
		g.t.Fatal(err)
	}
	return ids
}

func (g *guest) window() *Window { return NewWindow(g.ring, features, func() {}) }

// pop takes all frames that are available.
func pop(t testing.TB, w *Window) []*Buffer {
	t.Helper()
	batch := make([]*Buffer, 64)
	n, status := w.Pop(batch)
	if status == vring.Broken {
		t.Fatal("ring broken")
	}
	return batch[:n]
}

func content(b *Buffer) []byte { return bytes.Join(b.Frags(), nil) }

func wantContent(t testing.TB, b *Buffer, want []byte) {
	t.Helper()
	if got := content(b); !bytes.Equal(got, want) {
		t.Errorf("frame of %d bytes is not the one of %d bytes that was sent", len(got), len(want))
	}
}

// record collects what callbacks say.
type record struct {
	outcomes []Outcome
	descs    []uint32
}

func (r *record) ubuf(desc uint32) Ubuf {
	return Ubuf{Desc: desc, Arg: r, Callback: func(u *Ubuf, o Outcome) {
		u.Arg.(*record).outcomes = append(r.outcomes, o)
		r.descs = append(r.descs, u.Desc)
	}}
}
