package tap

import (
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

func TestSend(t *testing.T) { bothWays(t, testSend) }

func testSend(t *testing.T, options string) {
	d := open(t, "tap:t0,mtu=65521"+options)
	w := newWire(t, "t0")
	for i, n := range []int{14, 60, 1514, 9014, 65535} {
		want := testFrame(n, uint32(i))
		var b buffers
		b.add(virtio.NetHdr{}, want)
		b.add(virtio.NetHdr{}, want[:1], want[1:13], want[13:])
		b.sendAll(t, d.Queue(0), zerocopy.Copied, zerocopy.Copied)
		wantFrame(t, w.recv(), want)
		wantFrame(t, w.recv(), want)
	}
}

// TestSendManyFragments: the kernel takes 1024 pieces in one call.
func TestSendManyFragments(t *testing.T) { bothWays(t, testSendManyFragments) }

func testSendManyFragments(t *testing.T, options string) {
	d := open(t, "tap:t0,mtu=9000"+options)
	w := newWire(t, "t0")
	for _, n := range []int{maxFrags - 1, maxFrags, maxFrags + 1, 9014} {
		want := testFrame(n, uint32(n))
		frags := make([][]byte, n)
		for i := range frags {
			frags[i] = want[i : i+1]
		}
		var b buffers
		b.add(virtio.NetHdr{}, frags...)
		b.sendAll(t, d.Queue(0), zerocopy.Copied)
		wantFrame(t, w.recv(), want)
		for range 4 {
			b.add(virtio.NetHdr{}, frags...)
		}
		b.sendAll(t, d.Queue(0), zerocopy.Copied, zerocopy.Copied, zerocopy.Copied, zerocopy.Copied)
		for range 4 {
			wantFrame(t, w.recv(), want)
		}
	}
}

// TestSendRefused: a frame that the kernel refuses is dropped and counted, and the others of its batch go out.
func TestSendRefused(t *testing.T) { bothWays(t, testSendRefused) }

func testSendRefused(t *testing.T, options string) {
	d := open(t, "tap:t0"+options)
	w := newWire(t, "t0")
	good := [][]byte{testFrame(100, 1), testFrame(200, 2), testFrame(300, 3)}
	bad := virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, CsumStart: 5000, CsumOffset: 16}
	var b buffers
	b.add(virtio.NetHdr{}, good[0])
	b.add(bad, good[0])
	b.add(virtio.NetHdr{GSOType: 77, GSOSize: 1000}, good[0])
	b.add(virtio.NetHdr{}, good[1])
	b.add(virtio.NetHdr{}, good[2])
	b.sendAll(t, d.Queue(0), zerocopy.Copied, zerocopy.Dropped, zerocopy.Dropped, zerocopy.Copied, zerocopy.Copied)
	for _, want := range good {
		wantFrame(t, w.recv(), want)
	}
	if got := d.Queue(0).Counters().SendDropped; got != 2 {
		t.Errorf("SendDropped is %d, want 2", got)
	}
}

// TestSendMissingPage: pages that are no longer there cost their own frame only.
func TestSendMissingPage(t *testing.T) { bothWays(t, testSendMissingPage) }

func testSendMissingPage(t *testing.T, options string) {
	d := open(t, "tap:t0"+options)
	w := newWire(t, "t0")
	hole, err := unix.Mmap(-1, 0, 4096, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON)
	must(t, err)
	defer unix.Munmap(hole)
	want := testFrame(100, 1)
	var b buffers
	b.add(virtio.NetHdr{}, want[:60], hole[:40])
	b.add(virtio.NetHdr{}, want)
	b.sendAll(t, d.Queue(0), zerocopy.Dropped, zerocopy.Copied)
	wantFrame(t, w.recv(), want)
}

// TestSendHeaderIsSane: a driver's header that says what a driver may not say, or whose hint is nonsense, costs it no frame.
func TestSendHeaderIsSane(t *testing.T) { bothWays(t, testSendHeaderIsSane) }

func testSendHeaderIsSane(t *testing.T, options string) {
	d := open(t, "tap:t0"+options)
	w := newWire(t, "t0")
	want := testFrame(100, 1)
	var b buffers
	b.add(virtio.NetHdr{Flags: 0xfe, HdrLen: 65535, NumBuffers: 9}, want)
	b.sendAll(t, d.Queue(0), zerocopy.Copied)
	wantFrame(t, w.recv(), want)
}

// TestSendDown: an interface that is down, and one that is gone, drop frames.
func TestSendDown(t *testing.T) { bothWays(t, testSendDown) }

func testSendDown(t *testing.T, options string) {
	d := open(t, "tap:t0,up=off"+options)
	var b buffers
	b.add(virtio.NetHdr{}, testFrame(100, 1))
	b.add(virtio.NetHdr{}, testFrame(100, 2))
	b.sendAll(t, d.Queue(0), zerocopy.Dropped, zerocopy.Dropped)
	must(t, netlink.LinkDel(netdevtest.Link(t, "t0")))
	b.add(virtio.NetHdr{}, testFrame(100, 3))
	b.sendAll(t, d.Queue(0), zerocopy.Dropped)
	if got := d.Queue(0).Counters().SendDropped; got != 3 {
		t.Errorf("SendDropped is %d, want 3", got)
	}
	g := newGuest(t, 8, plain)
	g.post(1, 2048)
	if _, _, err := d.Queue(0).Recv(g.posted, 1); err == nil {
		t.Error("Recv from an interface that is gone succeeds")
	}
}
