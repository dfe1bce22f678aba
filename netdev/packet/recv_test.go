package packet

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// udpFrame is an IPv4 UDP frame with n bytes of payload, as a driver hands it over: its checksum is the pseudo-header's. A tag of
// 4 bytes may stand behind the addresses.
func udpFrame(n int, port uint16, tag ...byte) (virtio.NetHdr, []byte) {
	f := netdevtest.Frame(42+n, uint32(n))
	be := binary.BigEndian
	be.PutUint16(f[12:], unix.ETH_P_IP)
	clear(f[14:42])
	f[14], f[22], f[23] = 0x45, 64, unix.IPPROTO_UDP
	be.PutUint16(f[16:], uint16(28+n))
	copy(f[26:], []byte{198, 18, 0, 1, 198, 18, 0, 2})
	be.PutUint16(f[34:], port)
	be.PutUint16(f[36:], 9)
	be.PutUint16(f[38:], uint16(8+n))
	sum := uint32(198<<8+18)*2 + 1 + 2 + unix.IPPROTO_UDP + uint32(8+n)
	be.PutUint16(f[40:], uint16(sum>>16+sum&0xffff))
	f = append(append(append([]byte(nil), f[:12]...), tag...), f[12:]...)
	start := uint16(34 + len(tag))
	return virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, HdrLen: start + 8, CsumStart: start, CsumOffset: 6}, f
}

var tag = []byte{0x81, 0x00, 0x60, 0x2a} // VLAN 42, priority 3

// TestRecvVLAN: the tag that the kernel takes out is back, and the offsets in the header move with it.
func TestRecvVLAN(t *testing.T) {
	inNetns(t)
	d := open(t, "packet:"+devName)
	w := newWire(t)
	for _, f := range []virtio.Features{plain, largeRecv} {
		g := newGuest(t, d, 0, f)
		for _, n := range []int{20, 1000, 8900} {
			hdr, frame := udpFrame(n, 1, tag...)
			w.SendHdr(hdr, frame)
			got, b := g.recv()
			if f == plain {
				if got.Flags != 0 || len(b) != len(frame) || !bytes.Equal(b[:40], frame[:40]) || !bytes.Equal(b[46:], frame[46:]) {
					t.Errorf("%d bytes arrive as %d with %+v: %.60x", len(frame), len(b), got, b)
				}
				continue
			}
			if !bytes.Equal(b, frame) || got.Flags != virtio.NetHdrNeedsCsum || got.CsumStart != 38 || got.CsumOffset != 6 {
				t.Errorf("%d bytes arrive as %d with %+v: %.60x", len(frame), len(b), got, b)
			}
		}
		// Longer than a slot, and so through the queue.
		hdr, frame := udpFrame(30000, 1, tag...)
		hdr.GSOType, hdr.GSOSize = virtio.GSOUDPL4, 1000
		if !d.uso {
			continue
		}
		w.SendHdr(hdr, frame)
		_, b := g.recv()
		if !bytes.Equal(b[:16], frame[:16]) {
			t.Errorf("a large frame arrives as %.60x, want %.60x", b, frame)
		}
	}
}

// TestRecvLarge: a frame longer than a slot arrives whole where the guest takes it, in buffers of any kind, and keeps its place.
func TestRecvLarge(t *testing.T) {
	inNetns(t)
	d := open(t, "packet:"+devName)
	w := newWire(t)
	f := largeRecv | virtio.FNetGuestUSO4 | virtio.FNetGuestUSO6
	if !d.uso {
		require.Skip(t, "uso", "this kernel has no UDP segmentation in virtio-net headers")
	}
	for _, lens := range [][]int{{1 << 17}, {12, 1 << 17}, {700}, {5, 7, 3000}} {
		g := newGuest(t, d, 0, f)
		hdr, large := udpFrame(40000, 1)
		hdr.GSOType, hdr.GSOSize = virtio.GSOUDPL4, 1000
		for i := range uint32(3) {
			w.Inject(netdevtest.Frame(60, i))
			w.SendHdr(hdr, large)
		}
		for i := range uint32(3) {
			for _, want := range [][]byte{netdevtest.Frame(60, i), large} {
				var got []byte
				for range 100 {
					if _, got = g.Take(); got != nil {
						break
					}
					n, idle, err := g.q.Recv(g.posted, 1)
					if must(t, err); n == 0 && idle && !netdevtest.Poll(t, g.q.RecvFD(), unix.POLLIN, testTimeout) {
						t.Fatal("no frame came")
					}
					g.Post(1, lens...) // one by one, so that frames have to wait for room
				}
				if !bytes.Equal(got, want) {
					t.Fatalf("%v: %d bytes arrive, want %d", lens, len(got), len(want))
				}
			}
		}
	}
}

