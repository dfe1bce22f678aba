package backend_test

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// holdingBeside is a guest whose device holds what it is sent, beside a neighbour.
func holdingBeside(t *testing.T, o vhosttest.Options) (*end, *neighbour) {
	t.Helper()
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	d := newDevice(t, 1)
	d.wires[0].keep = true
	t.Cleanup(func() { releaseAll(d.wires[0]) })
	return start(t, d, o, func(o *backend.Options) { o.DrainTimeout = 20 * time.Millisecond }), n
}

// takings are the ways that a front-end has to take all of the guest's memory away. Where they are refused, the rings have lost it all the same.
var takings = map[string]func(t *testing.T, e *end){
	"SET_MEM_TABLE": func(t *testing.T, e *end) {
		other := vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: 1 << 45, Size: 1 << 20})
		t.Cleanup(other.Close)
		refused(t, e, "SET_MEM_TABLE", e.FE.SetMemTable([]vhostuser.MemoryRegion{other.MemoryRegion}, []int{other.FD}))
	},
	"REM_MEM_REG": func(t *testing.T, e *end) {
		first, second := e.FE.RemMemReg(e.Mem.Regions[0].MemoryRegion), e.FE.RemMemReg(e.Mem.Regions[1].MemoryRegion)
		refused(t, e, "REM_MEM_REG", errors.Join(first, second)) // one by one: a ring may have been in either
	},
	"disconnect": func(t *testing.T, e *end) {
		e.Hangup()
		vhosttest.Eventually(t, "the session's end", func() bool { return !e.be.Stats().Connected })
	},
}

// mapped checks how often the back-end maps each region of the guest.
func (e *end) mapped(t *testing.T, when string, want int) {
	t.Helper()
	for i, r := range e.Mem.Regions {
		if n := r.Mappings(t); n != want {
			t.Errorf("region %d: %d mappings %s, want %d", i, n, when, want)
		}
	}
}

// Guest memory is taken away while a device holds frames in it: what the device reads is still what was sent, and the memory goes with the last frame, not
// with the front-end.
func TestF16MemoryTakenInFlight(t *testing.T) {
	for name, take := range takings {
		t.Run(name, func(t *testing.T) {
			e, n := holdingBeside(t, vhosttest.Options{})
			w := e.dev.wires[0]
			e.sendHeld(t, 20)
			take(t, e)
			for _, q := range e.be.Stats().Queues {
				if q.Started {
					t.Errorf("queue %d runs", q.Index)
				}
			}
			n.goesOn(t)
			for i := range 20 {
				e.mapped(t, fmt.Sprintf("with %d frames in flight", 20-i), 1)
				b := w.letGo(0)
				if err := check(copyOf(b).data, i); err != nil {
					t.Errorf("in flight: %v", err)
				}
				b.Release(zerocopy.ZeroCopied)
			}
			e.mapped(t, "after the last frame", 0)
			w.set(false, false)
			w.got()
			next := &end{dev: e.dev, be: e.be, Guest: e.Successor(vhosttest.Options{})}
			next.works(t)
			n.goesOn(t)
		})
	}
}

// With nothing in flight, memory that is taken away has gone by the time of the answer.
func TestF16MemoryGoesWithTheAnswer(t *testing.T) {
	for name, take := range takings {
		t.Run(name, func(t *testing.T) {
			vhosttest.NoLeaks(t)
			n := newNeighbour(t)
			e := attack(t, vhosttest.Options{})
			e.mapped(t, "at first", 1)
			take(t, e)
			e.mapped(t, "after the answer", 0)
			e.Reconnect()
			e.works(t)
			e.mapped(t, "of the next session", 1)
			n.goesOn(t)
		})
	}
}

