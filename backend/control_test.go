package backend_test

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
)

// refused checks that a request got a NACK, and that the session goes on.
func refused(t *testing.T, e *end, what string, err error) {
	t.Helper()
	var nack *vhostuser.NACKError
	if !errors.As(err, &nack) {
		t.Fatalf("%s: %v, want a refusal", what, err)
	}
	if _, err := e.FE.GetFeatures(); err != nil {
		t.Fatalf("after the refusal of %s: %v", what, err)
	}
}

func TestRestartGoesOnAtBase(t *testing.T) {
	a, b := link(t, vhosttest.Options{})
	for i := range 5 {
		runAll(t, both(a, b, 100, vhosttest.Flat, 60, 1514)...)
		a.Stop()
		// 100 frames went each way; b's buffers are held, which counts for nothing.
		if want := uint16(vhosttest.StartIndex + 100*(i+1)); a.Transmitq(0).Base != want || a.Receiveq(0).Base != want {
			t.Fatalf("bases %d and %d, want %d", a.Receiveq(0).Base, a.Transmitq(0).Base, want)
		}
		for _, q := range a.Queues {
			q.Start()
		}
	}
}

// A guest's reboot: the rings stop, and start again at index 0 with other contents.
func TestReboot(t *testing.T) {
	a, b := link(t, vhosttest.Options{})
	for range 3 {
		runAll(t, both(a, b, 300, vhosttest.Flat, 60, 1514)...)
		a.Stop()
		a.Reboot()
		a.StartQueues()
	}
}

// A VMM that was killed, or lost us, comes back: the device end finds in the used ring what was returned.
func TestReconnectResumesAtUsedIndex(t *testing.T) {
	a, b := link(t, vhosttest.Options{})
	for range 3 {
		runAll(t, both(a, b, 300, vhosttest.Flat, 60, 1514)...)
		a.Reconnect()
	}
	runAll(t, both(a, b, 300, vhosttest.Flat, 60, 1514)...)
	if st := a.be.Stats(); st.Sessions != 4 || !st.Connected {
		t.Errorf("%d sessions, connected %v", st.Sessions, st.Connected)
	}
}

