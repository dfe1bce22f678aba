package tap

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
	"github.com/vhostd/vhostd/zerocopy"
)

// testTimeout is how long a test waits for what must come.
const testTimeout = vhosttest.Patience

// inNetns moves the test to a network namespace of its own. Subtests would run on threads outside of it: a test that calls it has none.
func inNetns(t testing.TB) {
	t.Helper()
	require.Root(t, "tap")
	require.File(t, "tap", sys.TunPath, os.O_RDWR)
	netdevtest.InNamespace(t, "tap")
}

// bothWays runs a test for frames that are written one by one, and for batches of any size.
func bothWays(t *testing.T, test func(t *testing.T, options string)) {
	for _, way := range []string{"off", "on"} {
		t.Run("io-uring="+way, func(t *testing.T) {
			inNetns(t)
			test(t, ",io-uring="+way)
		})
	}
}

// open opens a tap from the form of the command line.
func open(t testing.TB, s string) *Device {
	t.Helper()
	o, err := ParseOptions(s)
	if err != nil {
		t.Fatal(err)
	}
	return openWith(t, o)
}

func openWith(t testing.TB, o Options) *Device {
	t.Helper()
	d, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return d
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// guest is a receiveq with its driver end, over memory of Go's heap.
type guest struct {
	testing.TB
	posted *zerocopy.Posted
	dev    *vring.Device
	drv    *vring.Driver
	hdrLen int
	mem    []byte
	next   int
	bufs   map[uint16][]vring.Buf
}

const (
	guestBase  = guestmem.GPA(0x4000_0000)
	guestUser  = guestmem.UVA(0x7f00_0000_0000)
	guestRings = 1 << 16
	guestSize  = 8 << 20
)

func newGuest(t testing.TB, size int, f virtio.Features) *guest {
	t.Helper()
	region, err := guestmem.NewHeapRegion(guestBase, guestUser, guestSize)
	must(t, err)
	return newGuestIn(t, region, size, f)
}

func newGuestIn(t testing.TB, region *guestmem.Region, size int, f virtio.Features) *guest {
	t.Helper()
	table, err := guestmem.NewTable(region)
	must(t, err)
	t.Cleanup(table.Unpin)
	b := region.Bytes()
	const avail, used = 1 << 15, 1<<15 + 1<<14
	cfg := vring.Config{Size: size, Desc: b[:avail], Avail: b[avail:used], Used: b[used:guestRings], Features: f}
	drv, err := vring.NewDriver(vring.DriverConfig{Size: size, Desc: cfg.Desc, Avail: cfg.Avail, Used: cfg.Used, Features: f})
	must(t, err)
	dev, err := vring.NewDevice(cfg, guestmem.NewView(table, nil))
	must(t, err)
	return &guest{
		TB: t, posted: zerocopy.NewPosted(dev, f), dev: dev, drv: drv, hdrLen: virtio.NetHdrLen(f),
		mem: b, next: guestRings, bufs: map[uint16][]vring.Buf{},
	}
}

// post makes n chains available, each of buffers of these lengths.
func (g *guest) post(n int, lens ...int) {
	g.Helper()
	for range n {
		var bufs []vring.Buf
		for _, l := range lens {
			if g.next+l > len(g.mem) {
				g.next = guestRings
			}
			bufs = append(bufs, vring.Buf{GPA: guestBase + guestmem.GPA(g.next), Len: uint32(l)})
			g.next += l
		}
		id, err := g.drv.Add(nil, bufs)
		must(g, err)
		g.bufs[id] = bufs
	}
	g.drv.Publish()
}

// frame is what the guest received.
type frame struct {
	hdr  virtio.NetHdr
	data []byte
}

// take returns the next frame that the guest was given, or nil.
func (g *guest) take() *frame {
	g.Helper()
	g.dev.Publish()
	b := g.chain()
	if b == nil {
		return nil
	}
	f := &frame{hdr: virtio.DecodeNetHdr(b[:g.hdrLen]), data: b[g.hdrLen:]}
	for i := 1; i < int(f.hdr.NumBuffers); i++ {
		more := g.chain()
		if more == nil {
			g.Fatalf("num_buffers is %d, but only %d chains were used", f.hdr.NumBuffers, i)
		}
		f.data = append(f.data, more...)
	}
	return f
}

func (g *guest) chain() []byte {
	g.Helper()
	id, n, ok := g.drv.Reap()
	if !ok {
		must(g, g.drv.Err())
		return nil
	}
	out := []byte{}
	for _, b := range g.bufs[id] {
		off := int(b.GPA - guestBase)
		out = append(out, g.mem[off:off+min(int(b.Len), int(n))]...)
		n -= min(n, b.Len)
	}
	return out
}

// recv receives one frame, waiting for it.
func (g *guest) recv(q netdev.Queue) *frame {
	g.Helper()
	if f := g.take(); f != nil {
		return f
	}
	for deadline := time.Now().Add(testTimeout); time.Now().Before(deadline); {
		n, idle, err := q.Recv(g.posted, 1)
		must(g, err)
		if f := g.take(); f != nil {
			return f
		}
		if n == 0 && !idle {
			g.Fatal("no frame, and yet the queue is not idle: the guest has posted too little")
		}
		pollFor(g, q.RecvFD(), unix.POLLIN)
	}
	g.Fatal("no frame came")
	return nil
}

func pollFor(t testing.TB, fd int, events int16) {
	t.Helper()
	if !netdevtest.Poll(t, fd, events, testTimeout) {
		t.Fatalf("descriptor %d is not ready after %v", fd, testTimeout)
	}
}

// wire is the other end of the tap.
type wire struct{ *netdevtest.Wire }

func newWire(t testing.TB, name string) wire {
	t.Helper()
	return wire{netdevtest.NewWire(t, name)}
}

// recv returns the next test frame that came out of the tap.
func (w wire) recv() []byte {
	w.Helper()
	return w.Recv(func(b []byte) bool { return binary.BigEndian.Uint16(b[12:]) == netdevtest.EtherType })
}

var (
	guestMAC = net.HardwareAddr{0x52, 0x54, 0, 1, 2, 3}
	hostMAC  = net.HardwareAddr{0x52, 0x54, 0, 9, 8, 7}
)

// testFrame is an Ethernet frame of n bytes that no other seed gives.
func testFrame(n int, seed uint32) []byte {
	b := netdevtest.Frame(n, seed)
	copy(b, hostMAC)
	copy(b[6:], guestMAC)
	return b
}

func wantFrame(t testing.TB, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Fatalf("got a frame of %d bytes, want another one of %d\n got %.64x\nwant %.64x", len(got), len(want), got, want)
	}
}

