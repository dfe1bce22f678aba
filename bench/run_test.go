package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/placement"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/null"
	"github.com/vhostd/vhostd/netdev/pair"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// socketIn is a path for a socket, short enough for one.
func socketIn(t *testing.T) string {
	t.Helper()
	return filepath.Join(vhosttest.ShortDir(t), "s")
}

// serve runs a back-end in this process until the test ends or stop is called.
func serve(t *testing.T, dev netdev.Device, src vhostuser.Acceptor, disable virtio.Features) (stop func()) {
	t.Helper()
	be, err := backend.New(backend.Options{Device: dev, Disable: disable, Poll: backend.DefaultPoll})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- be.Serve(ctx, src) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := errors.Join(<-done, src.Close(), dev.Close()); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return stop
}

// listen serves dev at a path.
func listen(t *testing.T, dev netdev.Device, disable virtio.Features) (path string, stop func()) {
	t.Helper()
	path = socketIn(t)
	l, err := vhostuser.Listen(path, vhostuser.ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return path, serve(t, dev, l, disable)
}

func nullDevice(t *testing.T, o null.Options) netdev.Device {
	t.Helper()
	d, err := null.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func loopDevice(t *testing.T) netdev.Device {
	t.Helper()
	d, err := pair.NewLoop(pair.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// deviceFor is one that does its part in a direction.
func deviceFor(t *testing.T, c Config) netdev.Device {
	t.Helper()
	switch c.Direction {
	case Echo:
		return loopDevice(t)
	case GuestToHost:
		return nullDevice(t, null.Options{})
	}
	return nullDevice(t, null.Options{Generate: true, Size: c.longest()})
}

// brief is a Config for tests.
func brief(change func(*Config)) Config {
	c := DefaultConfig()
	c.Duration, c.WarmUp = 25*time.Millisecond, 2*time.Millisecond
	c.Window = 8
	c.LostAfter, c.Patience = vhosttest.Patience, 2*vhosttest.Patience // no machine is so busy
	change(&c)
	return c
}

func TestRun(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"plain":            func(*Config) {},
		"lengths":          func(c *Config) { c.Frames = []int{60, 1514, 9014, 500} },
		"chain":            func(c *Config) { c.Chain, c.Frames = 3, []int{64, 1518} },
		"indirect":         func(c *Config) { c.Chain, c.Indirect = 4, true },
		"in order":         func(c *Config) { c.InOrder = true },
		"not mergeable":    func(c *Config) { c.Mergeable, c.Frames = false, []int{9000} },
		"small buffers":    func(c *Config) { c.Buffer, c.Frames = 200, []int{1000} },
		"no events":        func(c *Config) { c.EventIdx = false },
		"small ring":       func(c *Config) { c.Size, c.Batch, c.Window, c.Buffer = 4, 4, 2, 4096 },
		"large batch":      func(c *Config) { c.Size, c.Batch, c.Window = 1024, 1024, 512 },
		"cold":             func(c *Config) { c.Cold = 8 << 20 },
		"longest frame":    func(c *Config) { c.Frames = []int{MaxFrame} },
		"on one processor": func(c *Config) { c.CPU = 0 },
	} {
		for _, direction := range []Direction{GuestToHost, HostToGuest, Both, Echo} {
			for _, packed := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/packed=%v", name, direction, packed), func(t *testing.T) {
					c := brief(change)
					c.Direction, c.Packed, c.Verify = direction, packed, direction == Echo
					var told int
					c.Progress = func(done, total int, s Second) { told = 10*done + total }
					c.Path, _ = listen(t, deviceFor(t, c), 0)
					r := run(t, c)
					checkResult(t, c, r)
					if told != 11*len(r.Seconds) {
						t.Errorf("told of second %d of %d", told/10, told%10)
					}
				})
			}
		}
	}
}

