package packet

import (
	"encoding/binary"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	part        = "netns"
	testTimeout = 20 * time.Second
	devName     = "pk0" // the device's interface, in the tests' namespace
	farName     = "pk1" // the other end of its wire
	testMTU     = 9000
)

// inNetns moves the test to a network namespace of its own, in which the kernel sends nothing by itself, and makes a veth pair there.
func inNetns(t testing.TB) {
	t.Helper()
	require.Root(t, part)
	runtime.LockOSThread()
	old, err := netns.Get()
	must(t, err)
	own, err := netns.New()
	if err != nil {
		require.Skip(t, part, "a network namespace cannot be made: %v", err)
	}
	own.Close()
	t.Cleanup(func() {
		if err := netns.Set(old); err != nil {
			t.Errorf("back to the old namespace: %v", err)
			return // and the thread stays locked, and ends with the test
		}
		old.Close()
		runtime.UnlockOSThread()
	})
	must(t, netlink.LinkSetUp(linkByName(t, "lo")))
	// Missing in a kernel without IPv6: then there is nothing to turn off.
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0)
	makeVeth(t)
}

func makeVeth(t testing.TB) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = devName, testMTU
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: farName, PeerMTU: testMTU}))
	must(t, netlink.LinkSetUp(linkByName(t, devName)))
	must(t, netlink.LinkSetUp(linkByName(t, farName)))
	awaitRunning(t, devName)
	awaitRunning(t, farName)
}

// awaitRunning waits until the interface has its carrier: what is sent before goes nowhere.
func awaitRunning(t testing.TB, name string) {
	t.Helper()
	for deadline := time.Now().Add(testTimeout); linkByName(t, name).Attrs().OperState != netlink.OperUp; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s has no carrier", name)
		}
	}
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

func linkByName(t testing.TB, name string) netlink.Link {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return link
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wire is an ordinary packet socket at the far end, with virtio-net headers.
type wire struct {
	testing.TB
	fd int
}

func newWire(t testing.TB) *wire {
	t.Helper()
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	w := &wire{t, fd}
	t.Cleanup(w.close)
	must(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20))
	must(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 16<<20))
	must(t, unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1))
	must(t, unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1))
	must(t, sys.PacketBind(fd, linkByName(t, farName).Attrs().Index))
	tv := unix.NsecToTimeval(testTimeout.Nanoseconds())
	must(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	return w
}

func (w *wire) close() {
	if w.fd >= 0 {
		unix.Close(w.fd)
		w.fd = -1
	}
}

// inject sends a complete frame to the device.
func (w *wire) inject(frame []byte) { w.Helper(); w.send(virtio.NetHdr{}, frame) }

func (w *wire) send(hdr virtio.NetHdr, frame []byte) {
	w.Helper()
	b := make([]byte, virtio.NetHdrSizeLegacy, virtio.NetHdrSizeLegacy+len(frame))
	hdr.Encode(b)
	if _, err := unix.Write(w.fd, append(b, frame...)); err != nil {
		w.Fatalf("sending %d bytes: %v", len(frame), err)
	}
}

// capture returns the next frame of a test's, with what is left to do for it.
func (w *wire) capture() (virtio.NetHdr, []byte) {
	w.Helper()
	b := make([]byte, 1<<17)
	for {
		n, err := unix.Read(w.fd, b)
		if err == unix.EINVAL {
			continue // a frame that lied, of a kind for which the socket has no header
		}
		must(w, err)
		hdr, f := virtio.DecodeNetHdr(b[:virtio.NetHdrSizeLegacy]), b[virtio.NetHdrSizeLegacy:n]
		switch binary.BigEndian.Uint16(f[12:]) {
		case netdevtest.EtherType, unix.ETH_P_IP, unix.ETH_P_IPV6:
			if hdr.Flags&virtio.NetHdrNeedsCsum == 0 {
				hdr = virtio.NetHdr{}
			}
			return hdr, f
		}
	}
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
		poll(g, g.q.RecvFD(), unix.POLLIN, 100*time.Millisecond)
	}
	g.Fatal("no frame came")
	return virtio.NetHdr{}, nil
}

// poll waits for events, and tells whether something came.
func poll(t testing.TB, fd int, events int16, limit time.Duration) bool {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for end := time.Now().Add(limit); ; {
		n, err := unix.Poll(fds, int(max(time.Until(end), 0).Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		must(t, err)
		return n > 0
	}
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
