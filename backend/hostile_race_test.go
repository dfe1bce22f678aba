package backend_test

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// while runs f again and again beside g, until g returns.
func while(f func(), g func()) {
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				f()
			}
		}
	})
	g()
	close(done)
	wg.Wait()
}

// The guest rewrites descriptors, headers and frames while the device reads them. Whatever it reads is one of the values that were there, bounds are checked
// on what is used, and the guest has every chain back.
func TestG8FieldsChangeBetweenReads(t *testing.T) {
	if require.Race {
		t.Skip("skipped: this guest races by intention")
	}
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := rigged(t)
	q := e.Transmitq(0)
	good, bad := e.Mem.Alloc(4096, 4096), uint64(1)<<50
	hdr := e.Mem.At(good, 4096)
	rnd := rand.New(rand.NewPCG(1, 2))
	desc := q.Driver.RawDesc()
	flip := func() {
		for i := range desc {
			d := &desc[i]
			switch rnd.IntN(4) {
			case 0:
				d.Addr = [...]uint64{uint64(good), bad, math.MaxUint64 - 8, uint64(good) + 4000}[rnd.IntN(4)]
			case 1:
				d.Len = [...]uint32{100, 0, math.MaxUint32, 1000, 12}[rnd.IntN(5)]
			case 2:
				d.Flags = [...]uint16{0, virtio.DescWrite, virtio.DescIndirect}[rnd.IntN(3)]
			}
		}
		for i := range 64 { // the header, Ethernet and IP headers
			hdr[i] = byte(rnd.Uint32())
		}
	}
	sent := 0
	won := func() bool { // often enough to show something: on a busy machine that takes longer
		st := e.be.Stats().Queues[1]
		return sent >= 1000 && st.Malformed > 0 && st.Invalid > 0 && st.Outcomes[zerocopy.Copied.String()] > 0
	}
	while(flip, func() {
		begin := time.Now()
		for took := time.Duration(0); took < 500*time.Millisecond || took < vhosttest.Patience && !won(); took = time.Since(begin) {
			if _, err := q.Driver.Add([]vhosttest.Piece{{GPA: good, Len: 200}}, nil); err == nil {
				sent++
			}
			q.Flush()
			for _, _, ok := q.Driver.Reap(); ok; _, _, ok = q.Driver.Reap() {
			}
			for _, p := range e.dev.wires[0].got() {
				if n := len(p.data); n != 88 && n != 188 && n != 988 {
					t.Errorf("a frame of %d bytes was sent", n)
				}
			}
		}
	})
	st := e.be.Stats()
	t.Logf("%d chains, %d frames, %d malformed, %d with a bad header", sent, st.Queues[1].Frames, st.Queues[1].Malformed, st.Queues[1].Invalid)
	if !won() {
		t.Error("the guest did not win its races often enough to show anything")
	}
	if !st.Connected || st.FrontEndErrors+st.GuestErrors != 0 {
		t.Errorf("connected %v, %d front-end errors, %d guest errors", st.Connected, st.FrontEndErrors, st.GuestErrors)
	}
	e.Stop()
	e.Reboot()
	e.dev.wires[0].got()
	e.StartQueues()
	e.works(t)
	n.goesOn(t)
}

