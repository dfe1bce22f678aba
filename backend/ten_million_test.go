package backend_test

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
	"github.com/vhostd/vhostd/zerocopy"
)

// soakFrames is 10 million in `make soak-order`, and in CI what half a second holds.
var soakFrames = flag.Int("frames", 125_000, "frames in each case of TestTenMillion")

// TestTenMillion: frames that are copied and frames that are not, mixed, whose completions come out of order and from several goroutines, while the
// memory table is replaced again and again. The device sees every frame once and in order, and its bytes are what they were until
// it lets go of them; the driver gets every chain back once and in order; the device never has more than it may.
func TestTenMillion(t *testing.T) {
	for name, o := range map[string]vhosttest.Options{
		"split":            {Without: virtio.FInOrder},
		"split, in order":  {},
		"packed":           {Without: virtio.FInOrder, Packed: true},
		"packed, in order": {Packed: true},
	} {
		t.Run(name, func(t *testing.T) {
			o.Regions = []vhosttest.RegionSpec{{GPA: 0, Size: 2 << 20}, {GPA: 1 << 32, Size: 16 << 20}}
			n := *soakFrames
			if testing.Short() {
				n /= 10
			}
			vhosttest.NoLeaks(t)
			d := newChaos(t)
			b, err := backend.New(backend.Options{Device: d, Poll: 20 * time.Microsecond, Log: logger(t)})
			if err != nil {
				t.Fatal(err)
			}
			g := vhosttest.Start(t, b, o)
			t.Cleanup(d.end) // before the guest goes
			done := make(chan error, 1)
			go func() { done <- newLoad(g).run(n) }()
			from := time.Now()
			for tick := time.NewTicker(20 * time.Millisecond); ; {
				select {
				case <-tick.C:
					g.ShareMemory()
					continue
				case err = <-done:
				}
				tick.Stop()
				break
			}
			if err := errors.Join(err, d.err()); err != nil {
				t.Fatal(err)
			}
			t.Logf("%d frames in %v: %v", n, time.Since(from).Round(time.Millisecond), d.counts())
			d.check(t, b.Stats().Queues[1], n)
		})
	}
}

// load is the driver of a transmitq, which knows which chain must come back next.
type load struct {
	g      *vhosttest.Guest
	q      *vhosttest.Queue
	slots  []guestmem.GPA // that are free: the one that came back last is rewritten first
	out    []guestmem.GPA // by head
	order  []uint16       // heads that are out, ring from first to last
	mask   uint64
	first  uint64
	last   uint64
	pieces []vhosttest.Piece
}

// Lengths in bytes of the frames: a third is copied for being small.
const (
	shortFrame = 64
	longFrame  = 512
)

func newLoad(g *vhosttest.Guest) *load {
	l := &load{g: g, q: g.Transmitq(0)}
	n := l.q.Driver.Size()
	l.out, l.order, l.mask = make([]guestmem.GPA, n), make([]uint16, n), uint64(n-1)
	for range n {
		l.slots = append(l.slots, g.Mem.Alloc(virtio.NetHdrSize+longFrame, 8))
	}
	return l
}

func (l *load) run(n int) error {
	r := rand.New(rand.NewPCG(1, 2))
	for sent, back := 0, 0; back < n; {
		for burst := 1 + r.IntN(100); burst > 0 && sent < n && l.add(uint64(sent), r); burst-- {
			sent++
		}
		l.q.Flush()
		got, err := l.reap()
		if err != nil {
			return fmt.Errorf("after %d of %d frames: %w", back, n, err)
		}
		if back += got; got == 0 && (sent == n || len(l.slots) == 0) {
			if err := l.q.Wait(vhosttest.Patience); err != nil {
				return fmt.Errorf("%d sent, %d back: %w", sent, back, err)
			}
		}
	}
	if out := l.q.Driver.Out(); out != 0 {
		return fmt.Errorf("%d chains are out", out)
	}
	return nil
}

