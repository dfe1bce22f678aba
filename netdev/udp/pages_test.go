package udp_test

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/udp"
	"github.com/vhostd/vhostd/zerocopy"
)

// big is a frame's length in bytes that is sent without a copy: two of them pass a held interface, and the third waits.
const big = 9000

// The engines, as options.
const (
	ring = ",zerocopy-engine=io_uring"
	msg  = ",zerocopy-engine=msg_zerocopy"
)

// eachEngine runs a test for every way to send pages.
func eachEngine(t *testing.T, f func(t *testing.T, engine string)) {
	for _, e := range []string{ring, msg} {
		t.Run(e[1:], func(t *testing.T) { f(t, e) })
	}
}

// rig is a dgram device here and a socket there.
type rig struct {
	*lab
	dev *udp.Device
	q   netdev.Queue
	far *far
	*sent
}

func newRig(t *testing.T, options string, edit ...func(o *udp.Options)) *rig {
	t.Helper()
	r := &rig{lab: newLab(t, 65535), far: &far{TB: t}, sent: newSent()}
	r.inOrder()
	r.In(r.There, func() (err error) {
		r.far.conn, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(thereIP), Port: 7000})
		return err
	})
	t.Cleanup(func() { r.far.conn.Close() })
	r.dev = r.device(fmt.Sprintf("dgram:local=%s:7000,remote=%s:7000%s", hereIP, thereIP, options), edit...)
	r.q = r.dev.Queue(0)
	return r
}

// drainPatiently is for tests of frames that leave while somebody waits for them: the test may be slower than a device is meant to wait.
func drainPatiently(o *udp.Options) { o.Drain = patience }

func (r *rig) close() {
	r.Helper()
	must(r, r.dev.Close())
}

func (r *rig) send(frags ...[]byte) {
	r.Helper()
	if n := r.q.Send([]*zerocopy.Buffer{r.buffer(frags...)}); n != 1 {
		r.Fatal("not taken")
	}
}

// fill has the interface hold whatever comes next.
func (r *rig) fill() {
	r.Helper()
	r.hold("v0")
	for i := range 2 {
		r.send(netdevtest.Frame(big, uint32(i)))
		r.next(r)
		r.far.recv()
	}
}

// TestPageChangedWhileHeld is the evidence that the kernel sends the guest's own pages: a page that changes while its frame waits in a queueing
// discipline arrives changed; on the copying path it arrives as it was.
func TestPageChangedWhileHeld(t *testing.T) {
	for _, c := range []struct {
		options  string
		zerocopy bool
	}{
		{",zerocopy=on", true}, {"", true}, {",zerocopy=off", false}, {",zerocopy-min=10000", false},
		{ring, true}, {msg + ",zerocopy=on", true}, {msg, true}, {msg + ",zerocopy-min=10000", false},
	} {
		t.Run("options"+c.options, func(t *testing.T) {
			r := newRig(t, c.options)
			defer r.close()
			r.fill()
			frame := netdevtest.Frame(big, 7)
			before := bytes.Clone(frame)
			r.send(frame[:100], frame[100:5000], frame[5000:])
			if !c.zerocopy {
				if o := r.next(t); o == zerocopy.ZeroCopied || o == zerocopy.CopiedAnyway {
					t.Fatalf("released as %v", o)
				}
			} else {
				r.none(t)
				if n := r.dev.Stats().InFlight; n != 1 {
					t.Fatalf("%d frames in flight", n)
				}
			}
			for i := etherLen; i < big; i++ {
				frame[i] ^= 0xff
			}
			r.release("v0")
			r.send(netdevtest.Frame(100, 8))
			want := before
			if c.zerocopy {
				want = frame
			}
			if got := r.far.recv(); !bytes.Equal(got, want) {
				t.Errorf("%d bytes arrived, as they were when sent: %v, as they are now: %v", len(got), bytes.Equal(got, before), bytes.Equal(got, frame))
			}
			r.next(t)
			if c.zerocopy {
				r.next(t)
			}
		})
	}
}

const etherLen = 14

// toSink is a device whose frames end in an interface that takes pages.
func toSink(t *testing.T, options string) (*lab, *udp.Device) {
	t.Helper()
	l := newLab(t, 1500)
	l.sink()
	d := l.device("vxlan:vni=42,local=10.8.0.1,remote=10.8.0.2" + options)
	t.Cleanup(func() { must(t, d.Close()) })
	return l, d
}