// The base that a front-end passes after it lost a back-end may be anything: the used ring knows better. Chains that the last back-end
// had taken and not returned are taken again.
func TestBaseIsCorrectedByUsedIndex(t *testing.T) {
	for name, off := range map[string]uint16{"ahead": 40, "behind": 0xfff0} {
		t.Run(name, func(t *testing.T) {
			a, b := link(t, vhosttest.Options{})
			runAll(t, both(a, b, 300, vhosttest.Flat, 60)...)
			a.Hangup()
			q := a.Transmitq(0)
			for i := range 50 {
				if _, err := q.Add(virtio.NetHdr{}, vhosttest.Frame(uint64(i), 60), nil); err != nil {
					t.Fatal(err)
				}
			}
			q.Flush()
			a.Connect()
			for _, q := range a.Queues {
				q.Base = q.Driver.RawUsedIndex() + off
				q.Start()
			}
			if err := (flow{to: b, frames: 50}).receive(); err != nil {
				t.Fatal(err)
			}
			if err := q.Settle(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// during runs f again and again while traffic flows both ways.
func during(t *testing.T, a, b *end, f func(i int)) {
	t.Helper()
	done := make(chan error, 2)
	for _, fl := range both(a, b, 20_000, vhosttest.HeaderApart, 60, 1514, 300) {
		go func() { done <- fl.run() }()
	}
	for i, left := 0, 2; left > 0; i++ {
		select {
		case err := <-done:
			left--
			if err != nil {
				t.Error(err)
			}
		default:
			f(i)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}

func TestSetMemTableUnderTraffic(t *testing.T) {
	a, b := link(t, vhosttest.Options{})
	during(t, a, b, func(int) { a.ShareMemory() })
	for _, r := range a.Mem.Regions {
		if n := r.Mappings(t); n != 1 {
			t.Errorf("%d mappings of a region, want 1", n)
		}
	}
}

func TestMemRegionsComeAndGoUnderTraffic(t *testing.T) {
	a, b := link(t, vhosttest.Options{MemSlots: true})
	extra := vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: 1 << 40, Size: 4 << 20})
	defer extra.Close()
	during(t, a, b, func(int) {
		if err := a.FE.AddMemReg(extra.MemoryRegion, extra.FD); err != nil {
			t.Fatal(err)
		}
		r := extra.MemoryRegion
		r.MmapOffset = 0xdead // not looked at
		if err := a.FE.RemMemReg(r); err != nil {
			t.Fatal(err)
		}
	})
	if n := extra.Mappings(t); n != 0 {
		t.Errorf("%d mappings of the region that was removed", n)
	}
	st := a.be.Stats()
	if st.MemoryRegions != 2 || st.MemoryBytes != a.Mem.Regions[0].Size+a.Mem.Regions[1].Size {
		t.Errorf("memory: %d regions, %d bytes", st.MemoryRegions, st.MemoryBytes)
	}
}

// QEMU up to 8.0 adds and removes each region once for each queue pair.
func TestMemRegionAddedForEachPair(t *testing.T) {
	a, _ := link(t, vhosttest.Options{MemSlots: true})
	r := vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: 1 << 40, Size: 1 << 20})
	defer r.Close()
	for range 3 {
		if err := a.FE.AddMemReg(r.MemoryRegion, r.FD); err != nil {
			t.Fatal(err)
		}
	}
	for want := 1; want >= 0; want-- {
		if n := r.Mappings(t); n != 1 {
			t.Fatalf("%d mappings of the region, want 1", n)
		}
		if err := a.FE.RemMemReg(r.MemoryRegion); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.FE.RemMemReg(r.MemoryRegion); err != nil {
		t.Fatal(err)
	}
	if n := r.Mappings(t); n != 0 {
		t.Errorf("%d mappings of the region after the last removal", n)
	}
	if err := a.FE.RemMemReg(r.MemoryRegion); err == nil {
		t.Error("a region was removed more often than it was added")
	}
}

// Memory that was plugged in carries frames at once.
func TestAddedMemoryCarriesFrames(t *testing.T) {
	a, b := link(t, vhosttest.Options{})
	r := vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: 1 << 40, Size: 1 << 20})
	a.Mem.Add(r)
	if err := a.FE.AddMemReg(r.MemoryRegion, r.FD); err != nil {
		t.Fatal(err)
	}
	frame := append(make([]byte, virtio.NetHdrSize), vhosttest.Frame(0, 300)...)
	copy(r.Mem[4096:], frame)
	q := a.Transmitq(0)
	if _, err := q.Driver.Add([]vhosttest.Piece{{GPA: 1<<40 + 4096, Len: uint32(len(frame))}}, nil); err != nil {
		t.Fatal(err)
	}
	q.Flush()
	if err := (flow{to: b, frames: 1}).receive(); err != nil {
		t.Fatal(err)
	}
}

// QEMU up to 8.0 adds and removes each region once for each queue pair: it is one region, which goes with the last.
func TestMemRegionRepeated(t *testing.T) {
	a, b := link(t, vhosttest.Options{MemSlots: true})
	r := vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: 1 << 40, Size: 1 << 20})
	defer r.Close()
	for range 2 {
		for range 3 {
			if err := a.FE.AddMemReg(r.MemoryRegion, r.FD); err != nil {
				t.Fatal(err)
			}
			if n := r.Mappings(t); n != 1 {
				t.Fatalf("%d mappings of a region that was added, want 1", n)
			}
		}
		for i := range 3 {
			if n := r.Mappings(t); n != 1 {
				t.Fatalf("%d mappings after %d of 3 removals, want 1", n, i)
			}
			if err := a.FE.RemMemReg(r.MemoryRegion); err != nil {
				t.Fatal(err)
			}
		}
		if n := r.Mappings(t); n != 0 {
			t.Fatalf("%d mappings after the last removal", n)
		}
		refused(t, a, "REM_MEM_REG once more", a.FE.RemMemReg(r.MemoryRegion))
	}
	runAll(t, both(a, b, 100, vhosttest.Flat, 60)...)
}

func TestCallAndKickReplacedUnderTraffic(t *testing.T) {
	a, b := link(t, vhosttest.Options{})
	during(t, a, b, func(i int) {
		q := a.Queues[i%2]
		// The same counters under other descriptors: no notification of the driver's may be lost on the way.
		if err := a.FE.SetVringKick(uint32(q.Index), q.Kick.FD()); err != nil {
			t.Fatal(err)
		}
		if err := a.FE.SetVringCall(uint32(q.Index), q.Call.FD()); err != nil {
			t.Fatal(err)
		}
		if err := a.FE.SetVringErr(uint32(q.Index), -1); err != nil {
			t.Fatal(err)
		}
	})
}

// Whether a driver was called through the old descriptor nobody knows: it is called through the new one.
func TestNewCallDescriptorIsSignalled(t *testing.T) {
	a, _ := link(t, vhosttest.Options{})
	q := a.Transmitq(0)
	q.Call.Drain()
	if err := a.FE.SetVringCall(1, q.Call.FD()); err != nil {
		t.Fatal(err)
	}
	if !q.Call.Drain() {
		t.Error("the new call descriptor was not signalled")
	}
}

// stopped checks that nothing moves on e's rings.
func stopped(t *testing.T, e *end) {
	t.Helper()
	for _, q := range e.be.Stats().Queues {
		if q.Started {
			t.Errorf("queue %d is started", q.Index)
		}
	}
}