// add sends frame seq, in one to three pieces. It reports false when there is no room.
func (l *load) add(seq uint64, r *rand.Rand) bool {
	k := len(l.slots)
	if k == 0 {
		return false
	}
	at, n := l.slots[k-1], shortFrame+r.IntN(longFrame-shortFrame+1)
	b := l.g.Mem.At(at, virtio.NetHdrSize+n)
	clear(b[:virtio.NetHdrSize])
	fillFrame(b[virtio.NetHdrSize:], seq)
	l.pieces = l.pieces[:0]
	for _, cut := range [][]int{{}, {virtio.NetHdrSize}, {virtio.NetHdrSize - 5, 30}}[r.IntN(3)] {
		l.pieces = append(l.pieces, vhosttest.Piece{GPA: at, Len: uint32(cut)})
		at, n = at+guestmem.GPA(cut), n-cut
	}
	l.pieces = append(l.pieces, vhosttest.Piece{GPA: at, Len: uint32(virtio.NetHdrSize + n)})
	id, err := l.q.Driver.Add(l.pieces, nil)
	if errors.Is(err, vring.ErrFull) {
		return false
	}
	l.out[id], l.slots = l.slots[k-1], l.slots[:k-1]
	l.order[l.last&l.mask] = id
	l.last++
	return true
}

// reap takes back what has come, and checks that it is what was to come.
func (l *load) reap() (n int, err error) {
	for ; ; n++ {
		id, _, ok := l.q.Driver.Reap()
		if !ok {
			return n, l.q.Driver.Err()
		}
		if want := l.order[l.first&l.mask]; l.first == l.last || id != want {
			return n, fmt.Errorf("chain %d came back, want %d of the %d that are out", id, want, l.last-l.first)
		}
		l.first++
		l.slots = append(l.slots, l.out[id])
	}
}

func fillFrame(f []byte, seq uint64) {
	copy(f, "\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01\x88\xb5")
	for i := 14; i+8 <= len(f); i += 8 {
		binary.LittleEndian.PutUint64(f[i:], seq+uint64(i)<<48)
	}
}

// checkFilled returns the number of a frame that fillFrame made.
func checkFilled(f []byte) (seq uint64, err error) {
	if len(f) < shortFrame || len(f) > longFrame {
		return 0, fmt.Errorf("frame of %d bytes", len(f))
	}
	seq = binary.LittleEndian.Uint64(f[14:]) - 14<<48
	for i := 14; i+8 <= len(f); i += 8 {
		if got := binary.LittleEndian.Uint64(f[i:]) - uint64(i)<<48; got != seq {
			return seq, fmt.Errorf("frame %d of %d bytes has frame %d's at %d", seq, len(f), got, i)
		}
	}
	return seq, nil
}

// chaosCap is how many frames the device may hold.
const chaosCap = 100

// chaos is a device that copies some frames and holds the others, until several goroutines release them, each picking at random.
type chaos struct {
	fd   *sys.EventFD // always writable
	next uint64       // number of the frame to come: the worker's
	rand *rand.Rand   // the worker's
	buf  [longFrame + 1]byte
	out  atomic.Int64
	most int64 // the worker's
	told [zerocopy.NumOutcomes]atomic.Uint64

	mu    sync.Mutex
	held  []chaosFrame
	fault error

	stop      chan struct{}
	releasers sync.WaitGroup
}

type chaosFrame struct {
	b   *zerocopy.Buffer
	seq uint64
}

func newChaos(t *testing.T) *chaos {
	fd, err := sys.NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	d := &chaos{fd: fd, rand: rand.New(rand.NewPCG(3, 4)), stop: make(chan struct{})}
	for i := range uint64(3) {
		d.releasers.Go(func() { d.release(rand.New(rand.NewPCG(i, 5))) })
	}
	return d
}

func (d *chaos) end() {
	close(d.stop)
	d.releasers.Wait()
	_ = d.fd.Close()
}

func (d *chaos) err() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.fault
}

func (d *chaos) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fault == nil {
		d.fault = err
	}
}

