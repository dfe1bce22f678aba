package backend_test

import (
	"math"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// The cases of hostile guests, G1 to G17. A guest that breaks its ring loses that ring, one that posts a bad chain gets it back unused; no
// case is anybody else's business, which the neighbour in each test shows.

// rigged is a guest that makes direct chains, so that a test may rewrite their descriptors.
func rigged(t *testing.T) *end {
	t.Helper()
	return attack(t, vhosttest.Options{Direct: true})
}

// rig adds a chain of n descriptors of 100 bytes each to a transmitq, has f rewrite them, and publishes it.
func rig(t *testing.T, e *end, n int, f func(chain []*virtio.Desc)) (id uint16) {
	t.Helper()
	q := e.Transmitq(0)
	var pieces []vhosttest.Piece
	for range n {
		pieces = append(pieces, vhosttest.Piece{GPA: e.Mem.Alloc(100, 8), Len: 100})
	}
	id, err := q.Driver.Add(pieces, nil)
	if err != nil {
		t.Fatal(err)
	}
	var chain []*virtio.Desc
	for at := id; len(chain) < n; at = chain[len(chain)-1].Next {
		chain = append(chain, &q.Driver.RawDesc()[at])
	}
	f(chain)
	q.Flush()
	return id
}

// dropped checks that the guest gets chain id back, unused, and that the ring goes on.
func dropped(t *testing.T, e *end, id uint16) {
	t.Helper()
	q := e.Transmitq(0)
	if err := q.Wait(vhosttest.Patience); err != nil {
		t.Fatal(err)
	}
	if got, n, ok := q.Driver.Reap(); !ok || got != id || n != 0 {
		t.Fatalf("chain %d came back with length %d, %v; want chain %d with 0 (%v)", got, n, ok, id, q.Driver.Err())
	}
	if sent := e.dev.wires[0].got(); len(sent) != 0 {
		t.Fatalf("%d frames were sent", len(sent))
	}
	e.works(t)
}

// broke checks that a queue has stopped, told so, and taken nothing else with it; then it is reset and works again.
func broke(t *testing.T, e *end, q *vhosttest.Queue, ringErrors uint64) {
	t.Helper()
	vhosttest.Eventually(t, "a broken ring", func() bool { return e.be.Stats().Queues[q.Index].Broken != "" })
	time.Sleep(time.Millisecond) // more errors would come at once
	st := e.be.Stats()
	if st.GuestErrors != ringErrors || st.FrontEndErrors != 0 || !st.Connected {
		t.Errorf("%d guest errors, want %d; %d front-end errors, connected %v", st.GuestErrors, ringErrors, st.FrontEndErrors, st.Connected)
	}
	if !q.Err.Drain() {
		t.Error("the error descriptor was not signalled")
	}
	e.Stop()
	e.Reboot()
	e.StartQueues()
	if st := e.be.Stats().Queues[q.Index]; st.Broken != "" {
		t.Errorf("after a reset: %s", st.Broken)
	}
	e.works(t)
}

func TestG1AvailIndexJumps(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := rigged(t)
	for i, jump := range []uint16{257, 300, 0x7fff, 0x8000, 0xffff} {
		q := e.Transmitq(0)
		q.Driver.RawSetAvailIndex(q.Driver.RawUsedIndex() + jump)
		q.Kick.Signal()
		broke(t, e, q, uint64(i+1))
		n.goesOn(t)
	}
}

func TestG1AvailIndexJumpsOnReceiveq(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := rigged(t)
	q := e.Receiveq(0)
	q.Driver.RawSetAvailIndex(q.Driver.RawUsedIndex() + 0x4000)
	for range 300 { // they use up what the device has seen posted already, and then it looks
		e.dev.wires[0].push(parcel{data: vhosttest.Frame(0, 60)})
	}
	vhosttest.Eventually(t, "a broken ring", func() bool { return e.be.Stats().Queues[0].Broken != "" })
	// The transmitq does not care.
	for i := range 10 {
		if err := e.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(i), 60), nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.Transmitq(0).Settle(); err != nil {
		t.Fatal(err)
	}
	e.dev.wires[0].got()
	e.dev.wires[0].mu.Lock()
	e.dev.wires[0].inbox = nil
	e.dev.wires[0].mu.Unlock()
	broke(t, e, q, 1)
	n.goesOn(t)
}

func TestG2IndexOutOfRange(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := rigged(t)
	errors := uint64(0)
	for _, head := range []uint16{256, 0x8000, 0xffff} {
		q := e.Transmitq(0)
		at := q.Driver.RawUsedIndex()
		q.Driver.RawAvail()[at%256] = head
		q.Driver.RawSetAvailIndex(at + 1)
		q.Kick.Signal()
		errors++
		broke(t, e, q, errors)
	}
	for _, next := range []uint16{256, 0xffff} {
		rig(t, e, 2, func(c []*virtio.Desc) { c[0].Next = next })
		errors++
		broke(t, e, e.Transmitq(0), errors)
	}
	n.goesOn(t)
}

func TestG3Loops(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := rigged(t)
	errors := uint64(0)
	for name, f := range map[string]func(c []*virtio.Desc, id uint16){
		"self": func(c []*virtio.Desc, id uint16) { c[0].Next = id },
		"long": func(c []*virtio.Desc, id uint16) { c[99].Flags, c[99].Next = virtio.DescNext, id },
		"of zero length": func(c []*virtio.Desc, id uint16) {
			for _, d := range c {
				d.Len = 0
			}
			c[99].Flags, c[99].Next = virtio.DescNext, id
		},
	} {
		t.Log(name)
		head := e.Transmitq(0).Driver
		rig(t, e, 100, func(c []*virtio.Desc) {
			id := uint16(0)
			for i := range head.RawDesc() {
				if &head.RawDesc()[i] == c[0] {
					id = uint16(i)
				}
			}
			f(c, id)
		})
		errors++
		broke(t, e, e.Transmitq(0), errors)
		n.goesOn(t)
	}
}

func TestG4Indirect(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := rigged(t)
	data := e.Mem.Alloc(4096, 8)
	table := func(descs ...virtio.Desc) (guestmem.GPA, uint32) {
		a := e.Mem.Alloc(len(descs)*virtio.DescSize, virtio.DescSize)
		for i, d := range descs {
			encodeDesc(e.Mem.At(a+guestmem.GPA(i*virtio.DescSize), virtio.DescSize), d)
		}
		return a, uint32(len(descs) * virtio.DescSize)
	}
	good := virtio.Desc{Addr: uint64(data), Len: 200}
	next := func(d virtio.Desc, to uint16) virtio.Desc { d.Flags, d.Next = d.Flags|virtio.DescNext, to; return d }
	high := e.Mem.Regions[1]
	for name, f := range map[string]func(d *virtio.Desc){
		"length 0":             func(d *virtio.Desc) { a, _ := table(good); d.Addr, d.Len = uint64(a), 0 },
		"not a multiple of 16": func(d *virtio.Desc) { a, _ := table(good, good); d.Addr, d.Len = uint64(a), 24 },
		"2^32-16":              func(d *virtio.Desc) { a, _ := table(good); d.Addr, d.Len = uint64(a), math.MaxUint32&^15 },
		"over 2^32 in total": func(d *virtio.Desc) {
			big := virtio.Desc{Addr: uint64(data), Len: math.MaxUint32}
			a, n := table(next(big, 1), next(big, 2), big)
			d.Addr, d.Len = uint64(a), n
		},
		"nested": func(d *virtio.Desc) {
			in, n := table(good)
			a, _ := table(virtio.Desc{Addr: uint64(in), Len: n, Flags: virtio.DescIndirect})
			d.Addr, d.Len = uint64(a), 16
		},
		"next and indirect": func(d *virtio.Desc) {
			a, n := table(good)
			d.Addr, d.Len, d.Flags = uint64(a), n, d.Flags|virtio.DescNext
		},
		"unmapped":          func(d *virtio.Desc) { d.Addr, d.Len = 1<<50, 32 },
		"past the region":   func(d *virtio.Desc) { d.Addr, d.Len = high.GuestAddr+high.Size-16, 32 },
		"next out of range": func(d *virtio.Desc) { a, n := table(next(good, 2), good); d.Addr, d.Len = uint64(a), n },
		"loop":              func(d *virtio.Desc) { a, n := table(next(good, 1), next(good, 0)); d.Addr, d.Len = uint64(a), n },
		"self loop":         func(d *virtio.Desc) { a, n := table(next(good, 0)); d.Addr, d.Len = uint64(a), n },
	} {
		t.Log(name)
		id := rig(t, e, 1, func(c []*virtio.Desc) { c[0].Flags = virtio.DescIndirect; f(c[0]) })
		dropped(t, e, id)
		n.goesOn(t)
	}
	if st := e.be.Stats(); st.GuestErrors != 0 || st.Queues[1].Malformed != 11 {
		t.Errorf("%d guest errors, %d malformed chains, want 0 and 11", st.GuestErrors, st.Queues[1].Malformed)
	}
}

func encodeDesc(b []byte, d virtio.Desc) {
	copy(b, u64(d.Addr))
	copy(b[8:], u32s(d.Len, uint32(d.Flags)|uint32(d.Next)<<16))
}

func TestG4IndirectNotNegotiated(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{Without: virtio.FIndirectDesc})
	dropped(t, e, rig(t, e, 1, func(c []*virtio.Desc) { c[0].Flags, c[0].Len = virtio.DescIndirect, 64 }))
	n.goesOn(t)
}

