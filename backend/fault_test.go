package backend_test

import (
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
)

// F11: the memory file shrinks under the session. What is touched then raises SIGBUS, which ends a program that is not prepared; here it ends
// that session. None of these tests touches, from the guest's side, what it has cut off.

// cutOff is a guest whose rings and buffers lie in regions of their own.
func cutOff(t *testing.T, d *device, o vhosttest.Options) *end {
	t.Helper()
	const size = 16 << 20
	for i := range 4 {
		o.Regions = append(o.Regions, vhosttest.RegionSpec{GPA: guestmem.GPA(i) << 32, Size: size})
	}
	o.Direct, o.MemSlots = true, true
	return start(t, d, o, func(o *backend.Options) { o.DrainTimeout = 20 * time.Millisecond })
}

// cut truncates regions to nothing, and checks that whoever touches them now gets SIGBUS.
func cut(t *testing.T, regions ...*vhosttest.Region) {
	t.Helper()
	for _, r := range regions {
		if err := r.Truncate(0); err != nil {
			t.Fatal(err)
		}
		if !r.Gone() {
			t.Fatal("the region is still there")
		}
	}
}

// outside is a region with nothing in it, for buffers that go.
func (e *end) outside(t *testing.T) *vhosttest.Region {
	t.Helper()
	r := vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: 1 << 40, Size: 1 << 20})
	e.Mem.Add(r)
	if err := e.FE.AddMemReg(r.MemoryRegion, r.FD); err != nil {
		t.Fatal(err)
	}
	return r
}

// failed checks that the session ended for the fault, and nothing else did.
func failed(t *testing.T, e *end, n *neighbour) {
	t.Helper()
	vhosttest.Eventually(t, "the session's end", func() bool { st := e.be.Stats(); return !st.Connected && st.FrontEndErrors == 1 })
	n.goesOn(t)
	// The back-end serves the next guest.
	w := e.dev.wires[0]
	w.set(false, false)
	w.got()
	w.forget()
	next := &end{dev: e.dev, be: e.be, Guest: e.Successor(vhosttest.Options{})}
	next.works(t)
	n.goesOn(t)
}

func TestF11Rings(t *testing.T) {
	for name, part := range map[string]func(q *vhosttest.Queue) uint64{
		"desc":  func(q *vhosttest.Queue) uint64 { return q.Addr().Desc },
		"avail": func(q *vhosttest.Queue) uint64 { return q.Addr().Avail },
		"used":  func(q *vhosttest.Queue) uint64 { return q.Addr().Used },
	} {
		for dir, index := range map[string]int{"ToGuest": 0, "FromGuest": 1} {
			t.Run(name+" "+dir, func(t *testing.T) {
				vhosttest.NoLeaks(t)
				n := newNeighbour(t)
				e := cutOff(t, newDevice(t, 1), vhosttest.Options{})
				e.works(t)
				if index == 1 {
					if _, err := e.Transmitq(0).Add(virtio.NetHdr{}, vhosttest.Frame(0, 100), nil); err != nil {
						t.Fatal(err)
					}
				}
				r := e.Mem.Of(part(e.Queues[index]))
				if index == 1 && name != "avail" {
					e.Transmitq(0).Driver.Publish()
				}
				cut(t, r)
				e.Queues[index].Kick.Signal()
				for range 64 { // more than the worker may have popped buffers for
					e.dev.wires[0].push(parcel{data: vhosttest.Frame(0, 100)})
				}
				failed(t, e, n)
			})
		}
	}
}

