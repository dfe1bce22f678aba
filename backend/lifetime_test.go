package backend_test

import (
	"bytes"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// holding is a guest whose device keeps every frame.
func holding(t *testing.T, o vhosttest.Options, set ...func(*backend.Options)) *end {
	t.Helper()
	vhosttest.NoLeaks(t)
	d := newDevice(t, 1)
	d.wires[0].keep = true
	e := start(t, d, o, set...)
	t.Cleanup(func() { releaseAll(d.wires[0]) }) // before the leak check
	return e
}

// releaseAll lets go of all that is held.
func releaseAll(w *wire) (n int) {
	for ; w.holds() > 0; n++ {
		w.letGo(0).Release(zerocopy.ZeroCopied)
	}
	return n
}

// sendHeld sends n frames and waits until the device holds them.
func (e *end) sendHeld(t *testing.T, n int) {
	t.Helper()
	w := e.dev.wires[0]
	had := w.holds()
	for i := range n {
		if err := e.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(i), 100), nil); err != nil {
			t.Fatal(err)
		}
	}
	vhosttest.Eventually(t, "frames in the device", func() bool { return w.holds() == had+n })
}

// Releases land in any order, on any goroutine; used elements come in the order of the ring, up to the first frame that is still out.
func TestWindowOrder(t *testing.T) {
	e := holding(t, vhosttest.Options{})
	q, w := e.Transmitq(0), e.dev.wires[0]
	e.sendHeld(t, 10)
	used := func() uint16 { return q.Driver.RawUsedIndex() - vhosttest.StartIndex }
	for _, b := range []int{9, 7, 5, 3, 1} {
		w.letGo(b).Release(zerocopy.ZeroCopied)
	}
	time.Sleep(20 * time.Millisecond) // what must not happen needs time not to
	if n := used(); n != 0 {
		t.Fatalf("%d chains are used while the first is out", n)
	}
	for i, want := range []uint16{2, 4, 6, 8, 10} {
		w.letGo(0).Release(zerocopy.ZeroCopied)
		vhosttest.Eventually(t, "used elements", func() bool { return used() == want })
		if n := q.Reap(); n != 2 || q.Driver.Err() != nil {
			t.Fatalf("round %d: %d chains reaped, %v", i, n, q.Driver.Err())
		}
	}
	st := e.be.Stats().Queues[1]
	if st.Outcomes["zerocopied"] != 10 || st.MaxPending != 10 || st.Pending != 0 || st.MaxWaitNs == 0 {
		t.Errorf("%+v", st)
	}
}

// Contract lines 8 and 9 under load: a device that releases out of order, from several goroutines, with copies in between. The driver end
// complains of any chain that comes back twice, out of order, or not at all.
func TestEveryChainIsReturnedOnce(t *testing.T) {
	for name, without := range map[string]virtio.Features{"in order": 0, "not in order": virtio.FInOrder, "flags": virtio.FEventIdx} {
		t.Run(name, func(t *testing.T) {
			e := holding(t, vhosttest.Options{Without: without})
			w := e.dev.wires[0]
			stop := make(chan struct{})
			var releasing sync.WaitGroup
			for g := range 3 {
				releasing.Go(func() { shuffle(w, uint64(g), stop) })
			}
			for i := range 30_000 {
				if i%1000 == 0 {
					w.set(i%2000 == 0, false) // now and then the device copies
				}
				if err := e.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(i), 60), vhosttest.HeaderApart); err != nil {
					t.Fatal(err)
				}
			}
			err := e.Transmitq(0).Settle()
			close(stop)
			releasing.Wait()
			if err != nil {
				t.Fatal(err)
			}
			st := e.be.Stats().Queues[1]
			if st.Frames != 30_000 || st.Pending != 0 || st.GivenUp != 0 {
				t.Errorf("%+v", st)
			}
			if st.Outcomes["zerocopied"]+st.Outcomes["copied"] != 30_000 || st.Outcomes["zerocopied"] < 1000 || st.Outcomes["copied"] < 1000 {
				t.Errorf("outcomes %v", st.Outcomes)
			}
		})
	}
}