func TestG5BadBuffers(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := rigged(t)
	high := e.Mem.Regions[1]
	for name, f := range map[string]func(d *virtio.Desc){
		"length 0":       func(d *virtio.Desc) { d.Len = 0 },
		"length 2^32-1":  func(d *virtio.Desc) { d.Len = math.MaxUint32 },
		"unmapped":       func(d *virtio.Desc) { d.Addr = 1 << 50 },
		"in the hole":    func(d *virtio.Desc) { d.Addr = e.Mem.Regions[0].Size },
		"past the end":   func(d *virtio.Desc) { d.Addr = high.GuestAddr + high.Size - 99 },
		"across a hole":  func(d *virtio.Desc) { d.Addr = e.Mem.Regions[0].Size - 50 },
		"wrapping 2^64":  func(d *virtio.Desc) { d.Addr = math.MaxUint64 - 50 },
		"top of address": func(d *virtio.Desc) { d.Addr = math.MaxUint64 },
	} {
		for _, at := range []int{0, 1, 2} {
			t.Log(name, "in descriptor", at)
			dropped(t, e, rig(t, e, 3, func(c []*virtio.Desc) { f(c[at]) }))
		}
		n.goesOn(t)
	}
	if st := e.be.Stats(); st.GuestErrors != 0 || st.Queues[1].Malformed != 24 {
		t.Errorf("%d guest errors, %d malformed chains, want 0 and 24", st.GuestErrors, st.Queues[1].Malformed)
	}
}

