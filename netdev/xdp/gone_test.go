package xdp_test

import (
	"bytes"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/xdp"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// sendFrame sends a frame, and returns what became of it once it is released.
func sendFrame(q interface {
	Send([]*zerocopy.Buffer) int
}) (taken bool, outcome chan zerocopy.Outcome) {
	outcome = make(chan zerocopy.Outcome, 1)
	u := zerocopy.Ubuf{Callback: func(_ *zerocopy.Ubuf, o zerocopy.Outcome) { outcome <- o }}
	return q.Send([]*zerocopy.Buffer{zerocopy.NewUbufBuffer(u, virtio.NetHdr{}, netdevtest.Frame(100, 1))}) == 1, outcome
}

// TestInterfaceGone: when the interface is gone Send drops what it is given and what waits in the socket's ring, Recv says it, and no socket is opened for it any more.
func TestInterfaceGone(t *testing.T) {
	for _, options := range []string{"xdp:v0", "xdp:v0,mode=generic"} {
		t.Run(options, func(t *testing.T) {
			l := newLab(t, 1500, 1)
			d := l.device(options)
			defer d.Close()
			q := d.Queue(0)
			l.Run("ip -n " + l.Here + " link set v0 down")
			for range 10 {
				if taken, _ := sendFrame(q); !taken {
					t.Fatal("no room")
				}
			}
			l.Run("ip -n " + l.Here + " link del v0")
			const frames = 10000 // more than there is room for
			for i := range frames {
				if taken, o := sendFrame(q); !taken {
					t.Fatalf("frame %d was not taken: %d dropped", i, q.Counters().SendDropped)
				} else if got := <-o; i > 0 && got != zerocopy.Dropped { // the first one finds out
					t.Fatalf("frame %d was released as %v", i, got)
				}
			}
			if n := q.Counters().SendDropped; n != frames+10 {
				t.Errorf("%d frames were dropped, want %d", n, frames+10)
			}
			if !netdevtest.Poll(t, q.SendFD(), unix.POLLOUT, patience) {
				t.Error("SendFD says that there is no room")
			}
			must(t, xdp.Unbind(d))
			vhosttest.Eventually(t, "a frame is dropped after the socket was closed", func() bool {
				taken, _ := sendFrame(q)
				return taken
			})
			if !netdevtest.Poll(t, q.SendFD(), unix.POLLOUT, patience) {
				t.Error("SendFD says that there is no room after the socket was closed")
			}
			if n := xdp.Nap(d); n != 0 {
				t.Errorf("another socket is tried every %v", n)
			}
			var err error
			p := zerocopy.NewPosted(netdevtest.NewGuest(t, 8, 0).Ring, 0)
			for deadline := time.Now().Add(patience); err == nil && time.Now().Before(deadline); {
				_, _, err = q.Recv(p, 1)
			}
			if err == nil {
				t.Error("Recv from an interface that is gone succeeds")
			}
		})
	}
}

// TestWaitingWhileDown: a frame that waits for an interface which is down is not looked at all the time, and leaves when it is up.
func TestWaitingWhileDown(t *testing.T) {
	l := newLab(t, 1500, 1)
	d := l.device("xdp:v0")
	defer d.Close()
	w := l.wire(l.There)
	l.Run("ip -n " + l.Here + " link set v0 down")
	if taken, _ := sendFrame(d.Queue(0)); !taken {
		t.Fatal("no room")
	}
	if n := xdp.Nap(d); n < 10*time.Millisecond {
		t.Errorf("it is looked at every %v", n)
	}
	l.Up()
	if f, _ := w.recv(); !bytes.Equal(f, netdevtest.Frame(100, 1)) {
		t.Errorf("got %x", f)
	}
	vhosttest.Eventually(t, "nothing is left to do", func() bool { return xdp.Nap(d) == 0 })
}

// TestLostWithTheSocket: a frame that waits for an interface which is down when the socket is closed is lost, and counted.
func TestLostWithTheSocket(t *testing.T) {
	l := newLab(t, 1500, 1)
	d := l.device("xdp:v0")
	defer d.Close()
	q := d.Queue(0)
	l.Run("ip -n " + l.Here + " link set v0 down")
	if taken, _ := sendFrame(q); !taken {
		t.Fatal("no room")
	}
	must(t, xdp.Unbind(d))
	if n := q.Counters().SendDropped; n != 1 {
		t.Errorf("%d frames were dropped, want 1", n)
	}
}