// Send takes frames, now and then not all.
func (d *chaos) Send(bufs []*zerocopy.Buffer) int {
	if d.rand.IntN(50) == 0 {
		bufs = bufs[:d.rand.IntN(len(bufs))]
	}
	for _, b := range bufs {
		seq, err := checkFilled(d.buf[:b.CopyTo(d.buf[:], 0)])
		if err == nil && seq != d.next {
			err = fmt.Errorf("frame %d arrived, want %d", seq, d.next)
		}
		if err != nil {
			d.fail(err)
		}
		d.next++
		switch {
		case b.Len() < 200:
			d.done(b, zerocopy.CopiedSmall)
		case d.out.Load() >= chaosCap:
			d.done(b, zerocopy.CopiedCap)
		case d.rand.IntN(20) == 0:
			d.done(b, zerocopy.CopiedFallback)
		default:
			d.most = max(d.most, d.out.Add(1))
			d.mu.Lock()
			d.held = append(d.held, chaosFrame{b, seq})
			d.mu.Unlock()
		}
	}
	return len(bufs)
}

func (d *chaos) done(b *zerocopy.Buffer, o zerocopy.Outcome) {
	d.told[o].Add(1)
	zerocopy.ReleaseAll([]*zerocopy.Buffer{b}, o)
}

// release lets go of frames at random, several at a time, until the end.
func (d *chaos) release(r *rand.Rand) {
	var buf [longFrame + 1]byte
	for {
		select {
		case <-d.stop:
			return
		default:
		}
		f, ok := d.pick(r)
		if !ok {
			time.Sleep(10 * time.Microsecond)
			continue
		}
		// Had its chain been returned before, the driver would have written another frame there.
		if seq, err := checkFilled(buf[:f.b.CopyTo(buf[:], 0)]); err != nil || seq != f.seq {
			d.fail(fmt.Errorf("frame %d is %d when it is released: %w", f.seq, seq, err))
		}
		o := zerocopy.ZeroCopied
		if r.IntN(10) == 0 {
			o = zerocopy.CopiedAnyway
		}
		d.told[o].Add(1)
		d.out.Add(-1)
		f.b.Release(o)
	}
}

func (d *chaos) pick(r *rand.Rand) (f chaosFrame, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := len(d.held)
	if n == 0 {
		return f, false
	}
	i := r.IntN(n)
	f = d.held[i]
	d.held[i] = d.held[n-1]
	d.held = d.held[:n-1]
	return f, true
}

func (d *chaos) counts() map[string]uint64 {
	all := map[string]uint64{}
	for o := range zerocopy.NumOutcomes {
		if n := d.told[o].Load(); n > 0 {
			all[o.String()] = n
		}
	}
	return all
}

func (d *chaos) check(t *testing.T, st backend.QueueStats, n int) {
	t.Helper()
	told := d.counts()
	if fmt.Sprint(st.Outcomes) != fmt.Sprint(told) || st.Frames != uint64(n) || st.Malformed+st.GivenUp != 0 || st.Pending != 0 {
		t.Errorf("%+v, the device released %v", st, told)
	}
	if d.most > chaosCap || d.out.Load() != 0 {
		t.Errorf("the device held %d frames at most, want %d, and has %d", d.most, chaosCap, d.out.Load())
	}
	// In few frames, on a machine where the guest is slow, the device may never have been full.
	if many := n >= 125_000; many && (len(told) != 5 || d.most != chaosCap) {
		t.Errorf("the device released %v, and held %d frames at most: not all was tried", told, d.most)
	}
}

func (d *chaos) Capabilities() netdev.Capabilities {
	return netdev.Capabilities{Kind: "chaos", MaxPairs: 1, FromGuest: offload.All, ToGuest: offload.All, ZeroCopy: "now and then"}
}

func (d *chaos) SetOffloads(offload.Set) error                 { return nil }
func (d *chaos) SetPairs(int) error                            { return nil }
func (d *chaos) Queue(int) netdev.Queue                        { return d }
func (d *chaos) Close() error                                  { return nil }
func (d *chaos) Reap()                                         {}
func (d *chaos) SendFD() int                                   { return d.fd.FD() }
func (d *chaos) RecvFD() int                                   { return -1 }
func (d *chaos) Counters() netdev.Counters                     { return netdev.Counters{} }
func (d *chaos) Recv(*zerocopy.Posted, int) (int, bool, error) { return 0, true, nil }