func TestG6WrongDirection(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := rigged(t)
	for name, f := range map[string]func(c []*virtio.Desc){
		"all writable":             func(c []*virtio.Desc) { c[0].Flags |= virtio.DescWrite; c[1].Flags |= virtio.DescWrite },
		"writable at the end":      func(c []*virtio.Desc) { c[1].Flags |= virtio.DescWrite },
		"readable behind writable": func(c []*virtio.Desc) { c[0].Flags |= virtio.DescWrite },
	} {
		t.Log(name)
		dropped(t, e, rig(t, e, 2, f))
		n.goesOn(t)
	}
}

// unposted is a guest that has started its rings, and posted nothing.
func unposted(t *testing.T) *end {
	t.Helper()
	d := newDevice(t, 1)
	e := &end{dev: d, be: serve(t, d)}
	e.Guest = vhosttest.New(t, e.be, vhosttest.Options{Direct: true})
	e.Connect()
	for _, q := range e.Queues {
		q.Start()
	}
	return e
}

// Receive buffers that the device may not write to come back unused, in their turn, and the frame goes into the next one.
func TestG6WrongDirectionOnReceiveq(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := unposted(t)
	drv := e.Receiveq(0).Driver
	buf := func(n uint32) vhosttest.Piece { return vhosttest.Piece{GPA: e.Mem.Alloc(int(n), 8), Len: n} }
	readable, mixed := buf(100), []vhosttest.Piece{buf(100), buf(1000)}
	var want []uint16
	add := func(r, w []vhosttest.Piece) {
		t.Helper()
		id, err := drv.Add(r, w)
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, id)
	}
	good := buf(2000)
	add([]vhosttest.Piece{readable}, nil)
	add(mixed[:1], mixed[1:])
	add(nil, []vhosttest.Piece{buf(virtio.NetHdrSize)})
	add(nil, []vhosttest.Piece{buf(1)})
	add(nil, []vhosttest.Piece{good})
	e.Receiveq(0).Flush()
	e.dev.wires[0].push(parcel{data: vhosttest.Frame(7, 500)})
	for i, id := range want {
		length := uint32(0)
		if i == len(want)-1 {
			length = virtio.NetHdrSize + 500
		}
		if i == 0 {
			if err := e.Receiveq(0).Wait(vhosttest.Patience); err != nil {
				t.Fatal(err)
			}
		}
		if got, n, ok := drv.Reap(); !ok || got != id || n != length {
			t.Fatalf("chain %d with %d bytes, %v; want chain %d with %d (%v)", got, n, ok, id, length, drv.Err())
		}
	}
	if err := check(e.Mem.At(good.GPA+virtio.NetHdrSize, 500), 7); err != nil {
		t.Error(err)
	}
	if m := e.be.Stats().Queues[0].Malformed; m != 4 {
		t.Errorf("%d malformed chains, want 4", m)
	}
	n.goesOn(t)
}

