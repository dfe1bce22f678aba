package l2switch_test

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/l2switch"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
	"github.com/vhostd/vhostd/zerocopy"
)

// station is one queue of a guest, both ends, in the heap: buffers of one length, each in one descriptor, used in turn.
type station struct {
	driver *vring.Driver
	ring   *vring.Device
	mem    []byte
	bufs   []vring.Buf
	free   []uint16
	slotOf [benchRing]uint16
}

const benchRing = 256

func newStation(b testing.TB, size int) *station {
	b.Helper()
	const rings = 64 << 10
	region, err := guestmem.NewHeapRegion(0, 1<<40, rings+benchRing*size)
	if err != nil {
		b.Fatal(err)
	}
	table, err := guestmem.NewTable(region)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(table.Unpin)
	st := &station{mem: region.Bytes()}
	desc, avail, used := st.mem[:4096], st.mem[4096:8192], st.mem[8192:16384]
	if st.driver, err = vring.NewDriver(vring.DriverConfig{Size: benchRing, Desc: desc, Avail: avail, Used: used, Features: benchFeatures}); err != nil {
		b.Fatal(err)
	}
	cfg := vring.Config{Size: benchRing, Desc: desc, Avail: avail, Used: used, Features: benchFeatures}
	if st.ring, err = vring.NewDevice(cfg, guestmem.NewView(table, nil)); err != nil {
		b.Fatal(err)
	}
	for i := range benchRing {
		st.bufs = append(st.bufs, vring.Buf{GPA: guestmem.GPA(rings + i*size), Len: uint32(size)})
		st.free = append(st.free, uint16(i))
	}
	return st
}

const benchFeatures = virtio.FVersion1 | virtio.FNetMrgRxbuf | virtio.FEventIdx

// add makes all free buffers available, with n bytes each.
func (st *station) add(b testing.TB, n int, send bool) {
	for _, s := range st.free {
		buf := []vring.Buf{{GPA: st.bufs[s].GPA, Len: uint32(n)}}
		var id uint16
		var err error
		if send {
			id, err = st.driver.Add(buf, nil)
		} else {
			id, err = st.driver.Add(nil, buf)
		}
		if err != nil {
			b.Fatal(err)
		}
		st.slotOf[id] = s
	}
	st.free = st.free[:0]
	st.driver.Publish()
}

func (st *station) reap() {
	for {
		id, _, ok := st.driver.Reap()
		if !ok {
			return
		}
		st.free = append(st.free, st.slotOf[id])
	}
}

// door is a receiveq that nobody else works on.
type door struct {
	p    *zerocopy.Posted
	ring *vring.Device
}

func (d *door) Try(w netdev.Deliverer) netdev.DoorState {
	w.Deliver(d.p)
	d.ring.Publish()
	return netdev.DoorOpen
}

func (d *door) Wake() {}

// cable is a guest that sends to another through a switch, all on one thread.
type cable struct {
	from, to *station
	w        *zerocopy.Window
	q        netdev.Queue
	size     int
	batch    [64]*zerocopy.Buffer
}

// newCable makes one between two new ports of s, from station n to the next, in a VLAN of their own.
func newCable(b testing.TB, s *l2switch.Switch, n, size int, guard l2switch.Guard) *cable {
	b.Helper()
	c := &cable{from: newStation(b, size+64), to: newStation(b, max(size+64, 2048)), size: size}
	vlan := l2switch.VLAN{Access: uint16(n)}
	src := addPort(b, s, l2switch.PortConfig{Name: fmt.Sprint(n), Guard: guard, VLAN: vlan})
	dst := addPort(b, s, l2switch.PortConfig{Name: fmt.Sprint(n + 1), VLAN: vlan})
	c.q = src.Queue(0)
	c.w = zerocopy.NewWindow(c.from.ring, benchFeatures, func() {})
	dst.Queue(0).(netdev.Doorway).SetDoor(&door{p: zerocopy.NewPosted(c.to.ring, benchFeatures), ring: c.to.ring})
	dst.Queue(0).Send([]*zerocopy.Buffer{zerocopy.NewBuffer(virtio.NetHdr{}, ether(everybody, mac(n+1), tIPv4))})
	for _, buf := range c.from.bufs {
		f := ether(mac(n+1), mac(n), tIPv4, ip4("192.0.2.1", "192.0.2.2", pUDP, 0, udp(1, 2)...))
		copy(c.from.mem[int(buf.GPA)+virtio.NetHdrSize:], f)
	}
	return c
}