func TestStatus(t *testing.T) {
	a, b := link(t, vhosttest.Options{})
	for _, s := range []uint8{1, 3, 11, 15} {
		if err := a.FE.SetStatus(s); err != nil {
			t.Fatal(err)
		}
		if got, err := a.FE.GetStatus(); err != nil || got != s {
			t.Fatalf("GET_STATUS: %d, %v; want %d", got, err, s)
		}
	}
	runAll(t, both(a, b, 100, vhosttest.Flat, 60)...)
	if err := a.FE.SetStatus(0); err != nil {
		t.Fatal(err)
	}
	stopped(t, a)
	a.Reboot()
	a.StartQueues()
	runAll(t, both(a, b, 100, vhosttest.Flat, 60)...)
}

// A broken ring asks for a reset in the device status (virtio-v1.2 §2.1.2), and a reset of any kind ends that.
func TestStatusNeedsReset(t *testing.T) {
	for name, reset := range map[string]func(e *end) error{
		"SET_STATUS":   func(e *end) error { return e.FE.SetStatus(0) },
		"RESET_DEVICE": func(e *end) error { return e.FE.ResetDevice() },
	} {
		t.Run(name, func(t *testing.T) {
			vhosttest.NoLeaks(t)
			e := start(t, newDevice(t, 1), vhosttest.Options{})
			q := e.Transmitq(0)
			q.Driver.RawSetAvailIndex(0x1000)
			q.Kick.Signal()
			status := func() uint8 {
				s, err := e.FE.GetStatus()
				if err != nil {
					t.Fatal(err)
				}
				return s
			}
			vhosttest.Eventually(t, "DEVICE_NEEDS_RESET", func() bool { return status()&64 != 0 })
			if err := reset(e); err != nil {
				t.Fatal(err)
			}
			if s := status(); s != 0 {
				t.Errorf("device status %d after the reset", s)
			}
			if st := e.be.Stats().Queues[1]; st.Broken != "" {
				t.Errorf("after the reset, the queue is broken: %s", st.Broken)
			}
		})
	}
}

func TestResetDevice(t *testing.T) {
	a, b := link(t, vhosttest.Options{})
	runAll(t, both(a, b, 100, vhosttest.Flat, 60)...)
	if err := a.FE.ResetDevice(); err != nil {
		t.Fatal(err)
	}
	stopped(t, a)
	if st := a.be.Stats(); len(st.Features) != 0 {
		t.Errorf("features after a reset: %v", st.Features)
	}
	// The owner and the memory stay.
	if err := a.FE.SetFeatures(uint64(a.Features)); err != nil {
		t.Fatal(err)
	}
	a.Reboot()
	a.StartQueues()
	runAll(t, both(a, b, 100, vhosttest.Flat, 60)...)
}

func TestResetOwnerDisablesRings(t *testing.T) {
	a, b := link(t, vhosttest.Options{})
	runAll(t, both(a, b, 100, vhosttest.Flat, 60)...)
	if err := a.FE.ResetOwner(); err != nil {
		t.Fatal(err)
	}
	for _, q := range a.be.Stats().Queues {
		if q.Enabled {
			t.Errorf("queue %d is enabled", q.Index)
		}
	}
	if err := a.FE.SetOwner(); err != nil {
		t.Fatal(err)
	}
	for _, q := range a.Queues {
		q.Enable(true)
	}
	runAll(t, both(a, b, 100, vhosttest.Flat, 60)...)
}

// A front-end may say again where a ring is while it runs, and where it will be while it does not.
func TestVringAddrRepeated(t *testing.T) {
	a, b := link(t, vhosttest.Options{})
	q := a.Transmitq(0)
	if err := a.FE.SetVringAddr(q.Addr()); err != nil {
		t.Fatal(err)
	}
	moved := q.Addr()
	moved.Desc += 16
	refused(t, a, "SET_VRING_ADDR elsewhere", a.FE.SetVringAddr(moved))
	refused(t, a, "SET_VRING_NUM", a.FE.SetVringNum(1, 128))
	refused(t, a, "SET_VRING_BASE", a.FE.SetVringBase(1, 0))
	runAll(t, both(a, b, 100, vhosttest.Flat, 60)...)
}

// The descriptors of a session that ended are closed, those for notifications included.
func TestNotificationDescriptorsAreClosed(t *testing.T) {
	vhosttest.NoLeaks(t)
	e := start(t, newDevice(t, 1), vhosttest.Options{})
	fd, watch := must(unix.Eventfd(1, unix.EFD_CLOEXEC)), must(unix.EpollCreate1(unix.EPOLL_CLOEXEC))
	defer unix.Close(watch)
	if err := unix.EpollCtl(watch, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN}); err != nil {
		t.Fatal(err)
	}
	if err := e.FE.SetVringErr(0, fd); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	open := func() bool { // epoll reports a file for as long as anybody has it
		n, err := unix.EpollWait(watch, make([]unix.EpollEvent, 1), 0)
		return n == 1 && err == nil
	}
	if !open() {
		t.Fatal("the back-end has closed the descriptor")
	}
	e.Hangup()
	vhosttest.Eventually(t, "the end of the eventfd", func() bool { return !open() })
}