// shuffle lets go of what is held, in random order, until stop.
func shuffle(w *wire, seed uint64, stop chan struct{}) {
	r := rand.New(rand.NewPCG(seed, 1))
	for {
		select {
		case <-stop:
			return
		default:
		}
		w.mu.Lock()
		var b *zerocopy.Buffer
		if n := len(w.held); n > 0 {
			i := r.IntN(n)
			b = w.held[i]
			w.held = slices.Delete(w.held, i, i+1)
		}
		w.mu.Unlock()
		if b == nil {
			runtime.Gosched()
			continue
		}
		b.Release(zerocopy.ZeroCopied)
	}
}

// Contract line 10: the guest goes to sleep over its buffers, and is called when they are free.
func TestQuietGuestGetsItsBuffersBack(t *testing.T) {
	for name, without := range map[string]virtio.Features{"event_idx": 0, "flags": virtio.FEventIdx} {
		t.Run(name, func(t *testing.T) {
			e := holding(t, vhosttest.Options{Without: without})
			q, w := e.Transmitq(0), e.dev.wires[0]
			for i := range 20 {
				e.sendHeld(t, 3)
				if i%2 == 0 {
					time.Sleep(2 * time.Millisecond) // the worker has nothing to do and goes to sleep; else it may be awake
				}
				done := make(chan struct{})
				go func() { defer close(done); releaseAll(w) }()
				if err := q.Settle(); err != nil {
					t.Fatal(err)
				}
				<-done
			}
		})
	}
}

// Contract line 12: in-flight frames come back before GET_VRING_BASE answers.
func TestGetVringBaseWaitsForFlight(t *testing.T) {
	e := holding(t, vhosttest.Options{}, func(o *backend.Options) { o.DrainTimeout = vhosttest.Patience })
	q := e.Transmitq(0)
	e.sendHeld(t, 20)
	go func() {
		time.Sleep(50 * time.Millisecond)
		releaseAll(e.dev.wires[0])
	}()
	q.Stop()
	if n := q.Reap(); n != 20 || q.Base != (vhosttest.StartIndex+20)&0xffff {
		t.Errorf("%d chains are back, base %d", n, q.Base)
	}
	if st := e.be.Stats().Queues[1]; st.GivenUp != 0 || st.Outcomes["zerocopied"] != 20 {
		t.Errorf("%+v", st)
	}
}

// A device that never completes: every chain comes back at the deadline, and the memory stays mapped until the device lets go.
func TestGetVringBaseGivesUpAtDeadline(t *testing.T) {
	e := holding(t, vhosttest.Options{}, func(o *backend.Options) { o.DrainTimeout = 50 * time.Millisecond })
	q, w := e.Transmitq(0), e.dev.wires[0]
	e.sendHeld(t, 20)
	q.Stop()
	if n := q.Reap(); n != 20 {
		t.Errorf("%d chains are back, want 20", n)
	}
	if st := e.be.Stats().Queues[1]; st.GivenUp != 20 || st.Pending != 0 {
		t.Errorf("%+v", st)
	}
	q.Start()
	e.sendHeld(t, 7) // the ring goes on beside what the device still holds
	if n := releaseAll(w); n != 27 {
		t.Errorf("%d buffers were held, want 27", n)
	}
	if err := q.Settle(); err != nil {
		t.Fatal(err)
	}
}

// Contract line 12: what this process holds is copied out, so that nothing is given up.
func TestGetVringBaseOrphans(t *testing.T) {
	vhosttest.NoLeaks(t)
	d := newDevice(t, 1)
	d.wires[0].keep, d.wires[0].orphans = true, true
	e := start(t, d, vhosttest.Options{}, func(o *backend.Options) { o.DrainTimeout = 100 * time.Millisecond })
	e.sendHeld(t, 20)
	q := e.Transmitq(0)
	q.Stop()
	if n := q.Reap(); n != 20 {
		t.Errorf("%d chains are back, want 20", n)
	}
	if st := e.be.Stats().Queues[1]; st.GivenUp != 0 || st.Outcomes["copied"] != 20 || d.wires[0].orphaned != 20 {
		t.Errorf("%d frames orphaned, %+v", d.wires[0].orphaned, st)
	}
	q.Start()
	e.sendHeld(t, 5)
}

