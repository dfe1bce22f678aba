package pair_test

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/pair"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

func open(t *testing.T, o pair.Options) (a, b *pair.Device) {
	t.Helper()
	a, b, err := pair.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return a, b
}

func TestDevice(t *testing.T) {
	for _, o := range []pair.Options{{}, {Slots: 65}, {Hold: true}, {Pairs: 3, MTU: 9000}} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			netdevtest.Run(t, func(t *testing.T) netdevtest.Harness {
				a, b := open(t, o)
				peer := netdevtest.NewPeer(t, b)
				return netdevtest.Harness{
					Device: a, MaxFrame: virtio.MaxFrame, Capture: peer.Capture, Inject: peer.Inject, Lossless: true,
					Close: func() {
						if err := b.Close(); err != nil {
							t.Error(err)
						}
					},
				}
			})
		})
	}
}

// TestLoop: the far end of a loop is the device itself.
func TestLoop(t *testing.T) {
	for _, o := range []pair.Options{{}, {Hold: true, Slots: 65}, {Pairs: 2}} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			netdevtest.Run(t, func(t *testing.T) netdevtest.Harness {
				d, err := pair.NewLoop(o)
				if err != nil {
					t.Fatal(err)
				}
				peer := netdevtest.NewPeer(t, d)
				return netdevtest.Harness{Device: d, MaxFrame: virtio.MaxFrame, Capture: peer.Capture, Inject: peer.Inject, Lossless: true}
			})
		})
	}
	if _, err := pair.NewLoop(pair.Options{Pairs: -1}); err == nil {
		t.Error("-1 queue pairs are accepted")
	}
}

// outcomes makes n buffers that tell what became of them.
func outcomes(n int) (bufs []*zerocopy.Buffer, got *[]zerocopy.Outcome) {
	got = new([]zerocopy.Outcome)
	for i := range n {
		u := zerocopy.Ubuf{Callback: func(_ *zerocopy.Ubuf, o zerocopy.Outcome) { *got = append(*got, o) }}
		bufs = append(bufs, zerocopy.NewUbufBuffer(u, virtio.NetHdr{}, netdevtest.Frame(100, uint32(i))))
	}
	return bufs, got
}

func ready(t *testing.T, fd int, events int16) bool {
	t.Helper()
	return netdevtest.Poll(t, fd, events, 0)
}

func TestHoldKeepsPagesUntilReleasedOrReceived(t *testing.T) {
	a, b := open(t, pair.Options{Hold: true, Slots: 8})
	defer b.Close()
	defer a.Close()
	bufs, got := outcomes(8)
	if n := a.Queue(0).Send(bufs); n != 8 || a.Held() != 8 || len(*got) != 0 {
		t.Fatalf("%d sent, %d held, released %v", n, a.Held(), *got)
	}
	if n := a.Release(3); n != 3 || a.Held() != 5 || len(*got) != 3 {
		t.Fatalf("Release: %d, %d held, released %v", n, a.Held(), *got)
	}
	if _, f := netdevtest.NewPeer(t, b).Capture(); string(f) != string(netdevtest.Frame(100, 3)) {
		t.Fatalf("captured %x", f)
	}
	if a.Held() != 4 || fmt.Sprint(*got) != "[zerocopied zerocopied zerocopied zerocopied]" {
		t.Fatalf("%d held, released %v", a.Held(), *got)
	}
	if err := a.Close(); err != nil || fmt.Sprint((*got)[4:]) != "[dropped dropped dropped dropped]" {
		t.Fatalf("Close: %v, released %v", err, *got)
	}
}

func TestFullRingIsToldByDescriptor(t *testing.T) {
	a, b := open(t, pair.Options{Slots: 4})
	defer b.Close()
	defer a.Close()
	q := a.Queue(0)
	if !ready(t, q.SendFD(), unix.POLLOUT) {
		t.Fatal("an empty ring is not writable")
	}
	bufs, _ := outcomes(6)
	if n := q.Send(bufs); n != 4 || ready(t, q.SendFD(), unix.POLLOUT) {
		t.Fatalf("%d sent into 4 slots, writable: %v", n, ready(t, q.SendFD(), unix.POLLOUT))
	}
	peer := netdevtest.NewPeer(t, b)
	peer.Capture()
	if !ready(t, q.SendFD(), unix.POLLOUT) {
		t.Fatal("not writable although there is room")
	}
	if n := q.Send(bufs[4:]); n != 1 || ready(t, q.SendFD(), unix.POLLOUT) {
		t.Fatalf("%d sent into 1 slot", n)
	}
	for range 4 {
		peer.Capture()
	}
}

func TestFramesOfUnusedQueuesTakeOthers(t *testing.T) {
	a, b := open(t, pair.Options{Pairs: 2})
	defer b.Close()
	defer a.Close()
	if err := b.SetPairs(1); err != nil {
		t.Fatal(err)
	}
	if err := b.SetPairs(3); err == nil {
		t.Error("3 of 2 queue pairs can be used")
	}
	bufs, _ := outcomes(1)
	a.Queue(1).Send(bufs)
	netdevtest.NewPeer(t, b).Capture()
}

func TestSendToClosedPeerDrops(t *testing.T) {
	for _, hold := range []bool{false, true} {
		a, b := open(t, pair.Options{Hold: hold, Slots: 2})
		bufs, got := outcomes(5)
		sent := a.Queue(0).Send(bufs)
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		if !ready(t, a.Queue(0).SendFD(), unix.POLLOUT) {
			t.Error("the sender is left waiting")
		}
		sent += a.Queue(0).Send(bufs[sent:])
		if n := a.Queue(0).Counters().SendDropped; sent != 5 || len(*got) != 5 || n != 3 {
			t.Errorf("%d sent, %d dropped, released %v", sent, n, *got)
		}
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFrameThatNeverFitsIsLostAlone(t *testing.T) {
	a, b := open(t, pair.Options{})
	defer b.Close()
	defer a.Close()
	peer := netdevtest.NewPeer(t, b)
	peer.Inject(netdevtest.Frame(1000, 1))
	peer.Inject(netdevtest.Frame(60, 2))
	g := netdevtest.NewGuest(t, 16, virtio.FVersion1)
	g.Post(4, 100)
	n, idle, err := a.Queue(0).Recv(zerocopy.NewPosted(g.Ring, virtio.FVersion1), 64)
	if n != 2 || !idle || err != nil {
		t.Fatalf("Recv: %d, %v, %v", n, idle, err)
	}
	if _, f := g.Take(); string(f) != string(netdevtest.Frame(60, 2)) {
		t.Fatalf("received %x", f)
	}
	if c := a.Queue(0).Counters(); c.RecvDropped != 1 {
		t.Errorf("counters %+v", c)
	}
}
