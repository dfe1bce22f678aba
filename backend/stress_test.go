package backend_test

import (
	"errors"
	"flag"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
)

// stressTime is how long TestControlAtFullRate runs: longer by hand, with the race detector (go test -race ./backend -run TestControlAtFullRate -stress 10m).
var stressTime = flag.Duration("stress", 0, "how long TestControlAtFullRate runs; 0 is a few seconds")

// Control messages at full rate, without the budget that would hold them up, while traffic runs on all queues of two guests that are wired to each other: memory comes and goes, rings stop, start, are
// disabled and reset, descriptors change, the front-end hangs up and comes back. The other guest, on which nothing of that happens, and the neighbour
// notice nothing; frames that arrive are whole.
func TestControlAtFullRate(t *testing.T) {
	for _, packed := range []bool{false, true} {
		for _, pair := range []bool{false, true} {
			t.Run(fmt.Sprintf("packed=%v, PairWorkers=%v", packed, pair), func(t *testing.T) { controlAtFullRate(t, packed, pair) })
		}
	}
}

const (
	stressPairs = 4
	stressCycle = 2 * stressPairs * 8 // steps in which all has happened once
)

func controlAtFullRate(t *testing.T, packed, pair bool) {
	vhosttest.NoLeaks(t)
	if require.Race {
		backend.TakeHeap(t) // the detector sees no other memory
	}
	n := newNeighbour(t)
	o := vhosttest.Options{Pairs: stressPairs, Packed: packed, Heap: require.Race}
	da, db := newLink(t, stressPairs)
	set := func(o *backend.Options) { o.MessageRate, o.PairWorkers = -1, pair }
	a, b := start(t, da, o, set), start(t, db, o, set)
	s := &stress{t: t, e: a, extra: vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: 1 << 40, Size: 1 << 20, Heap: require.Race})}
	defer s.extra.Close()
	var wg sync.WaitGroup
	done := make(chan struct{})
	for i := range stressPairs {
		for _, e := range []*end{a, b} {
			wg.Go(func() { s.send(done, e, i) })
			wg.Go(func() { s.receive(done, e, i) })
		}
	}
	limit := *stressTime
	if limit == 0 {
		limit = 2 * time.Second
	}
	ops := 0
	for end := time.Now().Add(limit); (ops < stressCycle || time.Now().Before(end)) && !t.Failed(); ops++ {
		s.step(ops)
	}
	close(done)
	wg.Wait()
	t.Logf("%d control steps, %d frames received", ops, s.received.total())
	if s.received.total() == 0 {
		t.Error("no frame came through")
	}
	if st := b.be.Stats(); st.Sessions != 1 || !st.Connected || st.FrontEndErrors+st.GuestErrors != 0 {
		t.Errorf("the other guest: %d sessions, connected %v, %d front-end errors, %d guest errors", st.Sessions, st.Connected, st.FrontEndErrors, st.GuestErrors)
	}
	if st := a.be.Stats(); st.FrontEndErrors+st.GuestErrors != 0 {
		t.Errorf("%d front-end errors, %d guest errors", st.FrontEndErrors, st.GuestErrors)
	}
	n.goesOn(t)
}

// stress is one guest under control messages. A driver's end of a queue has one user at a time, so what concerns a queue holds its lock.
type stress struct {
	t        *testing.T
	e        *end
	extra    *vhosttest.Region
	queues   [2 * stressPairs]sync.Mutex // of e alone
	received tally
}

// tally counts frames from many goroutines.
type tally struct {
	mu sync.Mutex
	n  int
}

func (c *tally) add()       { c.mu.Lock(); c.n++; c.mu.Unlock() }
func (c *tally) total() int { c.mu.Lock(); defer c.mu.Unlock(); return c.n }

// hold runs f, which uses queue q of e, alone.
func (s *stress) hold(e *end, q int, f func()) {
	if e == s.e {
		s.queues[q].Lock()
		defer s.queues[q].Unlock()
	}
	f()
}

// send adds frames for as long as there is room.
func (s *stress) send(done chan struct{}, e *end, i int) {
	for seq := uint64(0); !over(done); {
		s.hold(e, 2*i+1, func() {
			q := e.Transmitq(i)
			q.Reap()
			for range 16 {
				if _, err := q.Add(virtio.NetHdr{}, vhosttest.Frame(seq, 60+int(seq%1000)), nil); err != nil {
					break
				}
				seq++
			}
			q.Flush()
			if err := q.Driver.Err(); err != nil {
				s.t.Errorf("transmitq %d: %v", i, err)
			}
		})
		time.Sleep(50 * time.Microsecond)
	}
}

// receive takes frames, which must be whole.
func (s *stress) receive(done chan struct{}, e *end, i int) {
	for !over(done) && !s.t.Failed() {
		s.hold(e, 2*i, func() {
			for range 64 {
				_, frame, err := e.Recv(i, 0)
				if err != nil {
					if !errors.Is(err, vhosttest.ErrTimeout) {
						s.t.Errorf("receiveq %d: %v", i, err)
					}
					return
				}
				if _, err := vhosttest.CheckFrame(frame); err != nil {
					s.t.Errorf("receiveq %d: %v", i, err)
				}
				s.received.add()
			}
		})
		time.Sleep(50 * time.Microsecond)
	}
}

// step is one change of everything that a front-end may change.
func (s *stress) step(i int) {
	fe, q := s.e.FE, s.e.Queues[i%len(s.e.Queues)]
	index := uint32(q.Index)
	must := func(what string, err error) {
		if err != nil {
			s.t.Errorf("step %d: %s: %v", i, what, err)
		}
	}
	switch i / len(s.e.Queues) % 8 {
	case 0:
		s.e.ShareMemory()
	case 1:
		must("ADD_MEM_REG", fe.AddMemReg(s.extra.MemoryRegion, s.extra.FD))
		must("REM_MEM_REG", fe.RemMemReg(s.extra.MemoryRegion))
	case 2:
		must("SET_VRING_ENABLE", fe.SetVringEnable(index, false))
		must("SET_VRING_ENABLE", fe.SetVringEnable(index, true))
	case 3:
		s.hold(s.e, q.Index, func() { q.Stop(); q.Start() })
	case 4:
		must("SET_VRING_CALL", fe.SetVringCall(index, q.Call.FD()))
		must("SET_VRING_KICK", fe.SetVringKick(index, q.Kick.FD()))
		must("SET_VRING_ERR", fe.SetVringErr(index, q.Err.FD()))
	case 5:
		_, err := fe.GetStatus()
		must("GET_STATUS", err)
		must("SET_STATUS", fe.SetStatus(15))
		_ = s.e.be.Stats()
	case 6:
		if i%len(s.e.Queues) == 0 {
			s.all(func() { s.reset(i%3 == 0) })
		}
	case 7:
		if i%len(s.e.Queues) == 0 {
			s.all(s.e.Reconnect)
		}
	}
}

// reset resets the device, by SET_STATUS or RESET_DEVICE, and boots the guest anew.
func (s *stress) reset(byStatus bool) {
	var err error
	if byStatus {
		err = s.e.FE.SetStatus(0)
	} else if err = s.e.FE.ResetDevice(); err == nil {
		err = s.e.FE.SetFeatures(uint64(s.e.Features))
	}
	if err != nil {
		s.t.Errorf("reset: %v", err)
	}
	s.e.Reboot()
	s.e.StartQueues()
}

// all runs f with no queue in use by the driver.
func (s *stress) all(f func()) {
	for i := range s.queues {
		s.queues[i].Lock()
		defer s.queues[i].Unlock()
	}
	f()
}

func over(done chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}