// Contract line 7: the front-end is gone, its memory is not, as long as the device reads it.
func TestDisconnectKeepsMemoryInFlight(t *testing.T) {
	e := holding(t, vhosttest.Options{}, func(o *backend.Options) { o.DrainTimeout = 20 * time.Millisecond })
	w := e.dev.wires[0]
	e.sendHeld(t, 20)
	e.Hangup()
	vhosttest.Eventually(t, "the session's end", func() bool { return !e.be.Stats().Connected })
	if n := e.Mem.Regions[1].Mappings(t); n != 1 {
		t.Errorf("%d mappings with frames in flight, want 1", n)
	}
	// The pages are what the guest wrote, still.
	for i := range 20 {
		b := w.letGo(0)
		frame := make([]byte, b.Len())
		b.CopyTo(frame, 0)
		if err := check(frame, i); err != nil {
			t.Error(err)
		}
		if n := e.Mem.Regions[1].Mappings(t); n != 1 {
			t.Errorf("%d mappings with %d frames in flight, want 1", n, 20-i)
		}
		b.Release(zerocopy.ZeroCopied)
	}
	for i, r := range e.Mem.Regions {
		if n := r.Mappings(t); n != 0 {
			t.Errorf("region %d: %d mappings after the last release", i, n)
		}
	}
}

// Contract line 7: a region that was removed stays while a frame in it is in flight.
func TestRemovedMemoryStaysWhileInFlight(t *testing.T) {
	for name, change := range map[string]func(e *end, r *vhosttest.Region) error{
		"REM_MEM_REG":   func(e *end, r *vhosttest.Region) error { return e.FE.RemMemReg(r.MemoryRegion) },
		"SET_MEM_TABLE": func(e *end, r *vhosttest.Region) error { e.Mem.Remove(r); e.ShareMemory(); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			e := holding(t, vhosttest.Options{})
			q, w := e.Transmitq(0), e.dev.wires[0]
			r := vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: 1 << 40, Size: 1 << 20})
			t.Cleanup(r.Close)
			e.Mem.Add(r)
			if err := e.FE.AddMemReg(r.MemoryRegion, r.FD); err != nil {
				t.Fatal(err)
			}
			frame := append(make([]byte, virtio.NetHdrSize), vhosttest.Frame(0, 300)...)
			copy(r.Mem, frame)
			if _, err := q.Driver.Add([]vhosttest.Piece{{GPA: 1 << 40, Len: uint32(len(frame))}}, nil); err != nil {
				t.Fatal(err)
			}
			q.Flush()
			vhosttest.Eventually(t, "the frame in the device", func() bool { return w.holds() == 1 })
			if err := change(e, r); err != nil {
				t.Fatal(err)
			}
			e.sendHeld(t, 30) // under the new table
			if n := r.Mappings(t); n != 1 {
				t.Fatalf("%d mappings of the removed region with a frame in flight, want 1", n)
			}
			b := w.letGo(0)
			got := make([]byte, b.Len())
			b.CopyTo(got, 0)
			if err := check(got, 0); err != nil {
				t.Error(err)
			}
			b.Release(zerocopy.ZeroCopied)
			vhosttest.Eventually(t, "the end of the mapping", func() bool { return r.Mappings(t) == 0 })
			releaseAll(w)
			for q.Driver.Out() > 0 {
				if _, _, ok := q.Driver.Reap(); !ok && q.Driver.Err() != nil {
					t.Fatal(q.Driver.Err())
				}
			}
		})
	}
}