// TestOutcomesAreTheKernels: what buffers are released with is what the kernel reports, on a path that takes pages, with a capture on it, and
// without it again. The throttle copies meanwhile, and tries again.
func TestOutcomesAreTheKernels(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine string) {
		l, d := toSink(t, engine)
		s, q := newSent(), d.Queue(0)
		counts := map[zerocopy.Outcome]uint64{}
		send := func(n int) map[zerocopy.Outcome]uint64 {
			t.Helper()
			now := map[zerocopy.Outcome]uint64{}
			for i := range n {
				if q.Send([]*zerocopy.Buffer{s.buffer(netdevtest.Frame(big, uint32(i)))}) != 1 {
					t.Fatal("not taken")
				}
				o := s.next(t)
				now[o]++
				counts[o]++
			}
			return now
		}
		if now := send(500); now[zerocopy.ZeroCopied] != 500 {
			t.Fatalf("on a path that takes pages: %v", now)
		}
		capture := l.Wire(l.Here, "i0")
		capture.Set(unix.PACKET_IGNORE_OUTGOING, 0)
		if now := send(500); now[zerocopy.CopiedAnyway] < 32 || now[zerocopy.CopiedFallback] == 0 || now[zerocopy.ZeroCopied] != 0 {
			t.Errorf("with a capture on the path: %v", now)
		}
		capture.Close()
		deadline := time.Now().Add(patience)
		for send(10)[zerocopy.ZeroCopied] < 10 {
			if time.Now().After(deadline) {
				t.Fatal("zero-copy does not come back after the capture")
			}
		}
		st := d.Stats()
		if st.ByPage != counts[zerocopy.ZeroCopied] || st.ByCopy != counts[zerocopy.CopiedAnyway] || st.Pauses == 0 || st.Probes == 0 || st.InFlight != 0 {
			t.Errorf("%+v, released as %v", st, counts)
		}
	})
}

func TestPolicy(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine string) {
		_, d := toSink(t, engine+",zerocopy-min=2000")
		s, q := newSent(), d.Queue(0)
		whole := netdevtest.Frame(60000, 1)
		var scattered [][]byte // more pages than a datagram refers to
		for i := range 20 {
			scattered = append(scattered, netdevtest.Frame(8000, uint32(i))[4000:4250])
		}
		unaligned := append(make([]byte, 0, 65000+5000), whole...)
		for _, c := range []struct {
			name  string
			frags [][]byte
			want  zerocopy.Outcome
		}{
			{"small", [][]byte{whole[:1999]}, zerocopy.CopiedSmall},
			{"large enough", [][]byte{whole[:2000]}, zerocopy.ZeroCopied},
			{"whole", [][]byte{whole}, zerocopy.ZeroCopied},
			{"anywhere in a page", [][]byte{unaligned[3:60000]}, zerocopy.ZeroCopied},
			{"header apart", [][]byte{whole[:14], whole[14:54], whole[54:]}, zerocopy.ZeroCopied},
			{"small pieces before", append(scattered[:5:5], whole[:50000]), zerocopy.ZeroCopied},
			{"too many pages", append(scattered[:20:20], whole[:50000]), zerocopy.CopiedFallback},
		} {
			if q.Send([]*zerocopy.Buffer{s.buffer(c.frags...)}) != 1 {
				t.Fatal("not taken")
			}
			if got := s.next(t); got != c.want {
				t.Errorf("%s: %v, want %v", c.name, got, c.want)
			}
		}
		if n := q.Counters().SendDropped; n != 0 {
			t.Errorf("%d frames dropped", n)
		}
	})
}

// TestFragmentsAreCopied: the kernel's IP cuts what is longer than the path's MTU, and says that it copied.
func TestFragmentsAreCopied(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine string) {
		l, d := toSink(t, engine+",zerocopy=on")
		l.Run("ip -n " + l.Here + " link set i0 mtu 1500")
		s := newSent()
		for _, c := range []struct {
			n    int
			want zerocopy.Outcome
		}{{1450 + etherLen, zerocopy.ZeroCopied}, {1451 + etherLen, zerocopy.CopiedAnyway}, {big, zerocopy.CopiedAnyway}} {
			if d.Queue(0).Send([]*zerocopy.Buffer{s.buffer(netdevtest.Frame(c.n, 1))}) != 1 {
				t.Fatal("not taken")
			}
			if got := s.next(t); got != c.want {
				t.Errorf("%d bytes: %v, want %v", c.n, got, c.want)
			}
		}
		if n := d.Queue(0).Counters().SendDropped; n != 0 {
			t.Errorf("%d frames dropped", n)
		}
	})
}

