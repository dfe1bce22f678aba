package soft_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/null"
	"github.com/vhostd/vhostd/netdev/pair"
	"github.com/vhostd/vhostd/netdev/soft"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

func TestMain(m *testing.M) { vhosttest.Main(m) }

// rig is a device without offloads, wrapped, and its far end.
type rig struct {
	*testing.T
	dev   netdev.Device
	inner *pair.Device
	far   *pair.Device
	peer  *netdevtest.Peer
}

func newRig(t *testing.T, o pair.Options) *rig {
	t.Helper()
	a, b, err := pair.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return &rig{T: t, dev: soft.Wrap(a), inner: a, far: b, peer: netdevtest.NewPeer(t, b)}
}

func (r *rig) close() {
	r.Helper()
	if err := r.dev.Close(); err != nil {
		r.Error(err)
	}
	if err := r.far.Close(); err != nil {
		r.Error(err)
	}
}

func TestDevice(t *testing.T) {
	for _, o := range []pair.Options{
		{Lacks: offload.All}, {Lacks: offload.All &^ offload.Csum, Slots: 65}, {Lacks: offload.USO6 | offload.ECN, Hold: true},
	} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			netdevtest.Run(t, func(t *testing.T) netdevtest.Harness {
				r := newRig(t, o)
				return netdevtest.Harness{
					Device: r.dev, MaxFrame: virtio.MaxFrame, Capture: r.peer.Capture, Inject: r.peer.Inject, Lossless: true,
					Close: func() {
						if err := r.far.Close(); err != nil {
							t.Error(err)
						}
					},
				}
			})
		})
	}
}