// A frame that was popped and that the device did not take is popped again after a change of memory, from the new mapping.
func TestUntakenFramesSurviveMemoryChange(t *testing.T) {
	vhosttest.NoLeaks(t)
	a, b := func() (*end, *end) {
		da, db := newLink(t, 1)
		return start(t, da, vhosttest.Options{}), start(t, db, vhosttest.Options{})
	}()
	for round := range 5 {
		a.dev.wires[0].set(false, true)
		for i := range 100 {
			if err := a.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(i), 100), nil); err != nil {
				t.Fatal(err)
			}
		}
		vhosttest.Eventually(t, "popped frames", func() bool { return a.be.Stats().Queues[1].Pending > 0 })
		a.ShareMemory()
		if round%2 == 1 { // or after a stop
			a.Stop()
			for _, q := range a.Queues {
				q.Start()
			}
		}
		a.dev.wires[0].set(false, false)
		if err := (flow{to: b, frames: 100}).receive(); err != nil {
			t.Fatal(err)
		}
		if err := a.Transmitq(0).Settle(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRestartCutsNoFrameShort: a frame that had to be cut, and had found room for in part when the receiveq stopped (as at a pause of the guest), arrives whole
// once it runs again. When the session ends instead, its rest counts as lost.
func TestRestartCutsNoFrameShort(t *testing.T) {
	vhosttest.NoLeaks(t)
	e := start(t, newDevice(t, 1), vhosttest.Options{QueueSize: 8, Without: virtio.FNetGuestTSO4 | virtio.FNetGuestECN})
	payload := vhosttest.Frame(1, 30000)
	f := append(make([]byte, 54), payload...)
	f[12], f[14], f[16], f[17], f[23], f[46] = 8, 0x45, byte((len(f)-14)>>8), byte(len(f)-14), 6, 0x50 // IPv4, TCP without options
	hdr := virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, GSOType: virtio.GSOTCPv4, GSOSize: 1000, HdrLen: 54, CsumStart: 34, CsumOffset: 16}
	waits := func() {
		before := e.be.Stats().Queues[0].NoRoom
		e.dev.wires[0].push(parcel{hdr, f})
		vhosttest.Eventually(t, "the rest to wait", func() bool { return e.be.Stats().Queues[0].NoRoom > before })
	}
	waits()
	e.Queues[0].Stop()
	e.Queues[0].Start()
	var got []byte
	for len(got) < len(payload) {
		_, b, err := e.Recv(0, vhosttest.Patience)
		if err != nil {
			t.Fatalf("after %d bytes of %d: %v", len(got), len(payload), err)
		}
		got = append(got, b[54:]...)
	}
	if !bytes.Equal(got, payload) {
		t.Error("the segments do not make up the frame")
	}
	waits()
	e.Hangup()
	vhosttest.Eventually(t, "the end", func() bool { return !e.be.Stats().Connected })
	if st := e.be.Stats().Queues[0]; st.TooBig != 30-8 {
		t.Errorf("%d segments count as lost, want %d", st.TooBig, 30-8)
	}
}

// With many queues the frames of all are waited for at the same time, and no worker goes on meanwhile. Here the frame of the first queue is released when the
// last one is reaped: whoever waits for one queue after the other waits in vain.
func TestQueuesDrainTogether(t *testing.T) {
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	const pairs = 8
	for name, stop := range map[string]func(e *end){
		"RESET_DEVICE": func(e *end) { ok(e.FE.ResetDevice()) },
		"SET_STATUS 0": func(e *end) { ok(e.FE.SetStatus(0)) },
		"disconnect":   func(e *end) { e.Hangup() },
		"SET_MEM_TABLE": func(e *end) { // that has no ring in it
			r := e.Mem.Regions[0]
			if err := e.FE.SetMemTable([]vhostuser.MemoryRegion{r.MemoryRegion}, []int{r.FD}); err == nil {
				t.Error("SET_MEM_TABLE without the rings was not refused")
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			vhosttest.NoLeaks(t)
			d := newDevice(t, pairs)
			e := start(t, d, vhosttest.Options{Pairs: pairs, QueueSize: 16}, func(o *backend.Options) { o.DrainTimeout = vhosttest.Patience })
			for i, w := range d.wires {
				w.set(true, false)
				ok(e.Send(i, virtio.NetHdr{}, vhosttest.Frame(uint64(i), 100), nil))
				vhosttest.Eventually(t, "the frame in the device", func() bool { return w.holds() == 1 })
			}
			for i, w := range d.wires {
				next := d.wires[(i+1)%pairs]
				w.mu.Lock()
				w.reaped = func() { releaseAll(next) }
				w.mu.Unlock()
			}
			stop(e)
			e.Hangup()
			vhosttest.Eventually(t, "the session's end", func() bool { return !e.be.Stats().Connected })
			for i := range pairs {
				if st := e.be.Stats().Queues[2*i+1]; st.GivenUp != 0 || st.Frames != 1 {
					t.Errorf("queue %d: %+v", 2*i+1, st)
				}
				if n := e.Transmitq(i).Reap(); n != 1 {
					t.Errorf("queue %d: %d chains are back, want 1", 2*i+1, n)
				}
			}
		})
	}
}
