//go:build linux

package fault

import (
	"errors"
	"fmt"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/sysfault"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/virtio"
)

// failing are calls of a device, and how they may fail.
type failing struct {
	call   int
	name   string
	file   string
	errnos []syscall.Errno
	once   bool // the device does without after the first failure, so each needs a daemon of its own
}

// What any send or receive may answer: no memory, no room, a signal, a filter of the host's, and a device that is not well.
var (
	sends    = []syscall.Errno{unix.EAGAIN, unix.EINTR, unix.ENOBUFS, unix.ENOMEM, unix.EPERM, unix.EIO, unix.EFAULT}
	datagram = append([]syscall.Errno{unix.ECONNREFUSED, unix.ENETUNREACH, unix.EHOSTUNREACH}, sends...)
	receives = []syscall.Errno{unix.EINTR, unix.ENOBUFS, unix.ENOMEM}
	submits  = []syscall.Errno{unix.EAGAIN, unix.EBUSY, unix.EINTR, unix.ENOMEM}
)

func TestTap(t *testing.T) {
	bridge := func() error {
		off := false // a bridge that snoops sends frames of its own
		return add(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}, MulticastSnooping: &off})
	}
	device(t, "tap:t0,bridge=br0", "tap:t1,bridge=br0", bridge, failing{unix.SYS_IO_URING_ENTER, "io_uring_enter", "io_uring", submits, true})
	device(t, "tap:t0,bridge=br0,io-uring=off", "tap:t1,bridge=br0", bridge,
		failing{unix.SYS_WRITEV, "writev", "/dev/net/tun", sends, false},
		failing{unix.SYS_READV, "readv", "/dev/net/tun", receives, false})
}

func TestPacket(t *testing.T) {
	device(t, "packet:v0", "packet:v1", cable, failing{unix.SYS_SENDTO, "sendto", "socket", sends, false})
}

func TestXDP(t *testing.T) {
	device(t, "xdp:v0", "xdp:v1", cable, failing{unix.SYS_SENDTO, "sendto", "socket", sends, false})
}

func TestDatagrams(t *testing.T) {
	device(t, "dgram:local=127.0.0.1:7001,remote=127.0.0.1:7002", "dgram:local=127.0.0.1:7002,remote=127.0.0.1:7001", nothing,
		failing{unix.SYS_SENDMMSG, "sendmmsg", "socket", datagram, false},
		failing{unix.SYS_RECVMMSG, "recvmmsg", "socket", receives, false})
}

// Frames that leave from the guest's pages are sent through a ring.
func TestDatagramsByPage(t *testing.T) {
	device(t, "dgram:local=127.0.0.1:7001,remote=127.0.0.1:7002,zerocopy=on", "dgram:local=127.0.0.1:7002,remote=127.0.0.1:7001", nothing,
		failing{unix.SYS_IO_URING_ENTER, "io_uring_enter", "io_uring", submits, true})
}

func nothing() error { return nil }

// add makes an interface and sets it up.
func add(l netlink.Link) error {
	if err := netlink.LinkAdd(l); err != nil {
		return fmt.Errorf("%s: %w", l.Attrs().Name, err)
	}
	return netlink.LinkSetUp(l)
}

// cable joins v0 and v1.
func cable() error {
	if err := add(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v0"}, PeerName: "v1"}); err != nil {
		return err
	}
	peer, err := netlink.LinkByName("v1")
	if err != nil {
		return err
	}
	if out, err := exec.Command("ethtool", "-K", "v1", "tx", "off").CombinedOutput(); err != nil {
		return fmt.Errorf("ethtool: %w: %s", err, out)
	}
	return netlink.LinkSetUp(peer)
}

// device tries all cases of a network, one after the other, with the same daemon where it goes on to make the calls.
func device(t *testing.T, net, peer string, lay func() error, cases ...failing) {
	t.Helper()
	require.NotShort(t)
	var shared *rig
	for _, c := range cases {
		for _, errno := range c.errnos {
			r := shared
			if r == nil && !c.once {
				shared = networkRig(t, net, peer, lay, cases)
				r = shared
			}
			t.Run(fmt.Sprintf("%s %s", c.name, unix.ErrnoName(errno)), func(t *testing.T) {
				if c.once {
					r = networkRig(t, net, peer, lay, cases)
				}
				r.strike(t, sysfault.Rule{Call: c.call, File: c.file, Skip: 2, Count: 9, Errno: errno})
			})
		}
	}
}

