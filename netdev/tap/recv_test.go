package tap

import (
	"runtime"
	"runtime/debug"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
)

func TestRecv(t *testing.T) {
	inNetns(t)
	for name, f := range map[string]virtio.Features{"t0": plain, "t1": mergeable, "t2": legacy} {
		d := open(t, "tap:"+name+",mtu=9000")
		w, g := newWire(t, name), newGuest(t, 64, f)
		for i, n := range []int{14, 60, 1514, 1518, 1519, 9014} {
			g.post(1, 9100)
			want := testFrame(n, uint32(i))
			w.Send(want)
			got := g.recv(d.Queue(0))
			wantFrame(t, got.data, want)
			if nb := got.hdr.NumBuffers; f != legacy && nb != 1 {
				t.Errorf("num_buffers is %d, want 1", nb)
			}
		}
		if c := d.Queue(0).Counters(); c.RecvDropped != 0 {
			t.Errorf("%d frames lost", c.RecvDropped)
		}
	}
}

// TestRecvDirect: a frame that fits the posted buffers is not staged; one that is longer than those before it is, once.
func TestRecvDirect(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0,mtu=9000")
	w, g := newWire(t, "t0"), newGuest(t, 64, mergeable)
	r := &d.queues[0].recv
	for i, c := range []struct {
		n      int
		staged bool
	}{{100, false}, {1514, false}, {9014, true}, {9014, false}, {5000, false}, {100, false}} {
		clear(r.stage)
		g.post(8, 1536)
		want := testFrame(c.n, uint32(i))
		w.Send(want)
		wantFrame(t, g.recv(d.Queue(0)).data, want)
		if staged := r.stage[0] == hostMAC[0]; staged != c.staged {
			t.Errorf("frame %d of %d bytes: staged is %v, want %v", i, c.n, staged, c.staged)
		}
	}
	for i := range 2*wantWindow + 1 {
		g.post(1, 1536)
		w.Send(testFrame(60, uint32(i)))
		g.recv(d.Queue(0))
	}
	if r.want != minWant {
		t.Errorf("after %d small frames a read is offered %d bytes, want %d", 2*wantWindow, r.want, minWant)
	}
}

// TestRecvNoRoom: a frame that was read and does not fit waits for the guest, and those behind it too.
func TestRecvNoRoom(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0,mtu=9000")
	w, g, q := newWire(t, "t0"), newGuest(t, 64, mergeable), d.Queue(0)
	first, second := testFrame(9014, 1), testFrame(60, 2)
	w.Send(first)
	w.Send(second)
	step := func(wantIdle bool, wantN int) {
		t.Helper()
		n, idle, err := q.Recv(g.posted, 8)
		if must(t, err); n != wantN || idle != wantIdle {
			t.Fatalf("Recv is %d frames, idle %v; want %d, %v", n, idle, wantN, wantIdle)
		}
	}
	step(false, 0) // nothing posted
	g.post(3, 1536)
	step(false, 0) // read into the stage
	step(false, 0)
	g.post(2, 1536)
	step(false, 0)
	g.post(3, 1536)
	step(true, 2)
	wantFrame(t, g.take().data, first)
	wantFrame(t, g.take().data, second)
	if f := g.take(); f != nil {
		t.Errorf("a third frame of %d bytes", len(f.data))
	}
}

// TestRecvTooBig: a frame that the guest's buffers can never take is lost and counted, the next one arrives.
func TestRecvTooBig(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0,mtu=9000")
	w, g := newWire(t, "t0"), newGuest(t, 64, plain)
	g.post(4, 12, 1514)
	w.Send(testFrame(9014, 1))
	w.Send(testFrame(1514, 2))
	wantFrame(t, g.recv(d.Queue(0)).data, testFrame(1514, 2))
	if got := g.posted.Stats.TooBig; got != 1 {
		t.Errorf("TooBig is %d, want 1", got)
	}
}

// shrunkGuest has posted buffers in pages that its memory file no longer has.
func shrunkGuest(t *testing.T) *guest {
	t.Helper()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	must(t, err)
	defer unix.Close(fd)
	must(t, unix.Ftruncate(fd, guestSize))
	region, err := guestmem.NewRegion(fd, 0, guestBase, guestUser, guestSize)
	must(t, err)
	g := newGuestIn(t, region, 64, plain)
	g.post(4, 2048)
	must(t, unix.Ftruncate(fd, guestRings))
	return g
}