// buffers makes a transmit batch of private memory that counts its releases.
type buffers struct {
	bufs     []*zerocopy.Buffer
	outcomes []zerocopy.Outcome
}

func (b *buffers) add(hdr virtio.NetHdr, frags ...[]byte) {
	u := zerocopy.Ubuf{Callback: func(_ *zerocopy.Ubuf, o zerocopy.Outcome) { b.outcomes = append(b.outcomes, o) }}
	b.bufs = append(b.bufs, zerocopy.NewUbufBuffer(u, hdr, frags...))
}

// sendAll sends and checks that all were taken and released.
func (b *buffers) sendAll(t testing.TB, q netdev.Queue, want ...zerocopy.Outcome) {
	t.Helper()
	if n := q.Send(b.bufs); n != len(b.bufs) {
		t.Fatalf("Send took %d of %d", n, len(b.bufs))
	}
	if got := fmt.Sprint(b.outcomes); got != fmt.Sprint(want) {
		t.Fatalf("released as %v, want %v", got, want)
	}
	*b = buffers{}
}

// Feature sets of the tests' guests.
const (
	plain     = virtio.FVersion1
	mergeable = virtio.FVersion1 | virtio.FNetMrgRxbuf
	legacy    = virtio.Features(0)
	largeRecv = virtio.FNetGuestCsum | virtio.FNetGuestTSO4 | virtio.FNetGuestTSO6 | virtio.FNetGuestECN
)

// negotiate tells the device what the guest's features make it take.
func negotiate(t testing.TB, d *Device, f virtio.Features) {
	t.Helper()
	must(t, d.SetOffloads(offload.ToGuest(f)))
}

func skipTap(t testing.TB, format string, args ...any) {
	t.Helper()
	require.Skip(t, "tap", format, args...)
}

// openMacvtapOrSkip skips the test where another namespace's interface has the node, which is named by nothing but an index.
func openMacvtapOrSkip(t testing.TB, s string) *Device {
	t.Helper()
	o, err := ParseOptions(s)
	must(t, err)
	d, err := Open(o)
	if err != nil && strings.Contains(err.Error(), "in another network namespace") {
		skipTap(t, "%v", err)
	}
	must(t, err)
	t.Cleanup(func() { d.Close() })
	return d
}
