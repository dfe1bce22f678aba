package backend_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
)

// served counts back-ends.
var served atomic.Int32

// serve makes a Backend of d. Its log goes to the test's. Every other one has a worker for both queues of a pair, so of two that are linked one does.
func serve(t testing.TB, d *device, set ...func(*backend.Options)) *backend.Backend {
	t.Helper()
	o := backend.Options{
		Device: d, Poll: 20 * time.Microsecond, DrainTimeout: 200 * time.Millisecond, Log: logger(t), PairWorkers: served.Add(1)%2 == 0,
	}
	for _, f := range set {
		f(&o)
	}
	b, err := backend.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// logger shows what the back-end logged when the test fails.
func logger(t testing.TB) *slog.Logger {
	var w lockedBuffer
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the back-end's log:\n%s", w.String())
		}
	})
	return textLog(&w)
}

func textLog(w *lockedBuffer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (w *lockedBuffer) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.b.Len() > logTail { // what is long ago is of no use, and would pass for a leak
		w.b.Next(w.b.Len() - logTail/2)
	}
	return w.b.Write(p)
}

// logTail is how much of a log is kept, in bytes.
const logTail = 64 << 10

func (w *lockedBuffer) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.String()
}

// end is one guest, with its back-end and device.
type end struct {
	*vhosttest.Guest
	dev    *device
	be     *backend.Backend
	faults uint64 // the front-end errors that were counted when it last worked
}

// start makes an end on d.
func start(t testing.TB, d *device, o vhosttest.Options, set ...func(*backend.Options)) *end {
	t.Helper()
	b := serve(t, d, set...)
	return &end{Guest: vhosttest.Start(t, b, o), dev: d, be: b}
}

// link makes two guests that are wired to each other, and checks at the end that nothing leaked.
func link(t testing.TB, o vhosttest.Options) (a, b *end) {
	t.Helper()
	vhosttest.NoLeaks(t)
	da, db := newLink(t, max(o.Pairs, 1))
	return start(t, da, o), start(t, db, o)
}

// flow is a stream of numbered frames over a pair.
type flow struct {
	from, to *end
	pair     int
	frames   int
	sizes    []int
	layout   vhosttest.Layout
}

// run sends the frames and receives them, both at the same time, and checks that each arrives once, in order and unchanged.
func (f flow) run() error {
	sent := make(chan error, 1)
	go func() { sent <- f.send() }()
	err := f.receive()
	return errors.Join(err, <-sent)
}

func (f flow) send() error {
	for i := range f.frames {
		frame := vhosttest.Frame(uint64(i), f.sizes[i%len(f.sizes)])
		if err := f.from.Send(f.pair, virtio.NetHdr{}, frame, f.layout); err != nil {
			return fmt.Errorf("sending frame %d: %w", i, err)
		}
	}
	return f.from.Transmitq(f.pair).Settle()
}

func (f flow) receive() error {
	for i := range f.frames {
		_, frame, err := f.to.Recv(f.pair, vhosttest.Patience)
		if err != nil {
			return fmt.Errorf("receiving frame %d: %w", i, err)
		}
		if err := check(frame, i); err != nil {
			return err
		}
	}
	return nil
}

func check(frame []byte, want int) error {
	seq, err := vhosttest.CheckFrame(frame)
	if err == nil && seq != uint64(want) {
		err = fmt.Errorf("frame %d arrived, want %d", seq, want)
	}
	return err
}

// runAll runs flows at the same time.
func runAll(t testing.TB, flows ...flow) {
	t.Helper()
	errs := make(chan error)
	for _, f := range flows {
		go func() { errs <- f.run() }()
	}
	for range flows {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}

// both is one flow each way over pair 0.
func both(a, b *end, frames int, l vhosttest.Layout, sizes ...int) []flow {
	return []flow{
		{from: a, to: b, frames: frames, sizes: sizes, layout: l}, {from: b, to: a, frames: frames, sizes: sizes, layout: l},
	}
}

// neighbour is a session that has nothing to do with the one under attack, and must not notice: two guests that play ping-pong from its
// start to the end of the test.
type neighbour struct {
	rounds atomic.Uint64
	cancel context.CancelFunc
	done   chan error
}

func newNeighbour(t testing.TB) *neighbour {
	t.Helper()
	da, db := newLink(t, 1)
	a, b := start(t, da, vhosttest.Options{}), start(t, db, vhosttest.Options{})
	n := &neighbour{done: make(chan error, 1)}
	var ctx context.Context
	ctx, n.cancel = context.WithCancel(context.Background())
	go func() { n.done <- n.play(ctx, a, b) }()
	t.Cleanup(func() {
		t.Helper()
		n.cancel()
		if err := <-n.done; err != nil {
			t.Errorf("the neighbour noticed: %v", err)
		}
		for _, e := range []*end{a, b} {
			if st := e.be.Stats(); st.FrontEndErrors+st.GuestErrors != 0 || st.Sessions != 1 {
				t.Errorf("the neighbour had %d front-end errors, %d guest errors, %d sessions", st.FrontEndErrors, st.GuestErrors, st.Sessions)
			}
		}
	})
	return n
}

func (n *neighbour) play(ctx context.Context, a, b *end) error {
	for i := 0; ctx.Err() == nil; i++ {
		for _, f := range both(a, b, 1, nil, 100+i%1000) {
			if err := f.run(); err != nil {
				return fmt.Errorf("round %d: %w", i, err)
			}
		}
		n.rounds.Add(1)
		time.Sleep(100 * time.Microsecond)
	}
	return nil
}

// goesOn waits until the neighbour has played some more rounds.
func (n *neighbour) goesOn(t testing.TB) {
	t.Helper()
	want := n.rounds.Load() + 3
	vhosttest.Eventually(t, "the neighbour's next rounds", func() bool { return n.rounds.Load() >= want })
}

// sleeps waits until a queue's worker has slept for a while. Now and then it may wake: a look at the statistics can wake it, a message, and the garbage
// collector, by a signal.
func sleeps(t testing.TB, be *backend.Backend, queue int) {
	t.Helper()
	waits := func() uint64 { return be.Stats().Queues[queue].Waits }
	vhosttest.Eventually(t, "the worker hardly wakes in 100 ms", func() bool {
		had := waits()
		time.Sleep(100 * time.Millisecond)
		return waits() <= had+5
	})
}