func run(t *testing.T, c Config) *Result {
	t.Helper()
	r, err := Run(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// checkResult checks what is true of any good run.
func checkResult(t *testing.T, c Config, r *Result) {
	t.Helper()
	if got := r.GuestToHost.Frames > 0; got != c.Direction.sends() {
		t.Errorf("%d frames to the host", r.GuestToHost.Frames)
	}
	if got := r.HostToGuest.Frames > 0; got != c.Direction.receives() {
		t.Errorf("%d frames to the guest", r.HostToGuest.Frames)
	}
	// Of frames to the host one of those that are out is timed: where fewer came back than that may be, it need not be among them.
	few := c.Direction == GuestToHost && r.Latency == nil && r.GuestToHost.Frames < uint64(c.Size)
	if (r.Latency != nil) != (c.Direction == Echo || c.Direction == GuestToHost) && c.Direction != Both && !few {
		t.Errorf("latency %+v", r.Latency)
	}
	if r.Lost+r.Foreign > 0 || r.Interrupted || r.Behind || r.PID != os.Getpid() {
		t.Errorf("%+v", r)
	}
	if n := len(c.Frames); n == 1 && r.HostToGuest.Bytes != r.HostToGuest.Frames*uint64(c.Frames[0]) {
		t.Errorf("%d bytes in %d frames to the guest", r.HostToGuest.Bytes, r.HostToGuest.Frames)
	}
	s := r.Seconds[0]
	rows := len(r.Classes)
	if r.Disturbed != nil {
		rows++
	}
	if s.Length < c.Duration || s.Class == "" || rows < 1 || rows > len(r.Seconds) || (s.Class == placement.Near || s.Class == placement.Far) && s.RTT == 0 {
		t.Errorf("%+v in %d classes, disturbed %+v", s, len(r.Classes), r.Disturbed)
	}
}

// TestRunInTurn: one front-end after the other at one back-end, which is left as it was; nothing leaks.
func TestRunInTurn(t *testing.T) {
	vhosttest.NoLeaks(t)
	path, stop := listen(t, loopDevice(t), 0)
	defer stop()
	for _, packed := range []bool{false, true, false} {
		c := brief(func(c *Config) { c.Path, c.Packed, c.Direction, c.Verify = path, packed, Echo, true })
		checkResult(t, c, run(t, c))
	}
}

func TestRate(t *testing.T) {
	for _, direction := range []Direction{GuestToHost, Both, Echo} {
		c := brief(func(c *Config) { c.Direction, c.Rate = direction, 5000 })
		c.Duration = 200 * time.Millisecond
		c.Path, _ = listen(t, deviceFor(t, c), 0)
		r := run(t, c)
		// A machine with other things to do may send less, never more: what was missed is made up for within the window only.
		if n, took := r.GuestToHost.Frames, length(r); n > uint64(5500*took.Seconds())+200 {
			t.Errorf("%s: %d frames in %v at 5000 a second", direction, n, took)
		}
	}
}

// length is how long frames were counted.
func length(r *Result) (d time.Duration) {
	for _, s := range r.Seconds {
		d += s.Length
	}
	return d
}

// TestThink: the pause bounds the rate.
func TestThink(t *testing.T) {
	c := brief(func(c *Config) { c.Direction, c.Think, c.Window = Echo, 10*time.Millisecond, 1 })
	c.Path, _ = listen(t, loopDevice(t), 0)
	r := run(t, c)
	if n := r.HostToGuest.Frames; n > 2+uint64(length(r)/c.Think) || r.Latency == nil || r.Latency.Count > n || r.Latency.P50 < r.Latency.Min || r.Latency.Max < r.Latency.P999 {
		t.Errorf("%d frames, %+v", n, r.Latency)
	}
}

func TestServer(t *testing.T) {
	path := socketIn(t)
	d, err := vhostuser.NewDialer(path, vhostuser.DialOptions{})
	if err != nil {
		t.Fatal(err)
	}
	serve(t, nullDevice(t, null.Options{}), d, 0)
	c := brief(func(c *Config) { c.Path, c.Server = path, true })
	checkResult(t, c, run(t, c))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Run(ctx, brief(func(c *Config) { c.Path, c.Server = socketIn(t), true })); !errors.Is(err, context.Canceled) {
		t.Errorf("nobody connects: %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

func TestInterrupted(t *testing.T) {
	path, _ := listen(t, nullDevice(t, null.Options{}), 0)
	ctx, cancel := context.WithCancel(t.Context())
	c := brief(func(c *Config) { c.Path, c.Duration = path, time.Hour })
	c.Progress = func(int, int, Second) { cancel() }
	r, err := Run(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	if !r.Interrupted || len(r.Seconds) > 2 {
		t.Errorf("%+v", r)
	}
}

func TestMissingFeatures(t *testing.T) {
	for f, change := range map[virtio.Features]func(*Config){
		virtio.FRingPacked:   func(c *Config) { c.Packed = true },
		virtio.FIndirectDesc: func(c *Config) { c.Chain, c.Indirect = 2, true },
		virtio.FInOrder:      func(c *Config) { c.InOrder = true },
		virtio.FNetMrgRxbuf:  func(*Config) {},
	} {
		path, _ := listen(t, nullDevice(t, null.Options{}), f)
		c := brief(change)
		c.Path = path
		if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "does not offer "+f.String()+"; ") {
			t.Errorf("%v: %v", f, err)
		}
	}
	path, _ := listen(t, nullDevice(t, null.Options{}), virtio.FEventIdx)
	c := brief(func(c *Config) { c.Path = path })
	if r, err := Run(t.Context(), c); err != nil || strings.Contains(fmt.Sprint(r.Features), "EVENT_IDX") {
		t.Errorf("EVENT_IDX that is not offered: %v", err)
	}
}

// full is a device that never has room.
type full struct{ netdev.Device }

func (f full) Queue(i int) netdev.Queue { return fullQueue{f.Device.Queue(i)} }

type fullQueue struct{ netdev.Queue }

func (fullQueue) Send([]*zerocopy.Buffer) int { return 0 }

func TestNothingMoves(t *testing.T) {
	for name, c := range map[string]struct {
		dev    netdev.Device
		change func(*Config)
		want   string
	}{
		"full":      {full{nullDevice(t, null.Options{})}, func(*Config) {}, "it holds 256 chains of the transmitq"},
		"no frames": {nullDevice(t, null.Options{}), func(c *Config) { c.Direction = HostToGuest }, "generate=on"},
		// Here the transmitq does move, and a back-end that has no processor for as long as the patience is another fault than the one to be told.
		"no frames both": {nullDevice(t, null.Options{}), func(c *Config) { c.Direction, c.Patience = Both, 2*time.Second }, "generate=on"},
		"no echo":        {nullDevice(t, null.Options{}), func(c *Config) { c.Direction, c.Patience, c.LostAfter = Echo, 2*time.Second, 100*time.Millisecond }, "frames came back: does the back-end echo"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := brief(func(c *Config) { c.Patience = 50 * time.Millisecond })
			c.change(&cfg)
			cfg.Path, _ = listen(t, c.dev, 0)
			if _, err := Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

func TestHangUp(t *testing.T) {
	path, stop := listen(t, nullDevice(t, null.Options{}), 0)
	c := brief(func(c *Config) { c.Path, c.Duration = path, time.Hour })
	c.Progress = func(done, _ int, _ Second) { stop() }
	if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "has hung up") {
		t.Errorf("%v", err)
	}
	if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "no back-end listens on "+path) {
		t.Errorf("%v", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if conn, err := l.Accept(); err == nil {
			conn.Close()
		}
	}()
	if _, err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), "has hung up") {
		t.Errorf("%v", err)
	}
}

func TestHugePages(t *testing.T) {
	path, _ := listen(t, nullDevice(t, null.Options{}), 0)
	c := brief(func(c *Config) { c.Path, c.Huge, c.Cold = path, true, 1<<36 })
	if _, err := Run(t.Context(), c); !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.ENOMEM) {
		t.Errorf("128 GiB of huge pages: %v", err)
	}
}
