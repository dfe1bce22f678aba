package l2switch_test

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/l2switch"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// deaf is a guest that receives nothing more: all its posted buffers are used up, and none comes anew.
// others are all that the switch has besides talker: they have taken what was flooded when deaf returns.
func deaf(t *testing.T, s *l2switch.Switch, name string, n int, talker vm, talks int, others ...vm) vm {
	t.Helper()
	d := start(t, s, l2switch.PortConfig{Name: name}, vhosttest.Options{QueueSize: 64})
	d.meet(t, n, append(others, talker)...)
	for i := range uint64(64) {
		talker.send(t, frame(mac(n), mac(talks), i, 100))
	}
	vhosttest.Eventually(t, "the deaf guest's buffers are full", func() bool { return port(t, s, name).ToGuest.Frames >= 64 })
	return d
}

func port(t testing.TB, s *l2switch.Switch, name string) l2switch.PortStats {
	t.Helper()
	for _, p := range s.Stats().Ports {
		if p.Name == name {
			return p
		}
	}
	t.Fatalf("no port %s", name)
	return l2switch.PortStats{}
}

// TestSlowReceiverKeepsNoPages: a receiver that stops posting buffers has the sender's pages no longer than the deadline. They are copied, as far as copies are
// allowed, dropped beyond that, and counted; the sender talks to others all the while; and the receiver gets what was kept, in order, when it posts again.
func TestSlowReceiverKeepsNoPages(t *testing.T) {
	vhosttest.NoLeaks(t)
	s := newSwitch(t, l2switch.Config{Hold: 5 * time.Millisecond, Backlog: 512})
	a := start(t, s, l2switch.PortConfig{Name: "a"}, vhosttest.Options{QueueSize: 128})
	c := start(t, s, l2switch.PortConfig{Name: "c"}, vhosttest.Options{})
	a.meet(t, 1, c)
	c.meet(t, 3, a)
	b := deaf(t, s, "b", 2, a, 1, c)
	const frames = 1000
	for i := range uint64(frames) {
		a.send(t, frame(mac(2), mac(1), 64+i, 1000))
	}
	a.send(t, frame(mac(3), mac(1), 7, 60))
	if seq, err := number(c.recv(t)); seq != 7 || err != nil {
		t.Fatalf("frame %d, %v", seq, err)
	}
	if err := a.Transmitq(0).Settle(); err != nil { // all pages are back
		t.Fatal(err)
	}
	st := port(t, s, "b")
	dropped := st.Drops[l2switch.DropBacklog.String()]
	if st.Orphaned == 0 || dropped == 0 || uint64(st.Waiting)+dropped != frames {
		t.Fatalf("of %d frames: %+v", frames, st)
	}
	t.Logf("%d frames: %d copied at the deadline, %d waiting, %d dropped", frames, st.Orphaned, st.Waiting, dropped)
	for i := range uint64(64 + st.Waiting) {
		if seq, err := number(b.recv(t)); err != nil || seq != i {
			t.Fatalf("frame %d in place %d, %v", seq, i, err)
		}
	}
}

// TestBytesOfOneSenderLeaveRoom: a sender of large frames to a receiver that takes none does not use up the memory for copies: another's frames are kept, whether
// they are copied at once or when they have waited for too long.
func TestBytesOfOneSenderLeaveRoom(t *testing.T) {
	const large = 1 << 16
	for _, c := range []struct {
		name string
		dst  l2switch.MAC
	}{{"at once", everybody}, {"at the deadline", mac(2)}} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t, l2switch.Config{Hold: time.Millisecond}, l2switch.PortConfig{Name: "a"}, l2switch.PortConfig{Name: "b"}, l2switch.PortConfig{Name: "c"})
			l.passes("b", "a", ether(mac(1), mac(2), 0x88b5), nil)
			l.nothing("a")
			const frames = 2 * l2switch.DefaultBacklogBytes / large
			for range frames {
				l.send("a", virtio.NetHdr{}, ether(c.dst, mac(1), 0x88b5, make([]byte, large-14)))
			}
			vhosttest.Eventually(t, "all are copied, or dropped", func() bool { return l2switch.Held(l.ports["b"]) == 0 })
			before := l.drops("b", l2switch.DropBacklog)
			if before == 0 {
				t.Fatal("the flood was not too much")
			}
			for range 10 {
				l.send("c", virtio.NetHdr{}, ether(mac(2), mac(3), 0x88b5, make([]byte, 1500)))
			}
			vhosttest.Eventually(t, "all are copied, or dropped", func() bool { return l2switch.Held(l.ports["b"]) == 0 })
			if n := l.drops("b", l2switch.DropBacklog) - before; n != 0 {
				t.Errorf("%d frames of the other sender were dropped", n)
			}
		})
	}
}

