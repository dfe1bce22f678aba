package backend_test

import (
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/pair"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
)

// F11 where two sessions meet: a device that keeps one guest's pages until another guest has received them touches both guests' memory on
// one worker, and only the guest whose memory has gone may lose its connection.

// pairEnd is a guest on one end of a pair.
type pairEnd struct {
	*vhosttest.Guest
	be *backend.Backend
}

// pairEnds opens a pair and two guests, neither of which has posted a receive buffer.
func pairEnds(t *testing.T, o pair.Options) (da, db *pair.Device, a, b *pairEnd) {
	t.Helper()
	da, db, err := pair.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, d := range []*pair.Device{da, db} {
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return da, db, onPair(t, da), onPair(t, db)
}

func onPair(t *testing.T, d netdev.Device) *pairEnd {
	t.Helper()
	b, err := backend.New(backend.Options{Device: d, Poll: 20 * time.Microsecond, DrainTimeout: 50 * time.Millisecond, Log: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	var regions []vhosttest.RegionSpec
	for i := range 4 {
		regions = append(regions, vhosttest.RegionSpec{GPA: guestmem.GPA(i) << 32, Size: 16 << 20})
	}
	g := vhosttest.New(t, b, vhosttest.Options{Regions: regions, Direct: true, MemSlots: true})
	g.Connect()
	for _, q := range g.Queues {
		q.Start()
	}
	return &pairEnd{g, b}
}

// sendFrom adds frame seq to the transmitq with all but its header in region r.
func (e *pairEnd) sendFrom(t *testing.T, r *vhosttest.Region, hdr virtio.NetHdr, seq uint64) {
	t.Helper()
	const n = 300
	at, ok := r.Alloc(n, 8)
	if !ok {
		t.Fatal("no room")
	}
	copy(e.Mem.At(at, n), vhosttest.Frame(seq, n))
	header, _ := e.Mem.Regions[0].Alloc(virtio.NetHdrSize, 8)
	hdr.Encode(e.Mem.At(header, virtio.NetHdrSize))
	if _, err := e.Transmitq(0).Driver.Add([]vhosttest.Piece{{GPA: header, Len: virtio.NetHdrSize}, {GPA: at, Len: n}}, nil); err != nil {
		t.Fatal(err)
	}
}

// spare is a region that holds frames alone.
func (e *pairEnd) spare(t *testing.T) *vhosttest.Region {
	t.Helper()
	r := vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: 1 << 40, Size: 1 << 20})
	e.Mem.Add(r)
	if err := e.FE.AddMemReg(r.MemoryRegion, r.FD); err != nil {
		t.Fatal(err)
	}
	return r
}

// receives checks that these frames come next, intact.
func (e *pairEnd) receives(t *testing.T, want ...int) {
	t.Helper()
	for _, seq := range want {
		_, frame, err := e.Recv(0, vhosttest.Patience)
		if err != nil {
			t.Fatalf("waiting for frame %d: %v", seq, err)
		}
		if err := check(frame, seq); err != nil {
			t.Fatal(err)
		}
	}
}

// untouched checks that a session has noticed nothing.
func untouched(t *testing.T, who string, e *pairEnd) {
	t.Helper()
	if st := e.be.Stats(); !st.Connected || st.Sessions != 1 || st.FrontEndErrors+st.GuestErrors != 0 {
		t.Errorf("%s: connected %v, %d sessions, %d front-end errors, %d guest errors", who, st.Connected, st.Sessions, st.FrontEndErrors, st.GuestErrors)
	}
}

// lost checks that a session has ended for a fault, and nothing else did.
func lost(t *testing.T, e *pairEnd) {
	t.Helper()
	vhosttest.Eventually(t, "the session's end", func() bool { st := e.be.Stats(); return !st.Connected && st.FrontEndErrors == 1 })
}

// exchange sends frames both ways between guests that have posted buffers.
func exchange(t *testing.T, a, b *vhosttest.Guest) {
	t.Helper()
	runAll(t, both(&end{Guest: a}, &end{Guest: b}, 500, nil, 100, 1000)...)
}

// The pages of A's frames go while they wait for B, whose worker touches them: A's session ends, and B gets every other frame.
func TestF11HeldFrame(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	da, _, a, b := pairEnds(t, pair.Options{Hold: true})
	r, other := a.spare(t), a.Mem.Regions[0]
	for i, region := range []*vhosttest.Region{other, other, r, other, r, r, other} {
		a.sendFrom(t, region, virtio.NetHdr{}, uint64(i))
	}
	a.Transmitq(0).Flush()
	vhosttest.Eventually(t, "seven frames in the device", func() bool { return da.Held() == 7 })
	cut(t, r)
	if err := b.Receiveq(0).Post(); err != nil {
		t.Fatal(err)
	}
	b.receives(t, 0, 1, 3, 6)
	lost(t, a)
	n.goesOn(t)
	next := a.Successor(vhosttest.Options{})
	exchange(t, next, b.Guest)
	untouched(t, "the receiver", b)
	n.goesOn(t)
}

// It is B's own memory that goes, under A's frame: B's session ends, and A's goes on.
func TestF11HeldFrameReceiver(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	da, _, a, b := pairEnds(t, pair.Options{Hold: true})
	for i := range uint64(3) {
		if err := a.Send(0, virtio.NetHdr{}, vhosttest.Frame(i, 300), nil); err != nil {
			t.Fatal(err)
		}
	}
	vhosttest.Eventually(t, "three frames in the device", func() bool { return da.Held() == 3 })
	r := b.spare(t)
	if _, err := b.Receiveq(0).Driver.Add(nil, []vhosttest.Piece{{GPA: 1 << 40, Len: 2048}}); err != nil {
		t.Fatal(err)
	}
	cut(t, r)
	b.Receiveq(0).Flush()
	lost(t, b)
	n.goesOn(t)
	next := b.Successor(vhosttest.Options{})
	// The frame that was being written went with its receiver.
	(&pairEnd{Guest: next}).receives(t, 1, 2)
	if err := a.Transmitq(0).Settle(); err != nil {
		t.Fatal(err)
	}
	if err := a.Receiveq(0).Post(); err != nil {
		t.Fatal(err)
	}
	exchange(t, a.Guest, next)
	untouched(t, "the sender", a)
	n.goesOn(t)
}

// A's frame faults while B's worker lowers it for B's driver: what B gets of others is whole.
func TestF11HeldFrameLowered(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	da, db, err := pair.New(pair.Options{Hold: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { da.Close(); db.Close() })
	a := onPair(t, da)
	b, err := backend.New(backend.Options{Device: db, Log: logger(t), Disable: virtio.FNetGuestCsum})
	if err != nil {
		t.Fatal(err)
	}
	receiver := &pairEnd{vhosttest.New(t, b, vhosttest.Options{}), b}
	receiver.Connect()
	for _, q := range receiver.Queues {
		q.Start()
	}
	r := a.spare(t)
	a.sendFrom(t, r, virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, CsumStart: 34, CsumOffset: 16}, 0)
	a.sendFrom(t, a.Mem.Regions[0], virtio.NetHdr{}, 1)
	a.Transmitq(0).Flush()
	vhosttest.Eventually(t, "two frames in the device", func() bool { return da.Held() == 2 })
	cut(t, r)
	if err := receiver.Receiveq(0).Post(); err != nil {
		t.Fatal(err)
	}
	receiver.receives(t, 1)
	lost(t, a)
	untouched(t, "the receiver", receiver)
	n.goesOn(t)
}

// A frame faults while its checksum is completed in software for the device: nothing of the guest that has gone is left to be sent, or to keep the device
// from closing, when the next guest comes.
func TestF11Lowered(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	_, _, a, b := pairEnds(t, pair.Options{Lacks: offload.All})
	if err := b.Receiveq(0).Post(); err != nil {
		t.Fatal(err)
	}
	r := a.spare(t)
	a.sendFrom(t, a.Mem.Regions[0], virtio.NetHdr{}, 0)
	a.sendFrom(t, r, virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, CsumStart: 34, CsumOffset: 16}, 1)
	cut(t, r)
	a.Transmitq(0).Flush()
	lost(t, a)
	b.receives(t, 0)
	n.goesOn(t)
	exchange(t, a.Successor(vhosttest.Options{}), b.Guest)
	untouched(t, "the receiver", b)
	n.goesOn(t)
}