func TestWrapIsFreeWhereNothingLacks(t *testing.T) {
	d, err := null.New(null.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if soft.Wrap(d) != netdev.Device(d) {
		t.Error("a device that takes all offloads was wrapped")
	}
	r := newRig(t, pair.Options{Lacks: offload.TSO4})
	defer r.close()
	if c := r.dev.Capabilities(); c.FromGuest != offload.All || c.Kind != "pair" {
		t.Errorf("capabilities %+v", c)
	}
}

// tso is an IPv4 frame with n bytes of payload, to be cut into segments of size.
func tso(n, size int) (virtio.NetHdr, []byte) {
	b := netdevtest.Frame(54+n, uint32(n))
	clear(b[14:54])
	copy(b[12:], []byte{8, 0, 0x45, 0, byte((n + 40) >> 8), byte(n + 40)})
	b[22], b[23] = 64, 6
	copy(b[26:], []byte{198, 18, 0, 1, 198, 18, 0, 2})
	b[46], b[47] = 5<<4, 0x10
	return virtio.NetHdr{
		Flags: virtio.NetHdrNeedsCsum, GSOType: virtio.GSOTCPv4, GSOSize: uint16(size), CsumStart: 34, CsumOffset: 16,
	}, b
}

// outcome is a buffer and what became of it.
func outcome(hdr virtio.NetHdr, frags ...[]byte) (*zerocopy.Buffer, *[]zerocopy.Outcome) {
	got := new([]zerocopy.Outcome)
	u := zerocopy.Ubuf{Callback: func(_ *zerocopy.Ubuf, o zerocopy.Outcome) { *got = append(*got, o) }}
	return zerocopy.NewUbufBuffer(u, hdr, frags...), got
}

func (r *rig) wantSegment(frame []byte, i, size int) {
	r.Helper()
	payload := frame[54:]
	want := payload[i*size : min((i+1)*size, len(payload))]
	if _, got := r.peer.Capture(); len(got) != 54+len(want) || !bytes.Equal(got[54:], want) {
		r.Fatalf("segment %d has %d bytes, want %d others", i, len(got), 54+len(want))
	}
}

func TestChildrenPointIntoGuestPages(t *testing.T) {
	r := newRig(t, pair.Options{Lacks: offload.All &^ offload.Csum, Hold: true})
	defer r.close()
	hdr, f := tso(3000, 1000)
	b, got := outcome(hdr, f)
	if n := r.dev.Queue(0).Send([]*zerocopy.Buffer{b}); n != 1 || r.inner.Held() != 3 {
		t.Fatalf("%d sent, %d segments held", n, r.inner.Held())
	}
	copy(f[54+1500:], "written by the guest after Send") // and before the frame leaves
	r.wantSegment(f, 0, 1000)
	r.wantSegment(f, 1, 1000)
	if len(*got) != 0 {
		t.Fatalf("released %v while a segment is in flight", *got)
	}
	r.wantSegment(f, 2, 1000)
	if fmt.Sprint(*got) != "[zerocopied]" {
		t.Fatalf("released %v", *got)
	}
}

func TestParentHearsOfTheWorst(t *testing.T) {
	r := newRig(t, pair.Options{Lacks: offload.All, Hold: true})
	hdr, f := tso(3000, 1000)
	b, got := outcome(hdr, f)
	r.dev.Queue(0).Send([]*zerocopy.Buffer{b})
	r.inner.Release(2)
	r.close()
	if fmt.Sprint(*got) != "[dropped]" {
		t.Fatalf("released %v", *got)
	}
}

// TestFullDevice: segments that find no room go first when there is, in order, and the frames behind them wait.
func TestFullDevice(t *testing.T) {
	r := newRig(t, pair.Options{Lacks: offload.All, Slots: 4})
	defer r.close()
	q := r.dev.Queue(0)
	held := q.(netdev.Holder)
	hdr, f := tso(100*200, 200) // more segments than a batch has
	big, bigGot := outcome(hdr, f)
	plain := netdevtest.Frame(60, 1)
	small, smallGot := outcome(virtio.NetHdr{}, plain)
	bufs := []*zerocopy.Buffer{big, small}
	n := q.Send(bufs)
	if n != 1 || !held.Held() || len(*bigGot) != 0 {
		t.Fatalf("%d taken, held %v, released %v", n, held.Held(), *bigGot)
	}
	for i := range 100 {
		r.wantSegment(f, i, 200)
		if i%2 == 0 {
			q.Reap()
		} else {
			n += q.Send(bufs[n:])
		}
	}
	if n += q.Send(bufs[n:]); n != 2 || held.Held() {
		t.Fatalf("%d taken, held %v", n, held.Held())
	}
	if _, got := r.peer.Capture(); !bytes.Equal(got, plain) {
		t.Fatalf("captured %x", got)
	}
	if fmt.Sprint(*bigGot, *smallGot) != "[copied] [copied]" {
		t.Fatalf("released %v and %v", *bigGot, *smallGot)
	}
}

func TestOrphanFreesGuestPages(t *testing.T) {
	r := newRig(t, pair.Options{Lacks: offload.All, Slots: 2})
	defer r.close()
	q := r.dev.Queue(0)
	hdr, f := tso(100*200, 200)
	want := bytes.Clone(f)
	b, got := outcome(hdr, f)
	q.Send([]*zerocopy.Buffer{b})
	q.(netdev.Orphaner).Orphan()
	if fmt.Sprint(*got) != "[copied]" {
		t.Fatalf("released %v", *got)
	}
	clear(f) // the pages are the guest's again
	for i := range 100 {
		r.wantSegment(want, i, 200)
		q.Reap()
	}
	if q.(netdev.Holder).Held() {
		t.Error("something is left")
	}
	// What was orphaned is not in the pool: the next frame is whole.
	hdr, f = tso(900, 300)
	b, _ = outcome(hdr, f)
	for n := 0; n == 0; {
		n = q.Send([]*zerocopy.Buffer{b})
	}
	for i := range 3 {
		r.wantSegment(f, i, 300)
		q.Reap()
	}
}

func TestCloseDropsWhatWaits(t *testing.T) {
	r := newRig(t, pair.Options{Lacks: offload.All, Slots: 2})
	hdr, f := tso(100*200, 200)
	b, got := outcome(hdr, f)
	q := r.dev.Queue(0)
	q.Send([]*zerocopy.Buffer{b})
	if len(*got) != 0 {
		t.Fatalf("released %v before Close", *got)
	}
	r.close()
	// Two segments had gone out, as copies: that is what the frame's owner hears first of.
	if n := q.Counters().SendDropped; fmt.Sprint(*got) != "[copied]" || n == 0 {
		t.Fatalf("released %v, %d dropped", *got, n)
	}
}

func TestFrameThatCannotBeCutIsDropped(t *testing.T) {
	r := newRig(t, pair.Options{Lacks: offload.All})
	defer r.close()
	hdr, f := tso(3000, 1000)
	f[14] = 0x55
	bad, badGot := outcome(hdr, f)
	good, goodGot := outcome(virtio.NetHdr{}, netdevtest.Frame(60, 1))
	if n := r.dev.Queue(0).Send([]*zerocopy.Buffer{bad, good}); n != 2 {
		t.Fatalf("%d taken", n)
	}
	if fmt.Sprint(*badGot, *goodGot) != "[dropped] [copied]" || r.dev.Queue(0).Counters().SendDropped != 1 {
		t.Fatalf("released %v and %v, counters %+v", *badGot, *goodGot, r.dev.Queue(0).Counters())
	}
}

// TestCuttingAllocatesNothing: neither segments nor completed checksums, once there have been as many.
func TestCuttingAllocatesNothing(t *testing.T) {
	r := newRig(t, pair.Options{Lacks: offload.All, Hold: true, Slots: 128})
	defer r.close()
	q := r.dev.Queue(0)
	hdr, f := tso(60000, 1000)
	released := 0
	u := zerocopy.Ubuf{Callback: func(*zerocopy.Ubuf, zerocopy.Outcome) { released++ }}
	b := zerocopy.NewUbufBuffer(u, hdr, f[:100], f[100:30000], f[30000:])
	bufs := []*zerocopy.Buffer{b}
	runs := 0
	run := func() {
		q.Send(bufs)
		if n := r.inner.Release(100); n != 60 {
			t.Fatalf("%d segments, want 60", n)
		}
		if runs++; released != runs {
			t.Fatalf("released %d times after %d frames", released, runs)
		}
		if err := b.RecycleUbuf(u, hdr, f[:100], f[100:30000], f[30000:]); err != nil {
			t.Fatal(err)
		}
	}
	for range 4 {
		run()
	}
	if n := testing.AllocsPerRun(100, run); n != 0 {
		t.Errorf("%v allocations per frame of 60 segments", n)
	}
	b.Release(zerocopy.Dropped)
}

func BenchmarkSend(b *testing.B) {
	hdr, f := tso(60000, 1460)
	for _, takes := range []offload.Set{0, offload.Csum} {
		b.Run(fmt.Sprintf("tso4/size=1460/bytes=60000/takes=%d", takes), func(b *testing.B) {
			inner, far, err := pair.New(pair.Options{Lacks: offload.All &^ takes, Hold: true, Slots: 64})
			if err != nil {
				b.Fatal(err)
			}
			defer far.Close()
			dev := soft.Wrap(inner)
			defer dev.Close()
			u := zerocopy.Ubuf{Callback: func(*zerocopy.Ubuf, zerocopy.Outcome) {}}
			bufs := []*zerocopy.Buffer{zerocopy.NewUbufBuffer(u, hdr, f)}
			b.SetBytes(int64(len(f)))
			for b.Loop() {
				dev.Queue(0).Send(bufs)
				inner.Release(64)
				if err := bufs[0].RecycleUbuf(u, hdr, f); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/42, "ns/segment")
		})
	}
}
