package backend_test

import (
	"errors"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// TestKickStorm: kicks of a queue in which there is nothing to do add up: a worker wakes for few of them, and for a frame as ever.
func TestKickStorm(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := start(t, newDevice(t, 1), vhosttest.Options{})
	e.works(t)
	q := e.Transmitq(0)
	before, begin := e.be.Stats().Queues[1], time.Now()
	for time.Since(begin) < 200*time.Millisecond {
		q.Kick.Signal()
	}
	after := e.be.Stats().Queues[1]
	// A pause is never shorter than 100 us, so that there is no more than one kick to it, however fast the machine is.
	if kicks, most := after.Kicks-before.Kicks, uint64(time.Since(begin)/(100*time.Microsecond))+100; kicks > most {
		t.Errorf("the worker woke for %d kicks, want %d at most", kicks, most)
	}
	for i := range 100 {
		if err := e.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(i), 100), nil); err != nil {
			t.Fatal(err)
		}
		if err := q.Settle(); err != nil {
			t.Fatal(err)
		}
	}
	n.goesOn(t)
}

// TestWorthlessChains: a worker whose guest sends nothing but chains without a frame pauses between batches, and goes on as ever when it is sent frames.
func TestWorthlessChains(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := start(t, newDevice(t, 1), vhosttest.Options{})
	e.works(t)
	const chains, free, batch = 20000, 2048, 64 // free before the first pause; at most so many in a batch
	q, begin := e.Transmitq(0), time.Now()
	for sent := 0; sent < chains; {
		_, err := q.Resend(virtio.NetHdrSize+1, nil)
		switch {
		case err == nil:
			sent++
			continue
		case !errors.Is(err, vring.ErrFull):
			t.Fatal(err)
		}
		q.Flush()
		if q.Reap() == 0 {
			time.Sleep(50 * time.Microsecond)
		}
	}
	q.Flush()
	if err := q.Settle(); err != nil {
		t.Fatal(err)
	}
	if took, least := time.Since(begin), (chains-free)/batch*time.Millisecond; took < least {
		t.Errorf("%d chains without a frame were taken in %v, want %v at least", chains, took, least)
	}
	if got := e.be.Stats().Queues[1].Malformed; got != chains {
		t.Errorf("%d chains count as malformed of %d", got, chains)
	}
	e.works(t)
	n.goesOn(t)
}

// TestWorthlessBuffers is TestWorthlessChains of a receiveq: a frame waits for a buffer, and the guest posts none that can take any.
func TestWorthlessBuffers(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := unposted(t)
	const chains, free, batch = 4000, 2048, 8 // free before the first pause; at most so many in a turn
	q, begin := e.Receiveq(0), time.Now()
	bad := []vhosttest.Piece{{GPA: e.Mem.Alloc(virtio.NetHdrSize, 8), Len: virtio.NetHdrSize}}
	e.dev.wires[0].push(parcel{data: vhosttest.Frame(7, 500)})
	for posted, back := 0, 0; back < chains; {
		for posted < chains {
			if _, err := q.Driver.Add(nil, bad); errors.Is(err, vring.ErrFull) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			posted++
		}
		q.Flush()
		if _, _, ok := q.Driver.Reap(); ok {
			back++
			continue
		}
		if err := q.Wait(vhosttest.Patience); err != nil {
			t.Fatal(err)
		}
	}
	if took, least := time.Since(begin), (chains-free)/batch*time.Millisecond; took < least {
		t.Errorf("%d buffers that take no frame were returned in %v, want %v at least", chains, took, least)
	}
	if err := q.Post(); err != nil {
		t.Fatal(err)
	}
	if _, f, err := e.Recv(0, vhosttest.Patience); err != nil || check(f, 7) != nil {
		t.Errorf("the frame that waited: %v, %v", err, check(f, 7))
	}
	n.goesOn(t)
}

// TestReconnectStorm: front-ends that come and go as fast as they can are served at a rate, and the Backend ends when it is told to all the same.
func TestReconnectStorm(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := start(t, newDevice(t, 1), vhosttest.Options{})
	const burst, more, rate = 200, 20, 50 // of backend.Serve
	begin := time.Now()
	for range burst + more {
		e.Dial()
		e.Barrier()
	}
	if took, least := time.Since(begin), more*time.Second/rate; took < least*9/10 {
		t.Errorf("%d front-ends beyond the burst were served in %v, want %v at least", more, took, least)
	}
	n.goesOn(t)
}

// TestMessageBudgetOutlivesSession: a front-end that comes back has no more messages than one that stays.
func TestMessageBudgetOutlivesSession(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := start(t, newDevice(t, 1), vhosttest.Options{})
	const sessions, tables, heavy, burst, rate = 3, 250, 8, 4096, 2000 // the latter of package vhostuser
	begin := time.Now()
	for range sessions {
		for range tables {
			e.ShareMemory()
		}
		e.Reconnect()
	}
	e.Barrier()
	if took, least := time.Since(begin), (sessions*tables*heavy-burst)*time.Second/rate; took < least*9/10 {
		t.Errorf("%d memory tables of %d sessions took %v, want %v at least", sessions*tables, sessions, took, least)
	}
	n.goesOn(t)
}