// The fault comes while a frame's header is checked, after another one of the batch was dropped.
func TestF11Header(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := cutOff(t, newDevice(t, 1), vhosttest.Options{})
	r := e.outside(t)
	q := e.Transmitq(0)
	for range 3 {
		if _, err := q.Add(virtio.NetHdr{GSOType: 99}, vhosttest.Frame(0, 100), nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := q.Driver.Add([]vhosttest.Piece{{GPA: 1 << 40, Len: 100}}, nil); err != nil {
		t.Fatal(err)
	}
	cut(t, r)
	q.Flush()
	failed(t, e, n)
}

// The fault comes while the device reads a frame.
func TestF11Payload(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := cutOff(t, newDevice(t, 1), vhosttest.Options{})
	r := e.outside(t)
	q := e.Transmitq(0)
	header := vhosttest.Piece{GPA: e.Mem.Alloc(virtio.NetHdrSize, 8), Len: virtio.NetHdrSize}
	for i := range 5 {
		if _, err := q.Add(virtio.NetHdr{}, vhosttest.Frame(uint64(i), 100), nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := q.Driver.Add([]vhosttest.Piece{header, {GPA: 1 << 40, Len: 100}}, nil); err != nil {
		t.Fatal(err)
	}
	cut(t, r)
	q.Flush()
	failed(t, e, n)
}

// The fault comes while the device writes a frame into the guest's buffer.
func TestF11ReceiveBuffer(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	d := newDevice(t, 1)
	e := cutOff(t, d, vhosttest.Options{RecvSize: 64}) // so that frames are merged over buffers in all regions
	cut(t, e.Mem.Of(e.Queues[1].Addr().Desc))
	d.wires[0].push(parcel{data: vhosttest.Frame(0, 1500)})
	failed(t, e, n)
}

// The fault comes in the middle of a batch: some of its chains are popped, and nobody else has them yet.
func TestF11HalfABatch(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	d := newDevice(t, 1)
	d.ignores = true // headers lie in the cut region too, and nobody is to look at them
	d.wires[0].keep = true
	t.Cleanup(func() { releaseAll(d.wires[0]) })
	e := cutOff(t, d, vhosttest.Options{QueueSize: 1024})
	q := e.Transmitq(0)
	at := q.Addr().Desc
	r := e.Mem.Of(at)
	off := at - r.UserAddr
	whole := (off + 4096) &^ 4095
	good := int(whole-off)/virtio.DescSize - 5 // descriptors that stay, and that the rest of the test uses
	e.sendHeld(t, 5)
	for range good + 30 {
		if _, err := q.Add(virtio.NetHdr{}, vhosttest.Frame(0, 60), nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Truncate(whole); err != nil {
		t.Fatal(err)
	}
	q.Flush()
	failed(t, e, n)
}

// The fault comes when the session ends, with frames in the device that come back later.
func TestF11Drain(t *testing.T) {
	for name, part := range map[string]func(a *vhosttest.Queue) uint64{
		"used ring":  func(q *vhosttest.Queue) uint64 { return q.Addr().Used },
		"avail ring": func(q *vhosttest.Queue) uint64 { return q.Addr().Avail },
	} {
		t.Run(name, func(t *testing.T) {
			vhosttest.NoLeaks(t)
			n := newNeighbour(t)
			d := newDevice(t, 1)
			d.wires[0].keep = true
			t.Cleanup(func() { releaseAll(d.wires[0]) })
			e := cutOff(t, d, vhosttest.Options{})
			e.sendHeld(t, 20)
			cut(t, e.Mem.Of(part(e.Transmitq(0))))
			e.Hangup()
			vhosttest.Eventually(t, "the session's end", func() bool { return !e.be.Stats().Connected })
			n.goesOn(t)
			releaseAll(d.wires[0])
			next := &end{dev: e.dev, be: e.be, Guest: e.Successor(vhosttest.Options{})}
			d.wires[0].set(false, false)
			next.works(t)
		})
	}
}

// The wire's other end belongs to another session, which goes on.
func TestF11Peer(t *testing.T) {
	vhosttest.NoLeaks(t)
	da, db := newLink(t, 1)
	a, b := cutOff(t, da, vhosttest.Options{}), start(t, db, vhosttest.Options{})
	runAll(t, both(a, b, 500, nil, 100)...)
	for range 50 {
		if err := b.Send(0, virtio.NetHdr{}, vhosttest.Frame(0, 100), nil); err != nil {
			t.Fatal(err)
		}
	}
	cut(t, a.Mem.Regions...)
	a.Transmitq(0).Kick.Signal()
	if err := b.Transmitq(0).Settle(); err != nil {
		t.Fatal(err)
	}
	if err := b.Send(0, virtio.NetHdr{}, vhosttest.Frame(0, 100), nil); err != nil {
		t.Fatal(err)
	}
	if err := b.Transmitq(0).Settle(); err != nil {
		t.Fatal(err)
	}
	vhosttest.Eventually(t, "the session's end", func() bool { return !a.be.Stats().Connected })
	da.wires[0].forget()
	next := &end{dev: da, be: a.be, Guest: a.Successor(vhosttest.Options{})}
	runAll(t, both(next, b, 500, nil, 100)...)
	if st := b.be.Stats(); st.Sessions != 1 || !st.Connected || st.GuestErrors+st.FrontEndErrors != 0 {
		t.Errorf("the other end: %+v", st)
	}
}
