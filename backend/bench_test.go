package backend_test

import (
	"errors"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/null"
	"github.com/vhostd/vhostd/netdev/pair"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// on is a guest on a device that the project ships.
func on(t testing.TB, d netdev.Device, o vhosttest.Options) *end {
	t.Helper()
	b, err := backend.New(backend.Options{Device: d, Poll: backend.DefaultPoll, Log: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() }) // after the guest's end, which is registered later
	return &end{Guest: vhosttest.Start(t, b, o), be: b}
}

func onNull(t testing.TB, n null.Options, o vhosttest.Options) *end {
	t.Helper()
	d, err := null.New(n)
	if err != nil {
		t.Fatal(err)
	}
	return on(t, d, o)
}

// transmit sends n frames of size bytes, whatever is in the buffers, in batches, and sees them all come back.
func transmit(q *vhosttest.Queue, n, size int, l vhosttest.Layout) error {
	const batch = 64
	for sent := 0; sent < n || q.Driver.Out() > 0; {
		for i := 0; i < batch && sent < n; i++ {
			_, err := q.Resend(virtio.NetHdrSize+size, l)
			if errors.Is(err, vring.ErrFull) {
				break
			}
			if err != nil {
				return err
			}
			sent++
		}
		q.Flush()
		if q.Reap() == 0 {
			if err := q.Driver.Err(); err != nil {
				return err
			}
			runtime.Gosched()
		}
	}
	return nil
}

// receive takes n frames.
func receive(q *vhosttest.Queue, n int) error {
	for n > 0 {
		got, err := q.Drain()
		if err != nil {
			return err
		}
		if n -= got; got == 0 {
			runtime.Gosched()
		}
	}
	return nil
}

// allocsPerFrame counts the allocations of the whole process while f moves n frames.
func allocsPerFrame(t *testing.T, n int, f func() error) float64 {
	t.Helper()
	var before, after runtime.MemStats
	least := 1e9
	for range 5 { // the runtime allocates now and then for itself: the least is ours
		runtime.ReadMemStats(&before)
		if err := f(); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		least = min(least, float64(after.Mallocs-before.Mallocs)/float64(n))
	}
	return least
}

func TestSteadyStateAllocatesNothing(t *testing.T) {
	if require.Race {
		t.Skip("skipped: the race detector allocates on its own account")
	}
	const n = 50_000
	for name, without := range map[string]virtio.Features{"all": 0, "no mrg_rxbuf": virtio.FNetMrgRxbuf, "no ring bits": ringFeatures} {
		for lname, l := range map[string]vhosttest.Layout{"flat": nil, "apart": vhosttest.HeaderApart, "crumbs": vhosttest.Crumbs} {
			t.Run(name+", "+lname, func(t *testing.T) {
				vhosttest.NoLeaks(t)
				e := onNull(t, null.Options{ReadHeaders: true, Generate: true, Size: 1000}, vhosttest.Options{Without: without, RecvLayout: l})
				warm := func(q *vhosttest.Queue) error { return transmit(q, 5000, 300, l) }
				if err := errors.Join(warm(e.Transmitq(0)), receive(e.Receiveq(0), 5000)); err != nil {
					t.Fatal(err)
				}
				// The two directions run at the same time, as they always do: the receiveq's worker never rests.
				if a := allocsPerFrame(t, n, func() error { return transmit(e.Transmitq(0), n, 300, l) }); a > 0.001 {
					t.Errorf("%.4f allocations per frame from the guest", a)
				}
				if a := allocsPerFrame(t, n, func() error { return receive(e.Receiveq(0), n) }); a > 0.001 {
					t.Errorf("%.4f allocations per frame to the guest", a)
				}
			})
		}
	}
}

// pairOfGuests is two guests on netdev/pair.
func pairOfGuests(t testing.TB, p pair.Options, o vhosttest.Options) (a, b *end) {
	t.Helper()
	da, db, err := pair.New(p)
	if err != nil {
		t.Fatal(err)
	}
	return on(t, da, o), on(t, db, o)
}

func TestTrafficOverPair(t *testing.T) {
	for _, hold := range []bool{false, true} {
		t.Run(fmt.Sprintf("hold=%v", hold), func(t *testing.T) {
			vhosttest.NoLeaks(t)
			a, b := pairOfGuests(t, pair.Options{Pairs: 2, Hold: hold}, vhosttest.Options{Pairs: 2})
			var flows []flow
			for i := range 2 {
				for _, f := range both(a, b, 5000, vhosttest.HeaderApart, 60, 1514, 300) {
					f.pair = i
					flows = append(flows, f)
				}
			}
			runAll(t, flows...)
			a.Reconnect()
			runAll(t, flows...)
		})
	}
}

// perPacket reports the time of one frame.
func perPacket(b *testing.B, started time.Time) {
	b.ReportMetric(float64(time.Since(started).Nanoseconds())/float64(b.N), "ns/pkt")
}

var benchSizes = []int{64, 1518, 9000, 65000}

// benchOptions are rings of 256 and buffers that any frame fits in.
func benchOptions(size int) vhosttest.Options {
	return vhosttest.Options{SendSize: size + virtio.NetHdrSize, AtZero: true}
}

func BenchmarkTransmit(b *testing.B) {
	for _, headers := range []bool{false, true} {
		for _, size := range benchSizes {
			b.Run(fmt.Sprintf("size=%d/headers=%v", size, headers), func(b *testing.B) {
				e := onNull(b, null.Options{ReadHeaders: headers}, benchOptions(size))
				b.ResetTimer()
				from := time.Now()
				if err := transmit(e.Transmitq(0), b.N, size, nil); err != nil {
					b.Fatal(err)
				}
				perPacket(b, from)
			})
		}
	}
}

func BenchmarkReceive(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			per := (size + virtio.NetHdrSize + 2047) / 2048 // buffers that a frame is merged over
			e := onNull(b, null.Options{Generate: true, Size: size}, benchOptions(size))
			b.ResetTimer()
			from := time.Now()
			if err := receive(e.Receiveq(0), b.N*per); err != nil {
				b.Fatal(err)
			}
			perPacket(b, from)
		})
	}
}

func BenchmarkEcho(b *testing.B) {
	e, far := pairOfGuests(b, pair.Options{}, vhosttest.Options{})
	done := make(chan error, 1)
	go func() { done <- echo(far, b.N) }()
	frame := vhosttest.Frame(0, 64)
	b.ResetTimer()
	from := time.Now()
	for range b.N {
		if err := e.Send(0, virtio.NetHdr{}, frame, nil); err != nil {
			b.Fatal(err)
		}
		if _, _, err := e.Recv(0, vhosttest.Patience); err != nil {
			b.Fatal(err)
		}
	}
	perPacket(b, from)
	if err := <-done; err != nil {
		b.Fatal(err)
	}
}
