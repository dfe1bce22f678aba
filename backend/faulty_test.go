package backend_test

import (
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// A netdev that is not well. Each fault is put under a whole session with traffic, beside a neighbour that must not notice (newNeighbour), and nothing may
// be left over at the end (NoLeaks).

// faulty is a device of one queue pair whose calls do what the test says. Once a session has it, its fields are changed by change alone.
type faulty struct {
	room, in *sys.EventFD

	mu       sync.Mutex
	send     func(bufs []*zerocopy.Buffer) int // nil: all are copied
	recv     func(p *zerocopy.Posted, max int) (n int, idle bool, err error)
	reap     func()
	offloads error // what SetOffloads answers
	pairs    error // what SetPairs answers
	held     []*zerocopy.Buffer
}

func newFaulty(t *testing.T) *faulty {
	t.Helper()
	f := &faulty{}
	for _, fd := range []**sys.EventFD{&f.room, &f.in} {
		var err error
		if *fd, err = sys.NewEventFD(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { (*fd).Close() })
	}
	return f
}

func (f *faulty) Capabilities() netdev.Capabilities {
	return netdev.Capabilities{Kind: "faulty", MaxPairs: 1, FromGuest: offload.All, ToGuest: offload.All}
}
func (f *faulty) SetOffloads(offload.Set) error { return now(f, &f.offloads) }
func (f *faulty) SetPairs(int) error            { return now(f, &f.pairs) }
func (f *faulty) Queue(int) netdev.Queue        { return f }
func (f *faulty) Close() error                  { return nil }
func (f *faulty) SendFD() int                   { return f.room.FD() }
func (f *faulty) RecvFD() int                   { return f.in.FD() }
func (f *faulty) Counters() netdev.Counters     { return netdev.Counters{} }

// change gives the device other behaviour, while workers and the session call it.
func change[T any](f *faulty, field *T, to T) {
	f.mu.Lock()
	defer f.mu.Unlock()
	*field = to
}

// now reads a field that change writes.
func now[T any](f *faulty, field *T) T {
	f.mu.Lock()
	defer f.mu.Unlock()
	return *field
}

func (f *faulty) Send(bufs []*zerocopy.Buffer) int {
	if send := now(f, &f.send); send != nil {
		return send(bufs)
	}
	zerocopy.ReleaseAll(bufs, zerocopy.Copied)
	return len(bufs)
}

func (f *faulty) Recv(p *zerocopy.Posted, max int) (int, bool, error) {
	if recv := now(f, &f.recv); recv != nil {
		return recv(p, max)
	}
	return 0, true, nil
}

func (f *faulty) Reap() {
	if reap := now(f, &f.reap); reap != nil {
		reap()
	}
}

// hold keeps buffers.
func (f *faulty) hold(bufs []*zerocopy.Buffer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held = append(f.held, bufs...)
}

// take returns what is held, and forgets it.
func (f *faulty) take() []*zerocopy.Buffer {
	f.mu.Lock()
	defer f.mu.Unlock()
	held := f.held
	f.held = nil
	return held
}

// patient is how long a ring's frames are waited for when it stops. A ring that stops has the same time again for everything else.
const patient = 300 * time.Millisecond

// sick is a guest on a device that is not well.
type sick struct {
	*vhosttest.Guest
	be  *backend.Backend
	log *lockedBuffer
	n   *neighbour
}

func startSick(t *testing.T, f netdev.Device) *sick {
	t.Helper()
	s := &sick{n: newNeighbour(t), log: &lockedBuffer{}}
	be, err := backend.New(backend.Options{Device: f, DrainTimeout: patient, Log: textLog(s.log)})
	if err != nil {
		t.Fatal(err)
	}
	s.be, s.Guest = be, vhosttest.Start(t, be, vhosttest.Options{QueueSize: 64})
	return s
}

// stops stops a queue, in time.
func (s *sick) stops(t *testing.T, index int) {
	t.Helper()
	before := time.Now()
	s.Queues[index].Stop()
	if took := time.Since(before); took > 20*patient { // many times what it should take: the machine may be busy
		t.Errorf("queue %d stopped after %v, frames in flight are waited for %v", index, took, patient)
	}
	s.n.goesOn(t)
}

// TestFaultySend: what a device may do to frames, however ill it behaves: each chain comes back once, in order, and is counted as what became of it.
func TestFaultySend(t *testing.T) {
	const frames = 3000
	for name, c := range map[string]struct {
		send func(f *faulty, r *rand.Rand, bufs []*zerocopy.Buffer) int
		late func(f *faulty, r *rand.Rand) // called every now and then, from elsewhere
		want func(outcomes map[string]uint64) bool
	}{
		"fails": {
			send: func(f *faulty, _ *rand.Rand, bufs []*zerocopy.Buffer) int {
				zerocopy.ReleaseAll(bufs, zerocopy.Dropped)
				return len(bufs)
			},
			want: func(o map[string]uint64) bool { return o["dropped"] == frames },
		},
		"takes some of a batch": {
			send: func(f *faulty, r *rand.Rand, bufs []*zerocopy.Buffer) int {
				n := r.IntN(min(len(bufs), 5) + 1)
				zerocopy.ReleaseAll(bufs[:n], zerocopy.Copied)
				return n
			},
			want: func(o map[string]uint64) bool { return o["copied"] == frames },
		},
		"fails some of a batch": {
			send: func(f *faulty, r *rand.Rand, bufs []*zerocopy.Buffer) int {
				for _, b := range bufs {
					b.Release([]zerocopy.Outcome{zerocopy.Copied, zerocopy.Dropped, zerocopy.ZeroCopied}[r.IntN(3)])
				}
				return len(bufs)
			},
			want: func(o map[string]uint64) bool {
				return o["copied"]+o["dropped"]+o["zerocopied"] == frames && o["dropped"] > 0
			},
		},
		"late and out of order": {
			send: func(f *faulty, r *rand.Rand, bufs []*zerocopy.Buffer) int {
				f.hold(bufs)
				return len(bufs)
			},
			late: func(f *faulty, r *rand.Rand) {
				held := f.take()
				r.Shuffle(len(held), func(i, j int) { held[i], held[j] = held[j], held[i] })
				n := r.IntN(len(held) + 1)
				for _, b := range held[:n] {
					b.Release(zerocopy.ZeroCopied)
				}
				f.hold(held[n:])
			},
			want: func(o map[string]uint64) bool { return o["zerocopied"] == frames },
		},
		"stalls now and then": {
			send: func(f *faulty, r *rand.Rand, bufs []*zerocopy.Buffer) int {
				if r.IntN(3) == 0 {
					f.room.Block()
					return 0
				}
				zerocopy.ReleaseAll(bufs, zerocopy.Copied)
				return len(bufs)
			},
			late: func(f *faulty, _ *rand.Rand) { f.room.Drain() },
			want: func(o map[string]uint64) bool { return o["copied"] == frames },
		},
	} {
		t.Run(name, func(t *testing.T) {
			vhosttest.NoLeaks(t)
			f := newFaulty(t)
			sending, late := rand.New(rand.NewPCG(1, 2)), rand.New(rand.NewPCG(3, 4))
			f.send = func(bufs []*zerocopy.Buffer) int { return c.send(f, sending, bufs) }
			stop := make(chan struct{})
			var elsewhere sync.WaitGroup
			if c.late != nil {
				elsewhere.Go(func() {
					for {
						select {
						case <-stop:
							return
						case <-time.After(50 * time.Microsecond):
							c.late(f, late)
						}
					}
				})
			}
			s := startSick(t, f)
			for i := range frames {
				if err := s.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(i), 100), nil); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.Transmitq(0).Settle(); err != nil {
				t.Error(err)
			}
			s.stops(t, 1)
			close(stop)
			elsewhere.Wait()
			st := s.be.Stats()
			if q := st.Queues[1]; q.Frames != frames || q.GivenUp != 0 || !c.want(q.Outcomes) {
				t.Errorf("%+v", q)
			}
			if st.GuestErrors+st.FrontEndErrors != 0 {
				t.Errorf("the device's fault is laid to others: %+v", st)
			}
		})
	}
}

