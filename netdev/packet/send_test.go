package packet

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// TestSendRefused: frames that the kernel refuses, and those that no wire takes, are dropped, said to be, and counted; the others of the
// batch arrive in order.
func TestSendRefused(t *testing.T) {
	inNetns(t)
	d := open(t, "packet:"+devName)
	w := newWire(t)
	lie := virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, CsumStart: 5000, CsumOffset: 16}
	var s sent
	var want []zerocopy.Outcome
	var good [][]byte
	for round := range 20 {
		f := netdevtest.Frame(100+round, uint32(round))
		bad := []struct {
			hdr virtio.NetHdr
			f   []byte
		}{
			{lie, f}, {virtio.NetHdr{GSOType: 77, GSOSize: 1000}, f}, {virtio.NetHdr{}, f[:13]},
			{virtio.NetHdr{}, netdevtest.Frame(testMTU+19, 1)}, {virtio.NetHdr{GSOType: virtio.GSOTCPv4}, make([]byte, virtio.MaxFrame+1000)},
		}
		for _, b := range bad[:round%(len(bad)+1)] {
			s.add(b.hdr, b.f)
			want = append(want, zerocopy.Dropped)
		}
		s.add(virtio.NetHdr{}, f)
		want = append(want, zerocopy.Copied)
		good = append(good, f)
	}
	s.add(lie, good[0]) // the last of a batch
	want = append(want, zerocopy.Dropped)
	if n := d.Queue(0).Send(s.bufs); n != len(s.bufs) {
		t.Fatalf("Send took %d of %d", n, len(s.bufs))
	}
	if fmt.Sprint(s.outcomes) != fmt.Sprint(want) {
		t.Errorf("released as %v, want %v", s.outcomes, want)
	}
	for i, f := range good {
		if _, got := w.Capture(); !bytes.Equal(got, f) {
			t.Fatalf("frame %d: got %.40x, want %.40x", i, got, f)
		}
	}
	if n := d.Queue(0).Counters().SendDropped; n != uint64(len(want)-len(good)) {
		t.Errorf("SendDropped is %d, want %d", n, len(want)-len(good))
	}
	if d.queues[0].Held() {
		t.Error("something is held")
	}
}

// TestSendVLAN: a tag that the guest puts in goes out, also in front of what the kernel cuts.
func TestSendVLAN(t *testing.T) {
	inNetns(t)
	d, far := open(t, "packet:"+devName), open(t, "packet:"+farName)
	g := newGuest(t, far, 0, plain)
	hdr, f := udpFrame(5000, 1, tag...)
	hdr.GSOType, hdr.GSOSize = virtio.GSOUDPL4, 1000
	want := 5
	if !d.uso {
		hdr, f = udpFrame(5000, 1, tag...)
		want = 1
	}
	if d.Queue(0).Send([]*zerocopy.Buffer{zerocopy.NewBuffer(hdr, f)}) != 1 {
		t.Fatal("not sent")
	}
	for i := range want {
		if _, b := g.recv(); !bytes.Equal(b[:18], f[:18]) {
			t.Errorf("frame %d: %.60x", i, b)
		}
	}
}

// throttle holds the device's frames back.
func throttle(t testing.TB, rate uint64, limit uint32) {
	t.Helper()
	must(t, netlink.QdiscReplace(&netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: netdevtest.Link(t, devName).Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       rate, Limit: limit, Buffer: netlink.Xmittime(rate, 12000),
	}))
}

// TestSendFull: when the way out is slow, Send takes what goes, SendFD is not ready before there is room, and every frame arrives in order.
func TestSendFull(t *testing.T) {
	for _, c := range []struct {
		name         string
		size, frames int
		rate         uint64
	}{
		{"slots", 60, 600, 100_000}, {"buffer", 9000, 200, 4_000_000},
	} {
		t.Run(c.name, func(t *testing.T) {
			inNetns(t)
			d := open(t, "packet:"+devName)
			w := newWire(t)
			throttle(t, c.rate, 16<<20)
			var s sent
			for i := range c.frames {
				s.add(virtio.NetHdr{}, netdevtest.Frame(c.size, uint32(i)))
			}
			q, full, held := d.queues[0], 0, 0
			for left := s.bufs; len(left) > 0 || q.Held(); {
				n := q.Send(left)
				left = left[n:]
				q.Reap()
				if len(left) == 0 && !q.Held() {
					break
				}
				if q.Held() {
					held++
				}
				full++
				fd := q.SendFD()
				if fd != q.fd {
					t.Fatalf("SendFD is %d: the socket can be written, with all slots in use", fd)
				}
				for !netdevtest.Poll(t, fd, unix.POLLOUT, testTimeout) {
					t.Fatal("the socket is never writable again")
				}
			}
			// Were poll to return at once, it would have done so far more often.
			if full == 0 || full > c.frames {
				t.Errorf("Send was refused %d times", full)
			}
			for i := range c.frames {
				if _, got := w.Capture(); !bytes.Equal(got, netdevtest.Frame(c.size, uint32(i))) {
					t.Fatalf("frame %d is another: %d bytes", i, len(got))
				}
			}
			t.Logf("refused %d times, %d of them with frames held", full, held)
			if len(s.outcomes) != c.frames {
				t.Errorf("%d releases for %d frames", len(s.outcomes), c.frames)
			}
		})
	}
}