// A device that never completes: every request that stops a ring is answered, and the guest has its chains back.
func TestF17NeverCompletes(t *testing.T) {
	for name, stop := range map[string]func(e *end) error{
		"GET_VRING_BASE": func(e *end) error { e.Transmitq(0).Stop(); return nil },
		"SET_STATUS":     func(e *end) error { return e.FE.SetStatus(0) },
		"RESET_DEVICE":   func(e *end) error { return e.FE.ResetDevice() },
	} {
		t.Run(name, func(t *testing.T) {
			e, n := holdingBeside(t, vhosttest.Options{})
			e.sendHeld(t, 30)
			q := e.Transmitq(0)
			if used := q.Driver.RawUsedIndex() - uint16(vhosttest.StartIndex); used != 0 {
				t.Fatalf("%d chains are used: the device does complete", used)
			}
			begin := time.Now()
			if err := stop(e); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(begin); took > 10*time.Second { // the drain timeout is far less
				t.Errorf("the answer took %v", took)
			}
			if used := q.Driver.RawUsedIndex() - uint16(vhosttest.StartIndex); used != 30 {
				t.Errorf("%d chains were returned, want 30", used)
			}
			if g := e.be.Stats().Queues[1].GivenUp; g != 30 {
				t.Errorf("%d chains were given up, want 30", g)
			}
			n.goesOn(t)
		})
	}
}

// A guest that rewrites a buffer which is in flight changes what is sent, of its own frames.
func TestG14RewrittenInFlight(t *testing.T) {
	e, n := holdingBeside(t, vhosttest.Options{})
	w := e.dev.wires[0]
	e.sendHeld(t, 10)
	before := copyOf(w.held[3]).data
	for _, r := range e.Mem.Regions { // all of the guest's memory that is no ring, as far as it can be told apart
		for off := 0; off < len(r.Mem); off += 64 {
			if i := bytes.Index(r.Mem[off:min(off+164, len(r.Mem))], before[14:40]); i >= 0 {
				copy(r.Mem[off+i:], bytes.Repeat([]byte{0xbd}, 26))
			}
		}
	}
	if after := copyOf(w.held[3]).data; !bytes.Equal(after[14:40], bytes.Repeat([]byte{0xbd}, 26)) {
		t.Fatalf("the frame in flight is not the guest's memory: %x", after[:48])
	}
	for i := range 10 {
		b := w.letGo(0)
		if i != 3 {
			if err := check(copyOf(b).data, i); err != nil {
				t.Errorf("another frame: %v", err)
			}
		}
		b.Release(zerocopy.ZeroCopied)
	}
	if err := e.Transmitq(0).Settle(); err != nil {
		t.Error(err)
	}
	n.goesOn(t)
}

// A guest sends at full rate to a device that takes nothing, or takes it and never completes: no more than a ring of frames waits, and when the
// device goes on, they all leave in order.
func TestG17FloodOfAStuckDevice(t *testing.T) {
	for name, deaf := range map[string]bool{"takes nothing": true, "never completes": false} {
		t.Run(name, func(t *testing.T) {
			e, n := holdingBeside(t, vhosttest.Options{})
			w, q := e.dev.wires[0], e.Transmitq(0)
			w.set(!deaf, deaf)
			sent := 0
			for ; ; sent++ {
				if _, err := q.Add(virtio.NetHdr{}, vhosttest.Frame(uint64(sent), 100), nil); err != nil {
					break // the ring is full
				}
				q.Flush()
			}
			for range 10_000 { // and kicks
				q.Kick.Signal()
			}
			if sent != 256 || q.Reap() != 0 {
				t.Fatalf("%d frames in a ring of 256, and some came back: the device is not stuck", sent)
			}
			if !deaf {
				vhosttest.Eventually(t, "a full window", func() bool { return w.holds() == sent })
			}
			if st := e.be.Stats().Queues[1]; st.Pending > 256 || st.MaxPending > 256 {
				t.Errorf("%d frames are pending, %d were, in a ring of 256", st.Pending, st.MaxPending)
			}
			n.goesOn(t)
			w.set(false, false)
			for i := range w.holds() {
				b := w.letGo(0)
				if err := check(copyOf(b).data, i); err != nil {
					t.Error(err)
				}
				b.Release(zerocopy.ZeroCopied)
			}
			if err := q.Settle(); err != nil {
				t.Fatal(err)
			}
			for i, p := range w.got() {
				if err := check(p.data, i); err != nil {
					t.Error(err)
				}
			}
			e.works(t)
			n.goesOn(t)
		})
	}
}