// TestFaultyStall: a device that takes nothing any more. The ring stops in time and gives back what was not sent: a device that is well gets it.
func TestFaultyStall(t *testing.T) {
	vhosttest.NoLeaks(t)
	f := newFaulty(t)
	var stalled atomic.Bool
	stalled.Store(true)
	var got atomic.Uint64
	f.send = func(bufs []*zerocopy.Buffer) int {
		if stalled.Load() {
			f.room.Block()
			return 0
		}
		for _, b := range bufs {
			data := make([]byte, b.Len())
			b.CopyTo(data, 0)
			if seq, err := vhosttest.CheckFrame(data); err != nil || seq != got.Load() {
				t.Errorf("frame %d, want %d: %v", seq, got.Load(), err)
			}
			got.Add(1)
		}
		zerocopy.ReleaseAll(bufs, zerocopy.Copied)
		return len(bufs)
	}
	s := startSick(t, f)
	q := s.Transmitq(0)
	const frames = 40
	for i := range frames {
		if err := s.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(i), 100), nil); err != nil {
			t.Fatal(err)
		}
	}
	s.n.goesOn(t)
	before := time.Now()
	base, err := s.FE.GetVringBase(1)
	if took := time.Since(before); err != nil || took > 20*patient {
		t.Fatalf("GET_VRING_BASE: %v after %v", err, took)
	}
	if n := q.Reap(); n != 0 || uint16(base) != vhosttest.StartIndex {
		t.Fatalf("%d chains came back unsent, base %#x", n, base)
	}
	stalled.Store(false)
	f.room.Drain()
	q.Base = uint16(base)
	q.Start()
	if err := q.Settle(); err != nil || got.Load() != frames {
		t.Errorf("%d frames of %d were sent in the end: %v", got.Load(), frames, err)
	}
	s.n.goesOn(t)
}