// TestSendQdiscFull: a queueing discipline that drops costs frames, which are counted, and nothing waits for them.
func TestSendQdiscFull(t *testing.T) {
	inNetns(t)
	d := open(t, "packet:"+devName)
	throttle(t, 10_000, 20_000) // bytes per second, bytes
	var s sent
	for i := range 100 {
		s.add(virtio.NetHdr{}, netdevtest.Frame(1000, uint32(i)))
	}
	if n := d.Queue(0).Send(s.bufs); n != len(s.bufs) || len(s.outcomes) != len(s.bufs) {
		t.Fatalf("Send took %d of %d, %d released", n, len(s.bufs), len(s.outcomes))
	}
	dropped := 0
	for _, o := range s.outcomes {
		if o == zerocopy.Dropped {
			dropped++
		}
	}
	if n := d.Queue(0).Counters().SendDropped; dropped < 50 || int(n) != dropped || d.queues[0].Held() {
		t.Errorf("%d released as dropped, %d counted, held %v", dropped, n, d.queues[0].Held())
	}
}

// TestLinkDownUp: while the interface is down frames are dropped, and waiting does not spin; when it is up both ways work again.
func TestLinkDownUp(t *testing.T) {
	for _, options := range []string{"", ",queues=2"} {
		t.Run("packet"+options, func(t *testing.T) {
			inNetns(t)
			d := open(t, "packet:"+devName+options)
			must(t, d.SetPairs(1))
			w, g := newWire(t), newGuest(t, d, 0, plain)
			q := d.queues[0]
			for round := range uint32(3) {
				must(t, netlink.LinkSetDown(netdevtest.Link(t, devName)))
				awaitQuiet(t, g)
				var s sent
				s.add(virtio.NetHdr{}, netdevtest.Frame(60, 1))
				if n := q.Send(s.bufs); n != 1 || fmt.Sprint(s.outcomes) != fmt.Sprint([]zerocopy.Outcome{zerocopy.Dropped}) {
					t.Fatalf("Send took %d, released as %v", n, s.outcomes)
				}
				if n := q.Counters().SendDropped; n != uint64(round+1) {
					t.Errorf("SendDropped is %d, want %d", n, round+1)
				}
				waiting := make(chan bool, 1)
				fd := q.RecvFD()
				go func() { waiting <- netdevtest.Poll(t, fd, unix.POLLIN, testTimeout) }()
				must(t, netlink.LinkSetUp(netdevtest.Link(t, devName)))
				if !<-waiting {
					t.Fatal("nothing tells that the interface is up again")
				}
				netdevtest.AwaitRunning(t, devName)
				netdevtest.AwaitRunning(t, farName)
				w.Inject(netdevtest.Frame(100, round))
				if _, b := g.recv(); !bytes.Equal(b, netdevtest.Frame(100, round)) {
					t.Fatalf("got %.40x", b)
				}
				if _, b := g.take(); b != nil || q.RecvFD() != q.fd {
					t.Error("the interface is up, and RecvFD is not the socket")
				}
				if q.Send([]*zerocopy.Buffer{zerocopy.NewBuffer(virtio.NetHdr{}, netdevtest.Frame(90, round))}) != 1 {
					t.Fatal("not sent")
				}
				if _, b := w.Capture(); !bytes.Equal(b, netdevtest.Frame(90, round)) {
					t.Fatalf("captured %.40x", b)
				}
			}
		})
	}
}

// awaitQuiet receives as a worker does until waiting waits.
func awaitQuiet(t *testing.T, g *guest) {
	t.Helper()
	for range 10 * aliveEvery {
		if _, b := g.take(); b != nil {
			t.Fatalf("got a frame of %d bytes", len(b))
		}
		if !netdevtest.Poll(t, g.q.RecvFD(), unix.POLLIN, 0) {
			return
		}
	}
	t.Fatal("RecvFD is ready all the time")
}

// TestLinkGone: Recv says it, Send drops, and everything can be closed.
func TestLinkGone(t *testing.T) {
	inNetns(t)
	d := open(t, "packet:"+devName+",queues=2")
	g := newGuest(t, d, 0, plain)
	must(t, netlink.LinkDel(netdevtest.Link(t, devName)))
	var err error
	for deadline := time.Now().Add(testTimeout); err == nil && time.Now().Before(deadline); {
		if _, _, err = g.q.Recv(g.posted, 8); err == nil {
			netdevtest.Poll(t, g.q.RecvFD(), unix.POLLIN, time.Second)
		}
	}
	if err == nil {
		t.Fatal("Recv from an interface that is gone succeeds")
	}
	t.Log(err)
	var s sent
	s.add(virtio.NetHdr{}, netdevtest.Frame(60, 1))
	if d.Queue(0).Send(s.bufs) != 1 || len(s.outcomes) != 1 || s.outcomes[0] != zerocopy.Dropped {
		t.Errorf("released as %v", s.outcomes)
	}
	must(t, d.SetPairs(1))
	if d.SetPairs(2) == nil {
		t.Error("a socket was bound to an interface that is gone")
	}
}

// TestSendAllocs: nothing is allocated for a frame, and none for one that is refused.
func TestSendAllocs(t *testing.T) {
	inNetns(t)
	q := open(t, "packet:"+devName).Queue(0)
	lie := virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, CsumStart: 5000, CsumOffset: 16}
	var batch []*zerocopy.Buffer
	for i := range 32 {
		f := netdevtest.Frame(60+i*100, uint32(i))
		hdr := virtio.NetHdr{}
		if i%8 == 7 {
			hdr = lie
		}
		batch = append(batch, zerocopy.NewBuffer(hdr, f[:14], f[14:]))
	}
	run := func() {
		for _, b := range batch {
			b.Retain()
		}
		if n := q.Send(batch); n != len(batch) {
			t.Fatalf("Send took %d", n)
		}
	}
	run()
	if n := testing.AllocsPerRun(50, run); n != 0 {
		t.Errorf("%v allocations in a batch", n)
	}
}