// recvAll takes what has come.
func (v vm) recvAll(t testing.TB) {
	t.Helper()
	for {
		if _, _, err := v.Recv(0, 0); err != nil {
			return
		}
	}
}

// TestStoppedReceiverDrops: what is for a guest whose rings do not run, or who has left, is dropped and counted; nothing of it waits for its return.
func TestStoppedReceiverDrops(t *testing.T) {
	vhosttest.NoLeaks(t)
	s := newSwitch(t, l2switch.Config{})
	a := start(t, s, l2switch.PortConfig{Name: "a"}, vhosttest.Options{})
	b := start(t, s, l2switch.PortConfig{Name: "b"}, vhosttest.Options{})
	a.meet(t, 1, b)
	b.meet(t, 2, a)
	send := func(n int) {
		t.Helper()
		for i := range uint64(n) {
			a.send(t, frame(mac(2), mac(1), 100+i, 500))
		}
		if err := a.Transmitq(0).Settle(); err != nil {
			t.Fatal(err)
		}
	}
	lost := func() uint64 { return port(t, s, "b").Drops[l2switch.DropNoReceiver.String()] }
	for _, c := range []struct {
		name     string
		off, on  func()
		connects bool
	}{
		{"disabled", func() { b.Receiveq(0).Enable(false) }, func() { b.Receiveq(0).Enable(true) }, true},
		{"stopped", b.Stop, func() { b.Receiveq(0).Start(); b.Transmitq(0).Start() }, true},
		{"gone", b.Hangup, b.Reconnect, false},
	} {
		before := lost()
		c.off()
		if !c.connects {
			vhosttest.Eventually(t, "the guest has left", func() bool { return !port(t, s, "b").Connected })
		}
		send(100)
		if n := lost() - before; n != 100 {
			t.Fatalf("%s: %d of 100 frames were dropped", c.name, n)
		}
		c.on()
		a.send(t, frame(mac(2), mac(1), 1, 60))
		if seq, err := number(b.recv(t)); seq != 1 || err != nil {
			t.Fatalf("%s: frame %d, %v", c.name, seq, err)
		}
	}
}