// TestRecvMissingPage: a tap does not report that it could not write to posted pages. Nor is that passed off as a frame: the header's
// write faults, as the worker's own writes to the guest do, and the device goes on with the next guest.
func TestRecvMissingPage(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0")
	w, q, g := newWire(t, "t0"), d.Queue(0), shrunkGuest(t)
	w.Send(testFrame(100, 1))
	w.Send(testFrame(100, 2))
	fault := func() (v any) {
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		defer func() { v = recover() }()
		n, idle, err := q.Recv(g.posted, 8)
		t.Errorf("Recv is %d, %v, %v", n, idle, err)
		return nil
	}()
	if err, ok := fault.(runtime.Error); !ok {
		t.Fatalf("Recv panics with %v, want a memory fault", err)
	}
	next := newGuest(t, 64, plain)
	next.post(1, 2048)
	wantFrame(t, next.recv(q).data, testFrame(100, 2))
}

// TestRecvMissingPageMacvtap: a macvtap does report it. The frames are lost and counted, and Recv comes to an end.
func TestRecvMissingPageMacvtap(t *testing.T) {
	inNetns(t)
	w := newWire(t, addMacvtap(t, "mv0"))
	d := openMacvtapOrSkip(t, "tap:macvtap=mv0,mac="+hostMAC.String())
	q, g := d.Queue(0), shrunkGuest(t)
	for i := range 3 {
		w.Send(testFrame(100, uint32(i)))
	}
	for range 2 {
		if n, idle, err := q.Recv(g.posted, 2); n != 0 || !idle || err != nil {
			t.Fatalf("Recv is %d, %v, %v", n, idle, err)
		}
	}
	if got := q.Counters().RecvDropped; got != 3 {
		t.Errorf("RecvDropped is %d, want 3", got)
	}
}

// TestRecvIdle: what Recv says and what its descriptor says agree.
func TestRecvIdle(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0")
	w, g, q := newWire(t, "t0"), newGuest(t, 64, plain), d.Queue(0)
	g.post(8, 2048)
	if n, idle, err := q.Recv(g.posted, 8); n != 0 || !idle || err != nil {
		t.Fatalf("empty: Recv is %d, %v, %v", n, idle, err)
	}
	for i := range 3 {
		w.Send(testFrame(60, uint32(i)))
	}
	pollFor(t, q.RecvFD(), 1)
	if n, idle, err := q.Recv(g.posted, 2); n != 2 || idle || err != nil {
		t.Fatalf("three waiting, two asked for: Recv is %d, %v, %v", n, idle, err)
	}
	if n, idle, err := q.Recv(g.posted, 2); n != 1 || !idle || err != nil {
		t.Fatalf("one waiting: Recv is %d, %v, %v", n, idle, err)
	}
}

// TestRecvProperty: whatever buffers a guest posts, the frames that it gets are whole and in order.
func TestRecvProperty(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0,mtu=9000")
	w, q := newWire(t, "t0"), d.Queue(0)
	seed := uint32(0)
	rapid.Check(t, func(rt *rapid.T) {
		g := newGuest(t, 64, mergeable)
		var sent [][]byte
		got := 0
		take := func() {
			for f := g.take(); f != nil; f = g.take() {
				wantFrame(t, f.data, sent[got])
				got++
			}
		}
		for range rapid.IntRange(1, 30).Draw(rt, "steps") {
			if rapid.Bool().Draw(rt, "send") && len(sent)-got < 32 {
				seed++
				sent = append(sent, testFrame(rapid.IntRange(14, 9014).Draw(rt, "length"), seed))
				w.Send(sent[len(sent)-1])
			}
			if g.drv.Free() >= 8 {
				lens := rapid.SliceOfN(rapid.OneOf(rapid.IntRange(1, 20), rapid.IntRange(400, 4096)), 1, 4).Draw(rt, "chain")
				g.post(1, append(lens, 300)...)
			}
			_, _, err := q.Recv(g.posted, rapid.IntRange(1, 4).Draw(rt, "max"))
			must(t, err)
			take()
		}
		for got < len(sent) {
			if g.drv.Free() > 0 {
				g.post(1, 4096)
			}
			_, _, err := q.Recv(g.posted, 64)
			must(t, err)
			take()
		}
	})
	if c := q.Counters(); c.RecvDropped != 0 {
		t.Errorf("%d frames lost", c.RecvDropped)
	}
}