// TestRecvIncomplete: without virtio-net headers, frames that are not complete are lost and counted; others come.
func TestRecvIncomplete(t *testing.T) {
	inNetns(t)
	d := open(t, "packet:"+devName+",vnet-hdr=off")
	w, g := newWire(t), newGuest(t, d, 0, largeRecv)
	hdr, f := udpFrame(100, 1)
	w.SendHdr(hdr, f)
	large := uint64(1)
	if d.uso {
		hdr, f = udpFrame(40000, 1)
		hdr.GSOType, hdr.GSOSize = virtio.GSOUDPL4, 1000
		w.SendHdr(hdr, f)
		large++
	}
	w.Inject(netdevtest.Frame(100, 1))
	if hdr, got := g.recv(); hdr.Flags != 0 || !bytes.Equal(got, netdevtest.Frame(100, 1)) {
		t.Errorf("got %.60x with %+v", got, hdr)
	}
	if n := d.Queue(0).Counters().RecvDropped; n != large {
		t.Errorf("RecvDropped is %d, want %d", n, large)
	}
}

// TestRecvNotOwn: what leaves through the interface, the device's frames and the host's, does not come back.
func TestRecvNotOwn(t *testing.T) {
	for _, options := range []string{"", ",queues=2"} {
		t.Run(options, func(t *testing.T) {
			inNetns(t)
			d := open(t, "packet:"+devName+options)
			w := newWire(t)
			other := open(t, "packet:"+devName) // another process on the interface, say
			for _, from := range []*Device{d, other} {
				if from.Queue(0).Send([]*zerocopy.Buffer{zerocopy.NewBuffer(virtio.NetHdr{}, netdevtest.Frame(100, 7))}) != 1 {
					t.Fatal("not sent")
				}
				w.Capture()
			}
			for i := range len(d.queues) {
				if _, b := newGuest(t, d, i, plain).take(); b != nil {
					t.Errorf("queue %d: an own frame came back", i)
				}
			}
			w.Inject(netdevtest.Frame(100, 8))
			for i := range len(d.queues) {
				netdevtest.Poll(t, d.queues[i].fd, unix.POLLIN, 10*time.Millisecond)
			}
		})
	}
}

// TestRecvOverflow: what the ring has no room for is counted.
func TestRecvOverflow(t *testing.T) {
	inNetns(t)
	d := open(t, "packet:"+devName)
	w, g := newWire(t), newGuest(t, d, 0, plain)
	slots := len(d.queues[0].recv.slots)
	const more = 100
	for i := range slots + more {
		w.Inject(netdevtest.Frame(60, uint32(i)))
	}
	// All have come before the first is taken: it makes room.
	vhosttest.Eventually(t, "the frames without room", func() bool { return d.Queue(0).Counters().RecvDropped >= more })
	for i := range slots {
		if _, b := g.recv(); !bytes.Equal(b, netdevtest.Frame(60, uint32(i))) {
			t.Fatalf("frame %d is another", i)
		}
	}
	if n := d.Queue(0).Counters().RecvDropped; n != more {
		t.Errorf("RecvDropped is %d, want %d", n, more)
	}
	if n := d.Queue(0).Counters().RecvDropped; n != more {
		t.Errorf("RecvDropped is %d when read again, want %d", n, more)
	}
}

// TestRecvQueueOverflow: a large frame for which the socket's buffer has no room is lost, counted, and does not disturb the others.
func TestRecvQueueOverflow(t *testing.T) {
	inNetns(t)
	d := open(t, "packet:"+devName)
	if !d.uso {
		require.Skip(t, "uso", "this kernel has no UDP segmentation in virtio-net headers")
	}
	w, g := newWire(t), newGuest(t, d, 0, largeRecv|virtio.FNetGuestUSO4|virtio.FNetGuestUSO6)
	hdr, large := udpFrame(60000, 1)
	hdr.GSOType, hdr.GSOSize = virtio.GSOUDPL4, 1000
	const sent = 200
	for range sent {
		w.SendHdr(hdr, large)
	}
	w.Inject(netdevtest.Frame(60, 1))
	got := 0
	for {
		_, b := g.recv()
		if bytes.Equal(b, netdevtest.Frame(60, 1)) {
			break
		}
		if !bytes.Equal(b, large) {
			t.Fatalf("frame %d arrives changed: %d bytes", got, len(b))
		}
		got++
	}
	if n := d.Queue(0).Counters().RecvDropped; got == sent || got < 10 || n != uint64(sent-got) {
		t.Errorf("%d of %d frames came, RecvDropped is %d", got, sent, n)
	}
}