// Headers that lie: the frame is dropped, counted, and its chain returned. The length of a header is a hint that nobody relies on.
func TestG9HeadersLie(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := rigged(t)
	const csum = virtio.NetHdrNeedsCsum
	dropped, sent := uint64(0), 0
	for name, c := range map[string]struct {
		hdr  virtio.NetHdr
		goes bool
	}{
		"csum_start beyond the frame":  {virtio.NetHdr{Flags: csum, CsumStart: 200, CsumOffset: 16}, false},
		"csum_offset beyond the frame": {virtio.NetHdr{Flags: csum, CsumStart: 34, CsumOffset: 165}, false},
		"both at their most":           {virtio.NetHdr{Flags: csum, CsumStart: math.MaxUint16, CsumOffset: math.MaxUint16}, false},
		"gso_size 0":                   {virtio.NetHdr{Flags: csum, GSOType: virtio.GSOTCPv4, CsumStart: 34, CsumOffset: 16}, false},
		"gso without a checksum":       {virtio.NetHdr{GSOType: virtio.GSOTCPv4, GSOSize: 100}, false},
		"unknown gso_type":             {virtio.NetHdr{Flags: csum, GSOType: 77, GSOSize: 100, CsumStart: 34, CsumOffset: 16}, false},
		"ECN alone":                    {virtio.NetHdr{Flags: csum, GSOType: virtio.GSOECN, GSOSize: 100, CsumStart: 34, CsumOffset: 16}, false},
		"hdr_len lies":                 {virtio.NetHdr{HdrLen: math.MaxUint16}, true},
		"num_buffers lies":             {virtio.NetHdr{NumBuffers: math.MaxUint16}, true},
		"the last checksum that fits":  {virtio.NetHdr{Flags: csum, CsumStart: 34, CsumOffset: 164}, true},
		"gso_size beyond the frame":    {virtio.NetHdr{Flags: csum, GSOType: virtio.GSOTCPv4, GSOSize: math.MaxUint16, CsumStart: 34, CsumOffset: 16}, true},
	} {
		if err := e.Send(0, c.hdr, vhosttest.Frame(5, 200), nil); err != nil {
			t.Fatal(err)
		}
		if err := e.Transmitq(0).Settle(); err != nil {
			t.Fatal(err)
		}
		switch got := e.dev.wires[0].got(); {
		case c.goes && (len(got) != 1 || check(got[0].data, 5) != nil):
			t.Errorf("%s: %d frames were sent", name, len(got))
		case !c.goes && len(got) != 0:
			t.Errorf("%s: it was sent", name)
		case c.goes:
			sent++
		default:
			dropped++
		}
		n.goesOn(t)
	}
	if st := e.be.Stats(); st.Queues[1].Invalid != dropped || dropped != 7 || sent != 4 || st.GuestErrors != 0 {
		t.Errorf("%d frames count as invalid of %d that were dropped; %d sent; %d guest errors", st.Queues[1].Invalid, dropped, sent, st.GuestErrors)
	}
	e.works(t)
}

// Kicks at full rate, for nothing and beside traffic, and event indices that are nowhere near: work is bounded, and others get theirs.
func TestG10KickStorm(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := rigged(t)
	var kicks atomic.Uint64
	storm := func() {
		for _, q := range e.Queues {
			q.Kick.Signal()
			kicks.Add(1)
		}
	}
	while(storm, func() {
		before := n.rounds.Load()
		time.Sleep(200 * time.Millisecond)
		n.goesOn(t)
		t.Logf("%d rounds of the neighbour", n.rounds.Load()-before)
		for range 5 {
			e.works(t)
		}
		e.Barrier() // the control side has its say
		vhosttest.Eventually(t, "as many kicks as make a storm", func() bool { return kicks.Load() >= 1000 })
	})
	q := e.Transmitq(0)
	for i, event := range []uint16{0, 1, 0x7fff, 0x8000, 0xfffe, 0xffff, q.Driver.RawUsedIndex() - 1, q.Driver.RawUsedIndex() + 256} {
		at := q.Addr().Avail + 4 + 2*256 // used_event follows the ring (virtio-v1.2 §2.7.6)
		r := e.Mem.Of(at)
		binary.LittleEndian.PutUint16(r.Mem[at-r.UserAddr:], event)
		if _, err := q.Add(virtio.NetHdr{}, vhosttest.Frame(uint64(i), 100), nil); err != nil {
			t.Fatal(err)
		}
		q.Flush()
		vhosttest.Eventually(t, "the chain, call or not", func() bool { q.Reap(); return q.Driver.Out() == 0 })
	}
	e.dev.wires[0].got()
	e.works(t)
	n.goesOn(t)
}

// The available index goes back and forth (CVE-2019-3900): that is an index which jumps, and the ring stops; nothing spins, and the session goes on.
func TestG11AvailIndexBackAndForth(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := rigged(t)
	q := e.Transmitq(0)
	at, moves := q.Driver.RawUsedIndex(), 0
	while(func() {
		q.Driver.RawSetAvailIndex(at + uint16(moves&1))
		q.Driver.RawSetAvailIndex(at - uint16(moves&1))
		q.Kick.Signal()
		moves++
	}, func() {
		vhosttest.Eventually(t, "a broken ring", func() bool { return e.be.Stats().Queues[1].Broken != "" })
		n.goesOn(t)
		e.Barrier()
	})
	e.dev.wires[0].got() // what the stale heads said
	broke(t, e, q, 1)
	n.goesOn(t)
}