// TestTruncatedSender: guest a cuts its memory off while its frames wait for b. It is a's session that ends, whoever touches the pages: b's worker, c's thread at
// b's door, or the sweep.
func TestTruncatedSender(t *testing.T) {
	for _, c := range []struct {
		name string
		hold time.Duration
		then func(t *testing.T, b, c vm)
	}{
		{"worker", time.Minute, func(t *testing.T, b, _ vm) { b.recvAll(t) }},
		{"another sender", time.Minute, func(t *testing.T, b, c vm) {
			for i := range uint64(64) {
				c.send(t, frame(mac(2), mac(3), i, 60))
			}
			b.recvAll(t)
		}},
		{"sweep", time.Millisecond, func(*testing.T, vm, vm) {}},
	} {
		t.Run(c.name, func(t *testing.T) {
			vhosttest.NoLeaks(t)
			s := newSwitch(t, l2switch.Config{Hold: c.hold})
			big := vhosttest.RegionSpec{GPA: 0, Size: 8 << 20}
			a := start(t, s, l2switch.PortConfig{Name: "a"}, vhosttest.Options{Regions: []vhosttest.RegionSpec{big}, SendSize: 16 << 10})
			third := start(t, s, l2switch.PortConfig{Name: "c"}, vhosttest.Options{})
			b := deaf(t, s, "b", 2, third, 3, a)
			for i := range uint64(10) {
				if err := a.Send(0, virtio.NetHdr{}, frame(mac(2), mac(1), i, 9000), nil); err != nil {
					t.Fatal(err)
				}
			}
			if c.hold > time.Second {
				vhosttest.Eventually(t, "frames wait", func() bool { return port(t, s, "b").Waiting >= 10 })
			}
			for _, r := range a.Mem.Regions {
				if err := r.Truncate(0); err != nil {
					t.Fatal(err)
				}
			}
			// Rings are in the same memory: a's own worker may be the first to find out.
			c.then(t, b, third)
			vhosttest.Eventually(t, "a's session has ended", func() bool {
				b.recvAll(t)
				a.Transmitq(0).Kick.Signal()
				return !port(t, s, "a").Connected
			})
			vhosttest.Eventually(t, "a's memory is unmapped although its port stays", func() bool {
				runtime.GC()
				return a.Mem.Regions[0].Mappings(t) == 0
			})
			b.recvAll(t)
			third.send(t, frame(mac(2), mac(3), 4711, 60)) // the others talk on
			vhosttest.Eventually(t, "c's frame at b", func() bool {
				_, f, err := b.Recv(0, 0)
				if err != nil {
					return false
				}
				seq, err := number(f)
				return seq == 4711 && err == nil
			})
			if !port(t, s, "b").Connected || !port(t, s, "c").Connected {
				t.Errorf("%+v", s.Stats().Ports)
			}
		})
	}
}

// TestManySendersToOne: senders that do not know of each other, queues of all numbers, receivers that come and go. Each sender's frames arrive in order.
func TestManySendersToOne(t *testing.T) {
	vhosttest.NoLeaks(t)
	const senders, frames = 4, 4000
	s := newSwitch(t, l2switch.Config{Hold: time.Minute})
	sink := start(t, s, l2switch.PortConfig{Name: "sink", Pairs: 2}, vhosttest.Options{Pairs: 2})
	var g [senders]vm
	for i := range g {
		g[i] = start(t, s, l2switch.PortConfig{Name: fmt.Sprint("s", i)}, vhosttest.Options{QueueSize: 64})
	}
	sink.send(t, frame(everybody, mac(100), 0, 60))
	for i := range g {
		g[i].recv(t)
	}
	var wg sync.WaitGroup
	for i := range g {
		wg.Add(1)
		go func() { defer wg.Done(); flood(t, g[i], mac(100), mac(i), frames) }()
	}
	var mu sync.Mutex
	next := map[byte]uint64{}
	total := 0
	for pair := range 2 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				_, f, err := sink.Recv(pair, 0)
				mu.Lock()
				if err == nil {
					total++
					from := f[11]
					if seq, err := number(f); err != nil || seq != next[from] {
						t.Errorf("sender %d: frame %d in place %d (%v)", from, seq, next[from], err)
						total = senders * frames
					}
					next[from]++
				}
				done := total >= senders*frames || t.Failed()
				mu.Unlock()
				if done {
					return
				}
				if err != nil {
					runtime.Gosched()
				}
			}
		}()
	}
	wg.Wait()
}

