package backend_test

import (
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
)

// within checks that f, which asks the back-end something, is not held up by a session that somebody keeps waiting.
func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { f(); close(done) }()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Fatalf("%s waits", what)
	}
}

// fill makes writes of an eventfd wait, whoever looked at it before.
func fill(t *testing.T, fd int) {
	t.Helper()
	drain(fd)
	if _, err := unix.Write(fd, u64(math.MaxUint64-1)); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
}

func drain(fd int) {
	unix.SetNonblock(fd, true)
	unix.Read(fd, make([]byte, 8))
}

// callFor sends a frame whose return the guest wants to be called for.
func callFor(e *end) error {
	q := e.Transmitq(0)
	q.Driver.EnableCall()
	_, err := q.Add(virtio.NetHdr{}, vhosttest.Frame(0, 100), nil)
	q.Flush()
	return err
}

// Who hands over a descriptor keeps the open file: he can make it block again, and fill its counter, after it was looked at.
func TestF18BlockingAgain(t *testing.T) {
	for name, ring := range map[string]func(e *end, fd int) error{
		"call": func(e *end, fd int) error {
			if err := e.FE.SetVringCall(1, fd); err != nil {
				return err
			}
			fill(t, fd)
			return callFor(e)
		},
		"overfull call": func(e *end, fd int) error {
			if err := e.FE.SetVringCall(1, fd); err != nil {
				return err
			}
			fill(t, fd)
			overflow(t, fd)
			return callFor(e)
		},
		"err": func(e *end, fd int) error {
			if err := e.FE.SetVringErr(1, fd); err != nil {
				return err
			}
			fill(t, fd)
			q := e.Transmitq(0)
			q.Driver.RawSetAvailIndex(0x1000)
			q.Kick.Signal()
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			vhosttest.NoLeaks(t)
			n := newNeighbour(t)
			e := start(t, newDevice(t, 1), vhosttest.Options{Without: virtio.FEventIdx})
			fd := must(unix.Eventfd(0, unix.EFD_CLOEXEC))
			defer unix.Close(fd)
			defer drain(fd)
			if err := ring(e, fd); err != nil {
				t.Fatal(err)
			}
			time.Sleep(50 * time.Millisecond)
			within(t, "Stats", func() { e.be.Stats() })
			n.goesOn(t)
			e.Hangup()
			vhosttest.Eventually(t, "the session's end", func() bool { return !e.be.Stats().Connected })
			e.Connect()
			e.Reboot()
			e.StartQueues()
			e.dev.wires[0].got()
			e.works(t)
		})
	}
}

// Nor may he have every write wait for a moment, shorter than what the watch would see if it came regularly.
func TestF18BlocksForMoments(t *testing.T) {
	vhosttest.NoLeaks(t)
	e := start(t, newDevice(t, 1), vhosttest.Options{Without: virtio.FEventIdx})
	fd := must(unix.Eventfd(0, unix.EFD_CLOEXEC))
	defer unix.Close(fd)
	if err := e.FE.SetVringCall(1, fd); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	defer func() { close(stop); <-done }()
	go func() {
		defer close(done)
		defer drain(fd)
		for {
			drain(fd)
			unix.Write(fd, u64(math.MaxUint64-1)) // unless it has been signalled meanwhile
			unix.SetNonblock(fd, false)
			select {
			case <-stop:
				return
			case <-time.After(500 * time.Microsecond):
			}
		}
	}()
	q := e.Transmitq(0)
	vhosttest.Eventually(t, "the session's end", func() bool {
		for q.Reap() > 0 {
		}
		if q.Driver.Out() == 0 {
			if err := callFor(e); err != nil {
				t.Fatal(err)
			}
		}
		return !e.be.Stats().Connected
	})
}

// Of a kick that is readable the guest can take the count before the worker does.
func TestF18KickTakenBack(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	fd := e.Transmitq(0).Kick.FD()
	if err := unix.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
	var over atomic.Bool
	done := make(chan struct{})
	go func() { // it waits for the count as the worker does, and often has it first
		defer close(done)
		for b := make([]byte, 8); !over.Load(); {
			unix.Read(fd, b)
		}
	}()
	stop := sync.OnceFunc(func() {
		over.Store(true)
		unix.SetNonblock(fd, true)
		vhosttest.Eventually(t, "the other reader is woken", func() bool {
			unix.Write(fd, u64(1)) // the worker may have it first
			select {
			case <-done:
				return true
			default:
				return false
			}
		})
	})
	defer stop()
	for range 2000 {
		if _, err := unix.Write(fd, u64(1)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Microsecond)
		within(t, "Stats", func() { e.be.Stats() })
	}
	stop()
	e.works(t)
	n.goesOn(t)
}

// A close can wait for whoever the descriptor leads to. That holds up the session that it came with, and nobody who asks about it.
func TestF18CloseThatWaits(t *testing.T) {
	region := slices.Concat(u64(0), u64(1<<40), u64(4096), u64(1<<40), u64(0))
	for name, m := range map[string][]byte{
		"kick":   append(header(vhostuser.ReqSetVringKick, vhostuser.FlagVersion, 8), u64(1)...),
		"memory": append(header(vhostuser.ReqAddMemReg, vhostuser.FlagVersion, len(region)), region...),
		"none":   header(vhostuser.ReqGetFeatures, vhostuser.FlagVersion, 0),
	} {
		t.Run(name, func(t *testing.T) {
			vhosttest.NoLeaks(t)
			n := newNeighbour(t)
			e := attack(t, vhosttest.Options{})
			fd, release := vhosttest.Lingering(t)
			e.raw(t, m[:1], fd)
			time.Sleep(50 * time.Millisecond) // it is the back-end's now
			unix.Close(fd)
			e.raw(t, m[1:])
			time.Sleep(50 * time.Millisecond)
			within(t, "Stats", func() { e.be.Stats() })
			e.Hangup()
			within(t, "the end of the session", func() {
				for e.be.Stats().Connected {
					time.Sleep(time.Millisecond)
				}
			})
			n.goesOn(t)
			release()
		})
	}
}
