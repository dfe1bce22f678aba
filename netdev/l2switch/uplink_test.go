package l2switch_test

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/l2switch"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/null"
	"github.com/vhostd/vhostd/netdev/pair"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// uplink gives a switch an uplink, and returns the other end of its cable.
func uplink(t testing.TB, s *l2switch.Switch, o pair.Options, c l2switch.PortConfig) *pair.Device {
	t.Helper()
	near, far, err := pair.New(o)
	if err != nil {
		t.Fatal(err)
	}
	c.Name = "uplink"
	if err := s.Uplink(near, c); err != nil {
		t.Fatal(err)
	}
	return far
}

// TestUplinkDevice: a port passes the suite through an uplink.
func TestUplinkDevice(t *testing.T) {
	for _, o := range []pair.Options{{}, {Hold: true}, {Slots: 16}} {
		netdevtest.Run(t, func(t *testing.T) netdevtest.Harness {
			s := newSwitch(t, l2switch.Config{})
			far := uplink(t, s, o, l2switch.PortConfig{})
			peer := netdevtest.NewPeer(t, far)
			inject := func(f []byte) { // the suite has frames be there when it goes on
				before := s.Stats().Ports[0].FromGuest.Frames
				peer.Inject(f)
				vhosttest.Eventually(t, "the frame on the switch", func() bool {
					st := s.Stats()
					return st.Ports[0].FromGuest.Frames > before && uint64(st.Ports[1].Waiting)+st.Ports[1].ToGuest.Frames > before
				})
			}
			return netdevtest.Harness{
				Device: addPort(t, s, l2switch.PortConfig{Name: "a"}), MaxFrame: virtio.MaxFrame - 4, Capture: peer.Capture, Inject: inject,
				SendAllocates: true, RecvAllocates: true, // nobody has the Door, and an uplink makes a buffer of each frame
				Close: func() {
					if err := s.Close(); err != nil {
						t.Error(err)
					}
					if err := far.Close(); err != nil {
						t.Error(err)
					}
				},
			}
		})
	}
}

// TestUplinkJoinsSwitches: guests of two switches talk over a cable between them, in order and without loss.
func TestUplinkJoinsSwitches(t *testing.T) {
	vhosttest.NoLeaks(t)
	near, far, err := pair.New(pair.Options{Slots: 512})
	if err != nil {
		t.Fatal(err)
	}
	var g [2]vm
	for i, d := range []netdev.Device{near, far} {
		s := newSwitch(t, l2switch.Config{Hold: time.Minute})
		if err := s.Uplink(d, l2switch.PortConfig{Name: "uplink"}); err != nil {
			t.Fatal(err)
		}
		g[i] = start(t, s, l2switch.PortConfig{Name: "guest"}, vhosttest.Options{QueueSize: 64})
	}
	g[0].meet(t, 0, g[1])
	g[1].meet(t, 1, g[0])
	const frames = 5000
	var wg sync.WaitGroup
	for i := range g {
		wg.Add(2)
		go func() { defer wg.Done(); flood(t, g[i], mac(1-i), mac(i), frames) }()
		go func() { defer wg.Done(); inOrder(t, g[i], frames) }()
	}
	wg.Wait()
}

// TestUplinkThatTakesNothingKeepsNoPages: a device that is full for good has copies, and the sender its pages.
func TestUplinkThatTakesNothingKeepsNoPages(t *testing.T) {
	vhosttest.NoLeaks(t)
	s := newSwitch(t, l2switch.Config{})
	far := uplink(t, s, pair.Options{Slots: 4}, l2switch.PortConfig{})
	g := start(t, s, l2switch.PortConfig{Name: "guest"}, vhosttest.Options{})
	for i := range uint64(100) {
		g.send(t, frame(mac(1), mac(0), i, 1000))
	}
	if err := g.Transmitq(0).Settle(); err != nil {
		t.Fatal(err)
	}
	peer := netdevtest.NewPeer(t, far)
	for i := range uint64(100) {
		if _, f := peer.Capture(); true {
			if seq, err := number(f); seq != i || err != nil {
				t.Fatalf("frame %d in place %d, %v", seq, i, err)
			}
		}
	}
	if err := s.RemovePort("uplink"); err != nil {
		t.Fatal(err)
	}
	if err := far.Close(); err != nil {
		t.Fatal(err)
	}
}