// Receive buffers too small for what comes, with and without merging: frames are lost, counted, and the next one that fits arrives.
func TestG12TinyBuffers(t *testing.T) {
	for name, o := range map[string]vhosttest.Options{
		"one byte beside the header, merged": {RecvSize: virtio.NetHdrSize + 1, QueueSize: 1024},
		"64 bytes, not merged":               {RecvSize: 64, Without: virtio.FNetMrgRxbuf},
		"one byte beside the header, alone":  {RecvSize: virtio.NetHdrSize + 1, Without: virtio.FNetMrgRxbuf},
	} {
		t.Run(name, func(t *testing.T) {
			vhosttest.NoLeaks(t)
			n := newNeighbour(t)
			e := start(t, newDevice(t, 1), o)
			w := e.dev.wires[0]
			for range 5 {
				w.push(parcel{data: vhosttest.Frame(0, virtio.MaxFrame)})
			}
			vhosttest.Eventually(t, "five frames lost", func() bool { return e.be.Stats().Queues[0].TooBig == 5 })
			if got := e.be.Stats().Queues[0].Frames; got != 0 {
				t.Errorf("%d frames were received", got)
			}
			n.goesOn(t)
			if o.Without == 0 { // the longest that thousand buffers take
				w.push(parcel{data: vhosttest.Frame(0, 1000)})
				if err := (flow{to: e, frames: 1}).receive(); err != nil {
					t.Error(err)
				}
			}
			e.Hangup()
			next := &end{dev: e.dev, be: e.be, Guest: e.Successor(vhosttest.Options{})}
			next.works(t)
			n.goesOn(t)
		})
	}
}

// No buffers at all: frames wait outside, and nothing spins until there are some.
func TestG12NoBuffers(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	d := newDevice(t, 1)
	e := &end{dev: d, be: serve(t, d)}
	e.Guest = vhosttest.New(t, e.be, vhosttest.Options{})
	e.Connect()
	for _, q := range e.Queues {
		q.Start()
	}
	for i := range 100 {
		d.wires[0].push(parcel{data: vhosttest.Frame(uint64(i), 100)})
	}
	e.Receiveq(0).Kick.Signal()
	sleeps(t, e.be, 0)
	n.goesOn(t)
	if err := e.Receiveq(0).Post(); err != nil {
		t.Fatal(err)
	}
	if err := (flow{to: e, frames: 100}).receive(); err != nil {
		t.Error(err)
	}
	n.goesOn(t)
}

// Parts of rings that lie on each other, on other rings or on frames: what comes of it stays in the guest's memory.
func TestG13PartsOverlap(t *testing.T) {
	if require.Race {
		t.Skip("skipped: this guest races by intention")
	}
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := rigged(t)
	over := e.Mem.Alloc(4096, 4)
	ran := 0
	for _, pick := range []func(a, other [3]uint64) [3]uint64{
		func(a, _ [3]uint64) [3]uint64 { return [3]uint64{a[0], a[0], a[0]} },
		func(a, _ [3]uint64) [3]uint64 { return [3]uint64{a[0], a[1], a[0]} },
		func(a, _ [3]uint64) [3]uint64 { return [3]uint64{a[0], a[1], a[1]} },
		func(a, _ [3]uint64) [3]uint64 { return [3]uint64{a[0], a[2], a[2]} },
		func(a, o [3]uint64) [3]uint64 { return o },
		func(a, o [3]uint64) [3]uint64 { return [3]uint64{a[0], a[1], o[0]} },
		func(a, _ [3]uint64) [3]uint64 { return [3]uint64{a[0], a[1], e.Mem.User(over)} }, // on what is sent
	} {
		q := e.Transmitq(0)
		q.Stop()
		a, o := q.Addr(), e.Receiveq(0).Addr()
		p := pick([3]uint64{a.Desc, a.Avail, a.Used}, [3]uint64{o.Desc, o.Avail, o.Used})
		a.Desc, a.Avail, a.Used = p[0], p[1], p[2]
		// It may be refused; if not, the ring runs on what lies there.
		if err := e.FE.SetVringAddr(a); err == nil {
			_ = e.FE.SetVringKick(1, q.Kick.FD())
			if e.be.Stats().Queues[1].Started {
				ran++
			}
		}
		for i := range 50 {
			_, _ = q.Driver.Add([]vhosttest.Piece{{GPA: over, Len: 200}}, nil)
			if _, err := q.Add(virtio.NetHdr{}, vhosttest.Frame(uint64(i), 100), nil); err == nil {
				q.Driver.Publish()
			}
			q.Kick.Signal()
		}
		n.goesOn(t)
		if st := e.be.Stats(); !st.Connected || st.FrontEndErrors != 0 {
			t.Fatalf("connected %v, %d front-end errors", st.Connected, st.FrontEndErrors)
		}
		for i := range uint32(2) {
			if _, err := e.FE.GetVringBase(i); err != nil {
				t.Fatal(err)
			}
		}
		e.Reboot()
		e.dev.wires[0].got()
		e.StartQueues()
		e.works(t)
		n.goesOn(t)
	}
	if ran == 0 {
		t.Error("no ring ran: all such addresses were refused")
	}
}