// lap sends a ring full of frames.
func (c *cable) lap(b testing.TB) {
	c.to.add(b, int(c.to.bufs[0].Len), false)
	c.from.add(b, c.size+virtio.NetHdrSize, true)
	for {
		n, _ := c.w.Pop(c.batch[:])
		if n == 0 {
			break
		}
		c.q.Send(c.batch[:n])
		c.q.Reap()
		c.w.Reap()
		c.from.ring.Publish()
	}
	c.from.reap()
	c.to.reap()
	if len(c.from.free) != benchRing || len(c.to.free) != benchRing {
		b.Fatalf("%d of %d chains are back, %d frames have come", len(c.from.free), benchRing, len(c.to.free))
	}
}

// BenchmarkGuestToGuest is a frame's way from one driver to the other, both drivers included, which are about half of it at 64 bytes.
func BenchmarkGuestToGuest(b *testing.B) {
	for _, size := range []int{64, 1518, 65535} {
		for name, g := range map[string]l2switch.Guard{"plain": {}, "guarded": {MACs: []l2switch.MAC{mac(1)}, NoDHCPServer: true}} {
			b.Run(fmt.Sprintf("size=%d/%s", size, name), func(b *testing.B) {
				c := newCable(b, newSwitch(b, l2switch.Config{}), 1, size, g)
				c.lap(b)
				b.ReportAllocs()
				b.ResetTimer()
				for n := 0; n < b.N; n += benchRing {
					c.lap(b)
				}
			})
		}
	}
}

// BenchmarkKnownBesideInvented is a known guest's frames beside another guest, who sends as fast as it can on a processor of its own. "slowdown" is how long they take when the
// other has a new source address in each frame, by how long they take when it keeps to one. Both take turns, since other work on the machine comes and goes.
//
//	go test -run '^$' -bench KnownBesideInvented -count 10 ./netdev/l2switch
func BenchmarkKnownBesideInvented(b *testing.B) {
	s := newSwitch(b, l2switch.Config{})
	known, other := newCable(b, s, 1, 64, l2switch.Guard{}), newCable(b, s, 3, 64, l2switch.Guard{})
	var invents, ends atomic.Bool
	done := make(chan int)
	go func() {
		runtime.LockOSThread()
		defer close(done)
		for n := uint32(1 << 24); !ends.Load(); { // stations that there are have lower numbers
			for _, buf := range other.from.bufs {
				if invents.Load() {
					n++
				}
				binary.BigEndian.PutUint32(other.from.mem[int(buf.GPA)+virtio.NetHdrSize+8:], n)
			}
			other.lap(b)
		}
	}()
	const turn = 100 // laps
	var took [2][]time.Duration
	for n := 0; n < b.N || len(took[1]) == 0; n += 2 * turn * benchRing {
		for side := range took {
			invents.Store(side == 1)
			known.lap(b)
			from := time.Now()
			for range turn {
				known.lap(b)
			}
			took[side] = append(took[side], time.Since(from))
		}
	}
	ends.Store(true)
	<-done
	slices.Sort(took[0])
	slices.Sort(took[1])
	fixed, invented := took[0][len(took[0])/2], took[1][len(took[1])/2]
	b.ReportMetric(float64(invented)/float64(turn*benchRing), "ns/frame")
	b.ReportMetric(float64(invented)/float64(fixed), "slowdown")
	st := s.Stats()
	b.ReportMetric(float64(st.Addresses), "addresses")
	if refused := st.Ports[2].NotLearned; st.Addresses > 4+l2switch.DefaultPortAddresses || b.N > 1 && refused == 0 {
		b.Fatalf("%d addresses are learned, %d were not", st.Addresses, refused)
	}
}

// TestDeliveryAllocatesNothing: a frame that goes straight to its guest takes no memory.
func TestDeliveryAllocatesNothing(t *testing.T) {
	for _, g := range []l2switch.Guard{{}, {MACs: []l2switch.MAC{mac(1)}, NoDHCPServer: true}} {
		c := newCable(t, newSwitch(t, l2switch.Config{}), 1, 1000, g)
		c.lap(t)
		if n := testing.AllocsPerRun(10, func() { c.lap(t) }); n != 0 {
			t.Errorf("%v allocations for %d frames, guard %+v", n, benchRing, g)
		}
	}
}
