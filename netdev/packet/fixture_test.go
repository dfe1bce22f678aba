package packet

import (
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

func TestMain(m *testing.M) { vhosttest.Main(m) }

const (
	part        = "netns"
	testTimeout = vhosttest.Patience
	devName     = "pk0" // the device's interface, in the tests' namespace
	farName     = "pk1" // the other end of its wire
	testMTU     = 9000
)

// inNetns moves the test to a network namespace of its own, in which the kernel sends nothing by itself, and makes a veth pair there.
func inNetns(t testing.TB) {
	t.Helper()
	netdevtest.InNamespace(t, part)
	makeVeth(t)
}

func makeVeth(t testing.TB) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = devName, testMTU
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: farName, PeerMTU: testMTU}))
	must(t, netlink.LinkSetUp(netdevtest.Link(t, devName)))
	must(t, netlink.LinkSetUp(netdevtest.Link(t, farName)))
	netdevtest.AwaitRunning(t, devName)
	netdevtest.AwaitRunning(t, farName)
}

func open(t testing.TB, spec string) *Device {
	t.Helper()
	o, err := ParseOptions(spec)
	must(t, err)
	d, err := Open(o)
	must(t, err)
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

// newWire opens an ordinary packet socket at the far end, with virtio-net headers.
func newWire(t testing.TB) *netdevtest.Wire {
	t.Helper()
	w := netdevtest.NewWire(t, farName)
	w.Set(unix.PACKET_VNET_HDR, 1)
	return w
}

// guest is a receiveq behind a queue pair.
type guest struct {
	*netdevtest.Guest
	posted *zerocopy.Posted
	q      netdev.Queue
}

const (
	plain     = virtio.FVersion1 | virtio.FNetMrgRxbuf
	largeRecv = plain | virtio.FNetGuestCsum | virtio.FNetGuestTSO4 | virtio.FNetGuestTSO6 | virtio.FNetGuestECN
)

func newGuest(t testing.TB, d *Device, pair int, f virtio.Features) *guest {
	t.Helper()
	must(t, d.SetOffloads(offload.ToGuest(f)))
	g := netdevtest.NewGuest(t, 256, f)
	return &guest{g, zerocopy.NewPosted(g.Ring, f), d.Queue(pair)}
}

// take returns a frame that has come already, or nil.
func (g *guest) take() (virtio.NetHdr, []byte) {
	g.Helper()
	if hdr, b := g.Take(); b != nil {
		return hdr, b
	}
	for g.Driver.Free() > 16 {
		g.Post(1, 4096)
	}
	if _, _, err := g.q.Recv(g.posted, 1); err != nil {
		g.Fatal(err)
	}
	return g.Take()
}

// recv waits for the next frame.
func (g *guest) recv() (virtio.NetHdr, []byte) {
	g.Helper()
	for deadline := time.Now().Add(testTimeout); time.Now().Before(deadline); {
		if hdr, b := g.take(); b != nil {
			return hdr, b
		}
		netdevtest.Poll(g, g.q.RecvFD(), unix.POLLIN, 100*time.Millisecond)
	}
	g.Fatal("no frame came")
	return virtio.NetHdr{}, nil
}

// sent is a batch of frames, with what became of them.
type sent struct {
	bufs     []*zerocopy.Buffer
	outcomes []zerocopy.Outcome
}

func (s *sent) add(hdr virtio.NetHdr, frags ...[]byte) {
	u := zerocopy.Ubuf{Callback: func(_ *zerocopy.Ubuf, o zerocopy.Outcome) { s.outcomes = append(s.outcomes, o) }}
	s.bufs = append(s.bufs, zerocopy.NewUbufBuffer(u, hdr, frags...))
}
