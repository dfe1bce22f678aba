package tap

import (
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

func TestSend(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0,mtu=65521")
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
func TestSendManyFragments(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0,mtu=9000")
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
	}
}

// TestSendRefused: a frame that the kernel refuses is dropped and counted, and the others of its batch go out.
func TestSendRefused(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0")
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
func TestSendMissingPage(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0")
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
func TestSendHeaderIsSane(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0")
	w := newWire(t, "t0")
	want := testFrame(100, 1)
	var b buffers
	b.add(virtio.NetHdr{Flags: 0xfe, HdrLen: 65535, NumBuffers: 9}, want)
	b.sendAll(t, d.Queue(0), zerocopy.Copied)
	wantFrame(t, w.recv(), want)
}

// TestSendDown: an interface that is down, and one that is gone, drop frames.
func TestSendDown(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0,up=off")
	var b buffers
	b.add(virtio.NetHdr{}, testFrame(100, 1))
	b.add(virtio.NetHdr{}, testFrame(100, 2))
	b.sendAll(t, d.Queue(0), zerocopy.Dropped, zerocopy.Dropped)
	must(t, netlink.LinkDel(linkByName(t, "t0")))
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

// TestSendFull: with the socket buffer full, Send takes what goes and the rest later.
func TestSendFull(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0")
	// Frames pile up behind a token bucket, charged to the tap's socket until they leave.
	must(t, unix.IoctlSetPointerInt(d.queues[0].fd, unix.TUNSETSNDBUF, 20000))
	link := linkByName(t, "t0")
	snoop := false // a snooping bridge sends frames of its own
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}, MulticastSnooping: &snoop}
	must(t, netlink.LinkAdd(bridge))
	must(t, netlink.LinkSetUp(bridge))
	must(t, netlink.LinkSetMaster(link, bridge))
	sink := open(t, "tap:t1,bridge=br0")
	must(t, netlink.QdiscReplace(&netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: linkByName(t, "t1").Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       200_000, Limit: 1 << 20, Buffer: netlink.Xmittime(200_000, 3000),
	}))
	g := newGuest(t, 256, plain)
	var b buffers
	const frames = 60
	for i := range frames {
		b.add(virtio.NetHdr{}, testFrame(1014, uint32(i)))
	}
	q, got, full := d.Queue(0), 0, false
	for left := b.bufs; len(left) > 0 || got < frames; {
		n := q.Send(left)
		full = full || n < len(left)
		left = left[n:]
		g.post(1, 2048)
		wantFrame(t, g.recv(sink.Queue(0)).data, testFrame(1014, uint32(got)))
		got++
		if n == 0 && len(left) > 0 {
			pollFor(t, q.SendFD(), unix.POLLOUT)
		}
	}
	if !full {
		t.Error("Send took all at once: the test does not fill the socket buffer")
	}
	if len(b.outcomes) != frames {
		t.Errorf("%d releases for %d frames", len(b.outcomes), frames)
	}
}