// networkRig is a rig in a namespace of its own.
func networkRig(t *testing.T, net, peer string, lay func() error, cases []failing) *rig {
	t.Helper()
	require.Root(t, part)
	ns, err := netlab.New()
	if err != nil {
		require.Skip(t, part, "%v", err)
	}
	t.Cleanup(ns.Close)
	if err := ns.Do(lay); err != nil {
		t.Fatal(err)
	}
	var calls []int
	for _, c := range cases {
		calls = append(calls, c.call)
	}
	r := newRig(t, ns, calls, net, peer)
	r.works()
	return r
}

// strike has calls fail while frames go both ways, and then looks whether all is well.
func (r *rig) strike(t *testing.T, rule sysfault.Rule) {
	defer func(outer *testing.T) { r.t = outer }(r.t)
	r.t = t
	r.in.Set(rule)
	for i := 0; i < 400 && r.in.Hits() < rule.Count; i++ {
		r.send(t, r.guest, 0, 16)
		r.send(t, r.peer, 1, 16)
		r.drain(t, r.guest)
		r.drain(t, r.peer)
		r.alive()
	}
	if r.in.Hits() == 0 {
		t.Errorf("no call failed: vhostd makes none of these")
	}
	r.in.Set()
	for _, g := range []*vhosttest.Guest{r.guest, r.peer} {
		if err := g.Transmitq(0).Settle(); err != nil {
			t.Errorf("chains did not come back: %v", err)
		}
	}
	r.works()
	r.goesOn()
}

// send sends n frames.
func (r *rig) send(t *testing.T, g *vhosttest.Guest, way, n int) {
	t.Helper()
	for range n {
		r.seq[way]++
		if err := g.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(way)<<60|r.seq[way], 200), nil); err != nil {
			t.Fatal(err)
		}
	}
}

// drain takes what there is.
func (r *rig) drain(t *testing.T, g *vhosttest.Guest) {
	t.Helper()
	for {
		_, f, err := g.Recv(0, time.Millisecond)
		if errors.Is(err, vhosttest.ErrTimeout) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		r.look(t, f)
	}
}

// look checks a frame that may be one of ours, and returns its number.
func (r *rig) look(t *testing.T, f []byte) (seq uint64, ours bool) {
	t.Helper()
	if len(f) < vhosttest.MinFrame || f[12] != 0x88 || f[13] != 0xb5 {
		return 0, false // the host's own
	}
	seq, err := vhosttest.CheckFrame(f)
	if err != nil {
		t.Errorf("a frame arrives changed: %v", err)
	}
	return seq, true
}

// works waits until a frame gets through each way: an interface may want a moment, but what is sent from then on arrives, all of it.
func (r *rig) works() {
	r.t.Helper()
	for way, g := range []*vhosttest.Guest{r.guest, r.peer} {
		to := []*vhosttest.Guest{r.peer, r.guest}[way]
		vhosttest.Eventually(r.t, fmt.Sprintf("a frame gets through (way %d)", way), func() bool {
			r.alive()
			return r.ping(g, to, way)
		})
		for range 50 {
			if !r.ping(g, to, way) {
				r.t.Errorf("frame %d is lost (way %d)", r.seq[way], way)
			}
		}
	}
}

// ping sends a frame and waits for its arrival.
func (r *rig) ping(from, to *vhosttest.Guest, way int) bool {
	r.t.Helper()
	r.send(r.t, from, way, 1)
	want := uint64(way)<<60 | r.seq[way]
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		_, f, err := to.Recv(0, 2*time.Second)
		if errors.Is(err, vhosttest.ErrTimeout) {
			return false
		}
		if err != nil {
			r.t.Fatal(err)
		}
		if seq, ours := r.look(r.t, f); ours && seq == want {
			return true
		}
	}
	return false
}
