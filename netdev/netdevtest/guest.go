package netdevtest

import (
	"sync"
	"testing"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
	"github.com/vhostd/vhostd/zerocopy"
)

// Guest is one virtqueue with both its ends, over memory of Go's heap, which the race detector sees.
type Guest struct {
	testing.TB
	Driver *vring.Driver
	Ring   *vring.Device

	table  *guestmem.Table
	ram    []byte
	next   int // offset in ram of the memory to give out next
	first  int // where it begins
	hdrLen int
	bufs   map[uint16][]vring.Buf // by id, what was posted
}

const (
	ramBase   = guestmem.GPA(0x4000_0000)
	ramSize   = 8 << 20
	ringBase  = 0xfff0 // indices wrap soon
	partAlign = 4096
)

// NewGuest makes an empty ring of size descriptors for a driver that negotiated f. The guest has the regions of extra beside its own memory.
func NewGuest(t testing.TB, size int, f virtio.Features, extra ...*guestmem.Region) *Guest {
	t.Helper()
	region, err := guestmem.NewHeapRegion(ramBase, 0x7f00_0000_0000, ramSize)
	if err != nil {
		t.Fatal(err)
	}
	table, err := guestmem.NewTable(append(extra, region)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(table.Unpin)
	g := &Guest{TB: t, table: table, ram: region.Bytes(), hdrLen: virtio.NetHdrLen(f), bufs: map[uint16][]vring.Buf{}}
	part := func(n int) []byte {
		b := g.ram[g.next : g.next+n]
		g.next += (n + partAlign - 1) &^ (partAlign - 1)
		return b
	}
	desc, avail, used := part(virtio.DescTableLen(size)), part(virtio.AvailLen(size)), part(virtio.UsedLen(size))
	g.first = g.next
	g.Driver, err = vring.NewDriver(vring.DriverConfig{Size: size, Desc: desc, Avail: avail, Used: used, Features: f, Base: ringBase})
	if err != nil {
		t.Fatal(err)
	}
	g.Ring, err = vring.NewDevice(vring.Config{Size: size, Desc: desc, Avail: avail, Used: used, Features: f, Base: ringBase},
		guestmem.NewView(table, nil))
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// alloc gives out n bytes of guest memory; the oldest comes again when all was given out.
func (g *Guest) alloc(n int) vring.Buf {
	if g.next+n > len(g.ram) {
		g.next = g.first
	}
	b := vring.Buf{GPA: ramBase + guestmem.GPA(g.next), Len: uint32(n)}
	g.next += n
	return b
}

func (g *Guest) mem(b vring.Buf) []byte { return g.table.Slice(b.GPA, uint64(b.Len)) }

// Post makes n chains of writable buffers with these lengths available.
func (g *Guest) Post(n int, lens ...int) {
	g.Helper()
	for range n {
		var bufs []vring.Buf
		for _, l := range lens {
			bufs = append(bufs, g.alloc(l))
		}
		id, err := g.Driver.Add(nil, bufs)
		if err != nil {
			g.Fatal(err)
		}
		g.bufs[id] = bufs
	}
	g.Driver.Publish()
}

// Send makes a frame available, in readable buffers of these lengths, the last of which repeats, and returns the chain's id.
func (g *Guest) Send(hdr virtio.NetHdr, frame []byte, lens ...int) uint16 {
	g.Helper()
	var bytes [virtio.NetHdrSize]byte
	hdr.Encode(bytes[:g.hdrLen])
	rest := append(bytes[:g.hdrLen:g.hdrLen], frame...)
	var bufs []vring.Buf
	for i := 0; len(rest) > 0; i++ {
		n := len(rest)
		if len(lens) > 0 {
			n = min(n, lens[min(i, len(lens)-1)])
		}
		b := g.alloc(n)
		rest = rest[copy(g.mem(b), rest):]
		bufs = append(bufs, b)
	}
	id, err := g.Driver.Add(bufs, nil)
	if err != nil {
		g.Fatal(err)
	}
	g.Driver.Publish()
	return id
}

// Take returns the next frame that the guest received, or nil.
func (g *Guest) Take() (virtio.NetHdr, []byte) {
	g.Helper()
	g.Ring.Publish()
	b := g.chain()
	if b == nil {
		return virtio.NetHdr{}, nil
	}
	hdr := virtio.DecodeNetHdr(b[:g.hdrLen])
	b = b[g.hdrLen:]
	for i := 1; i < int(hdr.NumBuffers); i++ {
		more := g.chain()
		if more == nil {
			g.Fatalf("num_buffers is %d, but %d chains were used", hdr.NumBuffers, i)
		}
		b = append(b, more...)
	}
	return hdr, b
}

func (g *Guest) chain() []byte {
	g.Helper()
	id, n, ok := g.Driver.Reap()
	if !ok {
		if err := g.Driver.Err(); err != nil {
			g.Fatal(err)
		}
		return nil
	}
	out := []byte{}
	for _, b := range g.bufs[id] {
		m := min(n, b.Len)
		out = append(out, g.mem(b)[:m]...)
		n -= m
	}
	if n > 0 {
		g.Fatalf("chain %d: %d bytes more were written than it has", id, n)
	}
	return out
}

// ledger counts the releases of buffers that do not belong to a Window.
type ledger struct {
	mu       sync.Mutex
	released []int
	exempt   map[int]bool // may be never released
	outcomes [zerocopy.NumOutcomes]int
}

// buffer makes a buffer of foreign memory that the ledger watches.
func (l *ledger) buffer(hdr virtio.NetHdr, frags ...[]byte) *zerocopy.Buffer {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := len(l.released)
	l.released = append(l.released, 0)
	return zerocopy.NewUbufBuffer(zerocopy.Ubuf{Desc: uint32(n), Callback: l.release}, hdr, frags...)
}

// doomed is buffer for one that Send may be unwound with: nobody knows then whether it is released.
func (l *ledger) doomed(hdr virtio.NetHdr, frags ...[]byte) *zerocopy.Buffer {
	b := l.buffer(hdr, frags...)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.exempt == nil {
		l.exempt = map[int]bool{}
	}
	l.exempt[int(b.Ubuf().Desc)] = true
	return b
}

func (l *ledger) release(u *zerocopy.Ubuf, o zerocopy.Outcome) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.released[u.Desc]++
	l.outcomes[o]++
}

func (l *ledger) check(t *testing.T) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, n := range l.released {
		if n != 1 && !(n == 0 && l.exempt[i]) {
			t.Errorf("buffer %d of %d was released %d times", i, len(l.released), n)
		}
	}
}