// TestFaultyNever: a device that keeps every frame for ever. The ring stops at the deadline, every chain comes back once, and what the device does with its buffers
// afterwards touches nobody.
func TestFaultyNever(t *testing.T) {
	vhosttest.NoLeaks(t)
	f := newFaulty(t)
	f.send = func(bufs []*zerocopy.Buffer) int {
		f.hold(bufs)
		return len(bufs)
	}
	s := startSick(t, f)
	const frames = 50
	for i := range frames {
		if err := s.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(i), 100), nil); err != nil {
			t.Fatal(err)
		}
	}
	vhosttest.Eventually(t, "frames in the device", func() bool { return s.be.Stats().Queues[1].Pending == frames })
	s.stops(t, 1)
	if n := s.Transmitq(0).Reap(); n != frames {
		t.Errorf("%d chains came back, want %d", n, frames)
	}
	if q := s.be.Stats().Queues[1]; q.GivenUp != frames {
		t.Errorf("%+v", q)
	}
	if log := s.log.String(); !strings.Contains(log, "frames still in flight were returned") {
		t.Errorf("the log does not say so:\n%s", log)
	}
	change(f, &f.send, nil)
	s.Transmitq(0).Start()
	if err := s.Send(0, virtio.NetHdr{}, vhosttest.Frame(0, 100), nil); err != nil {
		t.Fatal(err)
	}
	for _, b := range f.take() {
		b.Release(zerocopy.ZeroCopied)
	}
	if err := s.Transmitq(0).Settle(); err != nil {
		t.Error(err)
	}
}

// TestFaultyRecv: a device that cannot receive any more says so once; the guest goes on sending. When it can again, it is heard of as soon as the ring starts
// again.
func TestFaultyRecv(t *testing.T) {
	vhosttest.NoLeaks(t)
	f := newFaulty(t)
	f.recv = func(*zerocopy.Posted, int) (int, bool, error) { return 0, false, errors.New("the cable is cut") }
	f.in.Signal() // readable for ever: a worker that polled it would spin
	s := startSick(t, f)
	for i := range 500 {
		if err := s.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(i), 100), nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Transmitq(0).Settle(); err != nil {
		t.Error(err)
	}
	failures := func() int { return strings.Count(s.log.String(), "the cable is cut") }
	vhosttest.Eventually(t, "a line about the failure", func() bool { return failures() > 0 }) // a worker that has not begun yet sleeps as well
	sleeps(t, s.be, 0)
	if n := failures(); n != 1 {
		t.Errorf("the error is logged %d times:\n%s", n, s.log.String())
	}
	s.stops(t, 0)
	frame := vhosttest.Frame(0, 100)
	change(f, &f.recv, func(p *zerocopy.Posted, _ int) (int, bool, error) {
		switch {
		case frame == nil:
			return 0, false, errors.New("the cable is cut")
		case p.Write(virtio.NetHdr{}, [][]byte{frame}) == zerocopy.NoRoom:
			return 0, false, nil
		}
		frame = nil
		return 1, false, nil
	})
	s.Queues[0].Start()
	if _, got, err := s.Recv(0, vhosttest.Patience); err != nil {
		t.Errorf("after the device's recovery: %v", err)
	} else if _, err := vhosttest.CheckFrame(got); err != nil {
		t.Error(err)
	}
	vhosttest.Eventually(t, "a line about the second failure", func() bool { return failures() == 2 })
	s.stops(t, 0)
	s.stops(t, 1)
}

// TestFaultySetUp: what a device refuses is refused to the front-end, which may go on without.
func TestFaultySetUp(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	f := newFaulty(t)
	f.offloads = errors.New("not now")
	be, err := backend.New(backend.Options{Device: f, Log: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	g := vhosttest.New(t, be, vhosttest.Options{})
	g.Dial()
	features, err := g.FE.GetFeatures()
	if err != nil {
		t.Fatal(err)
	}
	protocol, err := g.FE.GetProtocolFeatures()
	if err == nil {
		err = g.FE.SetProtocolFeatures(protocol)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := g.FE.SetFeatures(features &^ uint64(virtio.FRingPacked)); err == nil {
		t.Error("SET_FEATURES was accepted, and the device had refused the offloads")
	}
	change(f, &f.offloads, nil)
	g.Connect()
	g.StartQueues()
	change(f, &f.pairs, errors.New("not now"))
	if err := g.FE.SetVringEnable(0, false); err != nil {
		t.Errorf("one of the pair's rings is enabled still: %v", err)
	}
	n.goesOn(t)
	if st := be.Stats(); st.FrontEndErrors != 1 {
		t.Errorf("%d requests were refused, want 1", st.FrontEndErrors)
	}
}