// flows injects frames of n flows, and returns how many frames each of the first pairs got.
func flows(t *testing.T, d *Device, w *netdevtest.Wire, n, pairs int) []int {
	t.Helper()
	for i := range n {
		_, f := udpFrame(20, uint16(1000+i))
		w.Inject(f)
	}
	got, sum := make([]int, pairs), 0
	for deadline := time.Now().Add(testTimeout); sum < n; {
		if time.Now().After(deadline) {
			t.Fatalf("%v of %d frames came", got, n)
		}
		for i := range got {
			for g := newGuest(t, d, i, plain); ; got[i]++ {
				if _, b := g.take(); b == nil {
					break
				}
				sum++
			}
		}
	}
	return got
}

// TestFanout: frames are spread over the pairs that are in use, and come to no other.
func TestFanout(t *testing.T) {
	inNetns(t)
	d := open(t, "packet:"+devName+",queues=2,fanout=hash")
	w := newWire(t)
	for _, pairs := range []int{2, 1, 2, 0, 1, 2} {
		must(t, d.SetPairs(pairs))
		got := flows(t, d, w, 64, max(pairs, 1))
		for i, n := range got {
			if n == 0 {
				t.Errorf("with %d pairs, queue %d got no frame: %v", pairs, i, got)
			}
		}
		if off := d.Queue(1); pairs < 2 {
			// A pair that is not in use takes frames, and gets rid of them.
			if off.RecvFD() != -1 || off.Send([]*zerocopy.Buffer{zerocopy.NewBuffer(virtio.NetHdr{}, netdevtest.Frame(60, 1))}) != 1 {
				t.Error("a pair that is not in use waits for something")
			}
			if _, idle, err := off.Recv(nil, 1); !idle || err != nil {
				t.Errorf("a pair that is not in use: idle %v, %v", idle, err)
			}
		}
	}
	// A driver may come while the interface is down.
	must(t, d.SetPairs(1))
	must(t, netlink.LinkSetDown(netdevtest.Link(t, devName)))
	if err := d.SetPairs(2); err != nil {
		t.Logf("this kernel lets no socket share the frames of an interface that is down: %v", err)
	}
	must(t, netlink.LinkSetUp(netdevtest.Link(t, devName)))
	netdevtest.AwaitRunning(t, devName)
	netdevtest.AwaitRunning(t, farName)
	must(t, d.SetPairs(2))
	if got := flows(t, d, w, 64, 2); got[0] == 0 || got[1] == 0 {
		t.Errorf("after the interface was down: %v", got)
	}
	if n := d.Queue(1).Counters().SendDropped; n != 3 {
		t.Errorf("SendDropped is %d, want 3", n)
	}
	if d.SetPairs(3) == nil || d.SetPairs(-1) == nil {
		t.Error("3 or -1 of 2 pairs: no error")
	}
}

// TestRecvAllocs: nothing is allocated for a frame, in the ring or beside it.
func TestRecvAllocs(t *testing.T) {
	inNetns(t)
	d := open(t, "packet:"+devName)
	w, g := newWire(t), newGuest(t, d, 0, largeRecv|virtio.FNetGuestUSO4|virtio.FNetGuestUSO6)
	hdr, large := udpFrame(40000, 1)
	hdr.GSOType, hdr.GSOSize = virtio.GSOUDPL4, 1000
	const rounds = 20
	for range 2*rounds + 3 {
		w.Inject(netdevtest.Frame(60, 1))
		if d.uso {
			w.SendHdr(hdr, large)
		}
	}
	frames := 1
	if d.uso {
		frames = 2
	}
	g.Post(10, 1<<17)
	if n, _, err := g.q.Recv(g.posted, 2*frames); n != 2*frames || err != nil {
		t.Fatalf("Recv is %d, %v", n, err)
	}
	for g.Driver.Free() > 8 {
		g.Post(1, 1<<17)
	}
	if n := testing.AllocsPerRun(rounds, func() {
		if n, _, err := g.q.Recv(g.posted, frames); n != frames || err != nil {
			t.Fatalf("Recv is %d, %v", n, err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