func TestG7ShortChains(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := rigged(t)
	for _, c := range []struct {
		pieces int
		length uint32 // of each
	}{{1, 1}, {1, 11}, {1, 12}, {1, 25}, {11, 1}, {12, 1}, {25, 1}, {2, 6}, {1, virtio.MaxFrame + virtio.NetHdrSize + 1}} {
		id := rig(t, e, c.pieces, func(chain []*virtio.Desc) {
			for _, d := range chain {
				d.Len = c.length
			}
			if c.length > 100 {
				chain[0].Addr = e.Mem.Regions[1].GuestAddr
			}
		})
		dropped(t, e, id)
		n.goesOn(t)
	}
	if m := e.be.Stats().Queues[1].Malformed; m != 9 {
		t.Errorf("%d malformed chains, want 9", m)
	}
	// The shortest that is a frame.
	for _, l := range []vhosttest.Layout{{12}, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, {11, 1, 1}} {
		if err := e.Send(0, virtio.NetHdr{}, make([]byte, 14), l); err != nil {
			t.Fatal(err)
		}
		if err := e.Transmitq(0).Settle(); err != nil {
			t.Fatal(err)
		}
		if sent := e.dev.wires[0].got(); len(sent) != 1 || len(sent[0].data) != 14 {
			t.Errorf("layout %v: sent %v", l, sent)
		}
	}
	e.works(t)
}

// A guest that resets with frames in flight, and makes the same descriptors available again: what comes late for the old ones does not
// complete the new ones.
func TestG16ResetInFlight(t *testing.T) {
	for name, reset := range map[string]func(e *end){
		"GET_VRING_BASE": func(e *end) { e.Stop() },
		"SET_STATUS": func(e *end) {
			if err := e.FE.SetStatus(0); err != nil {
				t.Error(err)
			}
		},
		"RESET_DEVICE": func(e *end) {
			if err := e.FE.ResetDevice(); err != nil {
				t.Error(err)
			}
			if err := e.FE.SetFeatures(uint64(e.Features)); err != nil {
				t.Error(err)
			}
		},
		"hang-up": func(e *end) { e.Hangup(); e.Connect() },
	} {
		t.Run(name, func(t *testing.T) {
			n := func() *neighbour { vhosttest.NoLeaks(t); return newNeighbour(t) }()
			d := newDevice(t, 1)
			w := d.wires[0]
			w.keep = true
			e := start(t, d, vhosttest.Options{}, func(o *backend.Options) { o.DrainTimeout = 20 * time.Millisecond })
			t.Cleanup(func() { releaseAll(w) })
			e.sendHeld(t, 20)
			reset(e)
			e.Reboot()
			e.StartQueues()
			e.sendHeld(t, 20)
			q := e.Transmitq(0)
			for range 20 { // the old ones
				w.letGo(0).Release(zerocopy.ZeroCopied)
			}
			n.goesOn(t)
			if used := q.Driver.RawUsedIndex(); used != 0 {
				t.Errorf("%d chains are used, all of whose frames are out", used)
			}
			releaseAll(w)
			if err := q.Settle(); err != nil {
				t.Error(err)
			}
			if used := q.Driver.RawUsedIndex(); used != 20 {
				t.Errorf("%d chains were used, want 20", used)
			}
		})
	}
}