// full is a device that has no room until it is opened, and counts how often it is asked.
type full struct {
	netdev.Device
	queue fullQueue
}

type fullQueue struct {
	netdev.Queue
	fd          int
	open        atomic.Bool
	asked, took atomic.Int64
}

// newFull returns a device whose SendFD is fd.
func newFull(t *testing.T, fd int) *full {
	t.Helper()
	dev, err := null.New(null.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return &full{Device: dev, queue: fullQueue{Queue: dev.Queue(0), fd: fd}}
}

func (f *full) Queue(int) netdev.Queue { return &f.queue }

func (q *fullQueue) Send(bufs []*zerocopy.Buffer) int {
	q.asked.Add(1)
	if !q.open.Load() {
		return 0
	}
	q.took.Add(int64(len(bufs)))
	return q.Queue.Send(bufs)
}

func (q *fullQueue) SendFD() int { return q.fd }

// TestUplinkThatTakesNothingIsLeftAlone: a device that is full is waited for, and not asked again and again, however many frames wait behind those that it has
// not taken.
func TestUplinkThatTakesNothingIsLeftAlone(t *testing.T) {
	room, err := sys.NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	defer room.Close()
	room.Block()
	f := newFull(t, room.FD())
	l := newLab(t, l2switch.Config{Hold: time.Millisecond})
	if err := l.s.Uplink(f, l2switch.PortConfig{Name: "uplink"}); err != nil {
		t.Fatal(err)
	}
	l.add(l2switch.PortConfig{Name: "guest"})
	const frames = 200
	for i := range uint64(frames) {
		l.send("guest", virtio.NetHdr{}, frame(mac(1), mac(0), i, 1000))
	}
	time.Sleep(50 * time.Millisecond) // sweeps
	before := f.queue.asked.Load()
	time.Sleep(100 * time.Millisecond)
	if n := f.queue.asked.Load() - before; n > 10 {
		t.Errorf("a device without room was asked %d times in 100 ms", n)
	}
	f.queue.open.Store(true)
	room.Drain()
	vhosttest.Eventually(t, "all frames are sent", func() bool { return f.queue.took.Load() == frames })
}

// TestUplinkThatCannotTell: a device that is full and has no descriptor to tell when it is not is asked again after a while, though nobody else sends.
func TestUplinkThatCannotTell(t *testing.T) {
	f := newFull(t, -1)
	l := newLab(t, l2switch.Config{Hold: time.Minute})
	if err := l.s.Uplink(f, l2switch.PortConfig{Name: "uplink"}); err != nil {
		t.Fatal(err)
	}
	l.add(l2switch.PortConfig{Name: "guest"})
	l.send("guest", virtio.NetHdr{}, frame(mac(1), mac(0), 1, 1000))
	time.Sleep(20 * time.Millisecond)
	f.queue.open.Store(true)
	vhosttest.Eventually(t, "the frame is sent", func() bool { return f.queue.took.Load() == 1 })
}

// TestUplinkThatLeftIsSentNothing: a guest's thread found an uplink that was then removed. Its device, which is closed, is not used any more, and the frame comes back.
func TestUplinkThatLeftIsSentNothing(t *testing.T) {
	f := newFull(t, -1)
	f.queue.open.Store(true)
	s := newSwitch(t, l2switch.Config{})
	if err := s.Uplink(f, l2switch.PortConfig{Name: "uplink"}); err != nil {
		t.Fatal(err)
	}
	guest := addPort(t, s, l2switch.PortConfig{Name: "guest"})
	defer guest.Close()
	pass := l2switch.PassLate(s, guest, "uplink")
	if err := s.RemovePort("uplink"); err != nil {
		t.Fatal(err)
	}
	before := f.queue.asked.Load()
	released := 0
	u := zerocopy.Ubuf{Callback: func(*zerocopy.Ubuf, zerocopy.Outcome) { released++ }}
	pass(zerocopy.NewUbufBuffer(u, virtio.NetHdr{}, frame(mac(1), mac(0), 1, 100)))
	if n := f.queue.asked.Load() - before; n != 0 || released != 1 {
		t.Errorf("a closed device was asked to send %d times, the frame was released %d times", n, released)
	}
}

// orphaner is full, and counts how often it is asked to keep no pages.
type orphaner struct {
	*full
	queue orphanerQueue
}

type orphanerQueue struct {
	*fullQueue
	asked int
}

func (o *orphaner) Queue(int) netdev.Queue { return &o.queue }

func (q *orphanerQueue) Orphan() { q.asked++ }

// TestUplinkThatLeftIsNotOrphaned: somebody found an uplink that was then removed, and has it keep no pages. Its device is closed, which it may be on another thread at
// that moment, and has released all.
func TestUplinkThatLeftIsNotOrphaned(t *testing.T) {
	o := &orphaner{full: newFull(t, -1)}
	o.queue.fullQueue = &o.full.queue
	s := newSwitch(t, l2switch.Config{})
	if err := s.Uplink(o, l2switch.PortConfig{Name: "uplink"}); err != nil {
		t.Fatal(err)
	}
	orphan := l2switch.OrphanLate(s, "uplink")
	if orphan(); o.queue.asked != 1 {
		t.Errorf("a device was asked to keep no pages %d times, want 1", o.queue.asked)
	}
	if err := s.RemovePort("uplink"); err != nil {
		t.Fatal(err)
	}
	if orphan(); o.queue.asked != 1 {
		t.Error("a closed device was asked to keep no pages")
	}
}

// faulty is an uplink's device that releases the first frame it is given, has something done, and then meets pages that are gone.
type faulty struct {
	*full
	queue faultyQueue
}

type faultyQueue struct {
	netdev.Queue
	between func()
	pages   []byte
}

func (f *faulty) Queue(int) netdev.Queue { return &f.queue }

func (q *faultyQueue) Send(bufs []*zerocopy.Buffer) int {
	bufs[0].Release(zerocopy.Copied)
	q.between()
	return len(bufs) + int(q.pages[0])
}

// TestUplinkFaultLeavesOthersFrames: what a fault in an uplink's batch ends is that batch. A frame that its device had released by then, and whose place another
// uplink's has taken, is that one's.
func TestUplinkFaultLeavesOthersFrames(t *testing.T) {
	l := newLab(t, l2switch.Config{Hold: time.Minute})
	var released [2]atomic.Int32
	send := func(port string, n int, dst l2switch.MAC) {
		u := zerocopy.Ubuf{Callback: func(*zerocopy.Ubuf, zerocopy.Outcome) { released[n].Add(1) }}
		l.ports[port].Queue(0).Send([]*zerocopy.Buffer{zerocopy.NewUbufBuffer(u, virtio.NetHdr{}, ether(dst, mac(n), 0x88b5))})
	}
	waits, broken := newFull(t, -1), newFull(t, -1)
	queue := faultyQueue{Queue: broken.Device.Queue(0), pages: gonePages(t), between: func() { send("b", 1, mac(10)) }}
	for name, up := range map[string]struct {
		dev netdev.Device
		mac l2switch.MAC
	}{"waits": {waits, mac(10)}, "broken": {&faulty{broken, queue}, mac(11)}} {
		if err := l.s.Uplink(up.dev, l2switch.PortConfig{Name: name, Guard: l2switch.Guard{MACs: []l2switch.MAC{up.mac}}}); err != nil {
			t.Fatal(err)
		}
	}
	l.add(l2switch.PortConfig{Name: "a"})
	l.add(l2switch.PortConfig{Name: "b"})
	send("a", 0, mac(11))
	vhosttest.Eventually(t, "the fault is counted", func() bool { return l.drops("broken", l2switch.DropFault) == 1 })
	if n := released[0].Load(); n != 1 {
		t.Errorf("the frame was released %d times", n)
	}
	if n := released[1].Load(); n != 0 {
		t.Errorf("the other uplink's frame, which waits, was released %d times", n)
	}
	waits.queue.open.Store(true)
	vhosttest.Eventually(t, "the other frame is sent", func() bool { return released[1].Load() == 1 && waits.queue.took.Load() == 1 })
}

// TestUplinkBlockedDuringSweep: a sweep has been past an uplink when that becomes full with a frame. It is swept again, and the frame's pages go back.
func TestUplinkBlockedDuringSweep(t *testing.T) {
	f := newFull(t, -1)
	l := newLab(t, l2switch.Config{Hold: time.Millisecond})
	if err := l.s.Uplink(f, l2switch.PortConfig{Name: "uplink", Guard: l2switch.Guard{MACs: []l2switch.MAC{mac(10)}}}); err != nil {
		t.Fatal(err)
	}
	l.add(l2switch.PortConfig{Name: "a"})
	l.add(l2switch.PortConfig{Name: "b", Guard: l2switch.Guard{MACs: []l2switch.MAC{mac(2)}}}) // behind the uplink
	waits := func(n int) {
		t.Helper()
		l.send("a", virtio.NetHdr{}, ether(mac(2), mac(1), 0x88b5))
		vhosttest.Eventually(t, "a copy waits", func() bool { return l.stats("b").Waiting == n && l2switch.Held(l.ports["b"]) == 0 })
	}
	waits(1)
	release := l2switch.HoldSweep(l.ports["b"])
	waits(2)
	time.Sleep(20 * time.Millisecond) // the sweep for that waits at b
	var released atomic.Int32
	u := zerocopy.Ubuf{Callback: func(*zerocopy.Ubuf, zerocopy.Outcome) { released.Add(1) }}
	l.ports["a"].Queue(0).Send([]*zerocopy.Buffer{zerocopy.NewUbufBuffer(u, virtio.NetHdr{}, ether(mac(10), mac(1), 0x88b5))})
	release()
	vhosttest.Eventually(t, "the pages are released", func() bool { return released.Load() == 1 })
}

// flooded is an uplink's device that always has room, and has something done each time it sends.
type flooded struct {
	*pair.Device
	queue floodedQueue
}

type floodedQueue struct {
	netdev.Queue
	between func()
}

func (f *flooded) Queue(int) netdev.Queue { return &f.queue }

func (q *floodedQueue) Send(bufs []*zerocopy.Buffer) int {
	q.between()
	zerocopy.ReleaseAll(bufs, zerocopy.Copied)
	return len(bufs)
}

// TestUplinkFloodHoldsUpNobody: a guest sends to an uplink as fast as that is. Another one's thread, which sends on it, is not kept sending the flood, and neither
// is the uplink's own goroutine, which has frames to receive.
func TestUplinkFloodHoldsUpNobody(t *testing.T) {
	near, far, err := pair.New(pair.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	l := newLab(t, l2switch.Config{Hold: time.Minute})
	var over atomic.Bool
	f := &flooded{near, floodedQueue{Queue: near.Queue(0)}}
	f.queue.between = func() {
		if !over.Load() {
			l.send("b", virtio.NetHdr{}, ether(mac(10), mac(2), 0x88b5)) // finds somebody sending: it waits in the lane
		}
	}
	defer over.Store(true)
	if err := l.s.Uplink(f, l2switch.PortConfig{Name: "uplink", Guard: l2switch.Guard{MACs: []l2switch.MAC{mac(10)}}}); err != nil {
		t.Fatal(err)
	}
	l.add(l2switch.PortConfig{Name: "a"})
	l.add(l2switch.PortConfig{Name: "b"})
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.ports["a"].Queue(0).Send([]*zerocopy.Buffer{zerocopy.NewBuffer(virtio.NetHdr{}, ether(mac(10), mac(1), 0x88b5))})
	}()
	select {
	case <-done:
	case <-time.After(vhosttest.Patience):
		over.Store(true)
		<-done
		t.Fatal("a guest's Send did not return while another one sent")
	}
	in := ether(mac(1), mac(10), 0x88b5)
	netdevtest.NewPeer(t, far).Inject(in)
	l.expect("a", in)
}

// TestUplinkStart: an uplink that is not to begin yet receives nothing, and can be taken away.
func TestUplinkStart(t *testing.T) {
	start := make(chan struct{})
	l := newLab(t, l2switch.Config{Start: start}, l2switch.PortConfig{Name: "a"})
	var peers []*netdevtest.Peer
	for _, name := range []string{"early", "there"} {
		near, far, err := pair.New(pair.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer far.Close()
		if err := l.s.Uplink(near, l2switch.PortConfig{Name: name}); err != nil {
			t.Fatal(err)
		}
		peers = append(peers, netdevtest.NewPeer(t, far))
	}
	if err := l.s.RemovePort("early"); err != nil {
		t.Fatal(err)
	}
	in := ether(everybody, mac(10), 0x88b5)
	peers[1].Inject(in)
	time.Sleep(20 * time.Millisecond) // it would have come
	if st := l.stats("there"); st.FromGuest.Frames != 0 {
		t.Errorf("%d frames came before the start", st.FromGuest.Frames)
	}
	close(start)
	l.expect("a", in)
}