// TestPortsComeAndGoUnderTraffic: nothing is lost between ports that stay.
func TestPortsComeAndGoUnderTraffic(t *testing.T) {
	vhosttest.NoLeaks(t)
	s := newSwitch(t, l2switch.Config{Hold: time.Minute})
	a := start(t, s, l2switch.PortConfig{Name: "a"}, vhosttest.Options{})
	b := start(t, s, l2switch.PortConfig{Name: "b"}, vhosttest.Options{})
	a.meet(t, 1, b)
	b.meet(t, 2, a)
	var wg sync.WaitGroup
	wg.Add(2)
	stop := make(chan struct{})
	go func() { defer wg.Done(); flood(t, a, mac(2), mac(1), 20000) }()
	go func() { defer wg.Done(); defer close(stop); inOrder(t, b, 20000) }()
	for i := 0; ; i++ {
		select {
		case <-stop:
			wg.Wait()
			if n := len(s.Stats().Ports); n != 2 {
				t.Errorf("%d ports are left", n)
			}
			return
		default:
		}
		d, err := s.AddPort(l2switch.PortConfig{Name: "guest", Guard: l2switch.Guard{MACs: []l2switch.MAC{mac(50 + i%3)}}})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Update(l2switch.PortConfig{Name: "guest", Isolated: i%2 == 0, VLAN: l2switch.VLAN{Access: uint16(1 + i%3)}}); err != nil {
			t.Fatal(err)
		}
		s.Table()
		s.Stats()
		if i%2 == 0 {
			if err := s.RemovePort("guest"); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCutFrameArrivesWhole: a frame is cut for its receiver, who has posted too little for all of it, and no other frame comes after. What is left goes out as
// soon as more is posted, although the sender, on whose thread it was cut, has nothing more to do with it.
func TestCutFrameArrivesWhole(t *testing.T) {
	for name, o := range map[string]vhosttest.Options{
		"split": {Without: virtio.FEventIdx}, "event index": {}, "packed": {Packed: true}, "packed, no event index": {Packed: true, Without: virtio.FEventIdx},
	} {
		t.Run(name, func(t *testing.T) {
			vhosttest.NoLeaks(t)
			s := newSwitch(t, l2switch.Config{})
			a := start(t, s, l2switch.PortConfig{Name: "a"}, vhosttest.Options{SendSize: 1 << 16})
			o.QueueSize, o.Without = 16, o.Without|virtio.FNetGuestTSO4
			b := start(t, s, l2switch.PortConfig{Name: "b"}, o)
			const segments, size = 50, 1000
			f := ether(everybody, mac(1), tIPv4, ip4("192.0.2.1", "192.0.2.2", pTCP, 0, make([]byte, 20+segments*size)...))
			f[34+12] = 5 << 4
			hdr := virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, GSOType: virtio.GSOTCPv4, GSOSize: size, CsumStart: 34, CsumOffset: 16}
			for range 3 {
				time.Sleep(5 * time.Millisecond) // the receiveq's worker sleeps until there is a frame
				if err := a.Send(0, hdr, f, nil); err != nil {
					t.Fatal(err)
				}
				for range segments {
					if got := b.recv(t); len(got) != 54+size {
						t.Fatalf("%d bytes, want a segment of %d", len(got), 54+size)
					}
				}
			}
		})
	}
}

// gonePages are guest memory of which the file has been truncated.
func gonePages(t *testing.T) []byte {
	t.Helper()
	const size = 1 << 16
	fd, err := unix.MemfdCreate("gone", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	r, err := guestmem.NewRegion(fd, 0, 0, 0x7e00_0000_0000, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Discard)
	if err := unix.Ftruncate(fd, 0); err != nil {
		t.Fatal(err)
	}
	return r.Bytes()
}

// TestFaultAtTheDeadlineIsCounted: a frame that waits, and whose pages are gone when they are to be copied, is dropped for that at the port that it was for.
func TestFaultAtTheDeadlineIsCounted(t *testing.T) {
	l := newLab(t, l2switch.Config{Hold: time.Millisecond}, l2switch.PortConfig{Name: "a"}, l2switch.PortConfig{Name: "b"})
	l.passes("b", "a", ether(mac(1), mac(2), 0x88b5), nil)
	var released atomic.Int32
	u := zerocopy.Ubuf{Callback: func(*zerocopy.Ubuf, zerocopy.Outcome) { released.Add(1) }}
	b := zerocopy.NewUbufBuffer(u, virtio.NetHdr{}, ether(mac(2), mac(1), 0x88b5), gonePages(t)[:1000])
	l.ports["a"].Queue(0).Send([]*zerocopy.Buffer{b})
	vhosttest.Eventually(t, "the frame is released", func() bool { return released.Load() == 1 })
	vhosttest.Eventually(t, "the fault is counted", func() bool { return l.drops("b", l2switch.DropFault) == 1 })
	if n := l.ports["b"].Queue(0).Counters().RecvDropped; n != 1 {
		t.Errorf("%d frames were dropped, want 1", n)
	}
}