// TestPulledBytesArrive: where a frame has a page too many its first bytes travel in private memory, and nobody can tell.
func TestPulledBytesArrive(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine string) {
		r := newRig(t, engine+",zerocopy=on")
		defer r.close()
		frame := netdevtest.Frame(60000+etherLen, 3)
		for _, cut := range []int{1, 14, 100, 4000} {
			var frags [][]byte
			rest := frame
			for range 8 {
				frags, rest = append(frags, rest[:cut]), rest[cut:]
			}
			r.send(append(frags, rest)...)
			if got := r.far.recv(); !bytes.Equal(got, frame) {
				t.Fatalf("in pieces of %d: %d bytes arrived, want others, %d", cut, len(got), len(frame))
			}
			r.next(t)
		}
	})
}

// TestPendingCap: frames above the cap are copied, in their turn, and the next goes by page again once one has come back.
func TestPendingCap(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine string) {
		r := newRig(t, engine+",zerocopy=on,zerocopy-pending=3")
		defer r.close()
		r.fill()
		var frames [][]byte
		for i := range 6 {
			frames = append(frames, netdevtest.Frame(big, uint32(100+i)))
			r.send(frames[i])
		}
		r.want(t, zerocopy.CopiedCap, zerocopy.CopiedCap, zerocopy.CopiedCap)
		if st := r.dev.Stats(); st.InFlight != 3 || st.Most != 3 {
			t.Errorf("%+v", st)
		}
		r.none(t)
		r.release("v0")
		nudge := netdevtest.Frame(100, 99)
		r.send(nudge)
		for i, want := range append(frames, nudge) {
			if got := r.far.recv(); !bytes.Equal(got, want) {
				t.Fatalf("frame %d is another: order was not kept", i)
			}
		}
		now := map[zerocopy.Outcome]int{} // in any order: the kernel may let go of the three before the last one, that found them in flight, is released
		for range 4 {
			now[r.next(t)]++
		}
		if now[zerocopy.CopiedCap] != 1 || now[zerocopy.CopiedAnyway] != 3 {
			t.Errorf("released as %v", now)
		}
		last := netdevtest.Frame(big, 5)
		r.send(last)
		r.want(t, zerocopy.CopiedAnyway)
	})
}

// TestFullSocket: a socket without room takes no more, is writable when it has, and nothing is lost between.
func TestFullSocket(t *testing.T) {
	r := newRig(t, ",zerocopy=off")
	defer r.close()
	must(t, r.far.conn.SetReadBuffer(1<<20))
	r.fill()
	taken := 0
	for ; taken < 10_000; taken++ {
		b := r.buffer(netdevtest.Frame(big, uint32(taken)))
		if r.q.Send([]*zerocopy.Buffer{b}) == 0 {
			break
		}
	}
	if writable := netdevtest.Poll(t, r.q.SendFD(), unix.POLLOUT, 0); taken == 10_000 || writable {
		t.Fatalf("%d frames taken, then writable: %v", taken, writable)
	}
	r.purge("v0")
	if !netdevtest.Poll(t, r.q.SendFD(), unix.POLLOUT, patience) {
		t.Fatal("not writable, with the socket empty")
	}
	last := netdevtest.Frame(60, 1)
	r.send(last)
	if got := r.far.recv(); !bytes.Equal(got, last) || r.q.Counters().SendDropped != 0 {
		t.Errorf("%d bytes arrived, %d frames dropped", len(got), r.q.Counters().SendDropped)
	}
}

// TestGuestGoesQuiet: completions come without anybody calling the queue.
func TestGuestGoesQuiet(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine string) {
		r := newRig(t, engine+",zerocopy=on")
		defer r.close()
		r.fill()
		for i := range 5 {
			r.send(netdevtest.Frame(big, uint32(i)))
		}
		r.none(t)
		r.purge("v0")
		for range 5 {
			r.next(t)
		}
	})
}

// TestCloseWithFramesHeld: Close waits, no longer than it should, says what the kernel keeps, and that is released when the kernel lets go.
func TestCloseWithFramesHeld(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine string) {
		r := newRig(t, engine+",zerocopy=on")
		r.fill()
		for i := range 3 {
			r.send(netdevtest.Frame(big, uint32(i)))
		}
		err := r.dev.Close()
		var held *udp.HeldError
		if !errors.As(err, &held) || held.Frames != 3 || !strings.Contains(err.Error(), "3 frames") {
			t.Errorf("Close: %v", err)
		}
		r.none(t)
		r.purge("v0")
		for range 3 {
			r.next(t)
		}
		must(t, r.dev.Close()) // a second time there is nothing to do
	})
}

// TestCloseDrains: frames that leave while Close waits are no error.
func TestCloseDrains(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine string) {
		r := newRig(t, engine+",zerocopy=on", drainPatiently)
		r.fill()
		r.send(netdevtest.Frame(big, 1))
		closed := make(chan error)
		go func() { closed <- r.dev.Close() }()
		r.purge("v0")
		must(t, <-closed)
		r.next(t)
	})
}
