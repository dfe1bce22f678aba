//go:build linux

package vm

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/pair"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/test/vm/rpc"
	"github.com/vhostd/vhostd/test/vm/stream"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
)

// end is one of two guests that are joined by package pair: their back-ends run in the test's own process, so that the
// test decides when a frame has left.
type end struct {
	*rig
	ip  string
	dev *pair.Device
	be  *backend.Backend
	log journal
}

// journal keeps what a back-end logs. A record is there before the back-end goes on: what is called for it sees the state
// that the record tells of.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
	hook func(slog.Record) // nil: none
}

func (j *journal) Enabled(context.Context, slog.Level) bool { return true }
func (j *journal) WithAttrs([]slog.Attr) slog.Handler       { return j }
func (j *journal) WithGroup(string) slog.Handler            { return j }

func (j *journal) Handle(ctx context.Context, r slog.Record) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.hook != nil {
		j.hook(r)
	}
	return slog.NewTextHandler(&j.text, &slog.HandlerOptions{Level: slog.LevelDebug}).Handle(ctx, r)
}

// onLog sets what is called for each record.
func (j *journal) onLog(f func(slog.Record)) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.hook = f
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}

// join boots two guests whose network devices are the two ends of a pair.
func join(t *testing.T, o pair.Options, change func(a, b *end)) (a, b *end) {
	t.Helper()
	needVhostd(t)
	a, b = newEnd(t, "a", "10.88.0.1", "52:54:00:12:34:0a"), newEnd(t, "b", "10.88.0.2", "52:54:00:12:34:0b")
	if change != nil {
		change(a, b)
	}
	var err error
	a.dev, b.dev, err = pair.New(o)
	must(t, err)
	t.Cleanup(func() { // the last thing: after both back-ends
		if err := a.dev.Close(); err != nil {
			t.Error(err)
		}
		if err := b.dev.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, e := range []*end{a, b} {
		e.serve(e.dev)
		e.startMachine()
	}
	for _, e := range []*end{a, b} {
		e.waitBoot()
		e.configure()
	}
	return a, b
}

func newEnd(t *testing.T, name, ip, mac string) *end {
	t.Helper()
	e := &end{rig: newRig(t, "pair"), ip: ip}
	e.mopts.Name, e.mopts.MAC = name, mac
	return e
}

// drainTimeout is long enough to be told from no wait at all.
const drainTimeout = 500 * time.Millisecond

// serve starts the back-end of a device.
func (e *end) serve(dev netdev.Device) {
	t := e.t
	t.Helper()
	var err error
	e.be, err = backend.New(backend.Options{Device: dev, Log: slog.New(&e.log), DrainTimeout: drainTimeout, Poll: backend.DefaultPoll})
	must(t, err)
	l, err := vhostuser.Listen(e.mopts.Socket, vhostuser.ListenOptions{})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- e.be.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("back-end of %s: %v", e.mopts.Name, err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("back-end of %s logged:\n%s", e.mopts.Name, e.log.String())
		}
	})
}

// configure gives the guest its address.
func (e *end) configure() {
	e.t.Helper()
	l := e.link(rpc.LinkArgs{Name: "eth0", Wait: 20 * time.Second, Up: true, Addrs: []string{e.ip + "/24"}})
	e.logf("guest %s: eth0 %s, %v", e.mopts.Name, l.MAC, l.Addrs)
}

// faultless prints the back-end's counters, and wants none of those that count faults; givenUp apart, which is told.
func (e *end) faultless(givenUp uint64) {
	e.t.Helper()
	s := e.be.Stats()
	for _, q := range s.Queues {
		e.logf("back-end of %s: queue %d %s: %d frames, %d bytes, outcomes %v, given up %d, %d kicks, %d calls", e.mopts.Name,
			q.Index, q.Direction, q.Frames, q.Bytes, q.Outcomes, q.GivenUp, q.Kicks, q.Calls)
		if q.Broken != "" || q.Malformed+q.Invalid+q.NotifyErrors != 0 {
			e.t.Errorf("%s: queue %d: broken %q, malformed %d, invalid %d, notify errors %d", e.mopts.Name, q.Index, q.Broken,
				q.Malformed, q.Invalid, q.NotifyErrors)
		}
		if q.Index == 1 && q.GivenUp != givenUp {
			e.t.Errorf("%s: %d frames were given up, want %d", e.mopts.Name, q.GivenUp, givenUp)
		}
	}
	if s.GuestErrors+s.FrontEndErrors != 0 {
		e.t.Errorf("%s: %d errors of the guest and %d of the front-end", e.mopts.Name, s.GuestErrors, s.FrontEndErrors)
	}
	e.quiet()
}

// quiet wants no complaint about the device in the guest's kernel log.
func (e *end) quiet() {
	e.t.Helper()
	for line := range strings.Lines(e.exec("dmesg")) {
		for _, bad := range []string{"is not a head", "is out of range", "WARNING:", "BUG:", "unexpected txq", "NETDEV WATCHDOG"} {
			if strings.Contains(line, bad) {
				e.t.Errorf("kernel of guest %s: %s", e.mopts.Name, strings.TrimSpace(line))
			}
		}
	}
}

// noOffloads are the properties of a device that does nothing for the guest and for which the guest does nothing.
var noOffloads = []string{"csum=off", "gso=off", "host_tso4=off", "host_tso6=off", "host_ecn=off", "host_ufo=off",
	"guest_csum=off", "guest_tso4=off", "guest_tso6=off", "guest_ecn=off", "guest_ufo=off"}

// offloadBits are the features that noOffloads turns off.
const offloadBits = virtio.FNetCsum | virtio.FNetGuestCsum |
	virtio.FNetHostTSO4 | virtio.FNetHostTSO6 | virtio.FNetHostECN | virtio.FNetHostUFO |
	virtio.FNetGuestTSO4 | virtio.FNetGuestTSO6 | virtio.FNetGuestECN | virtio.FNetGuestUFO

// smallSize is what each TCP direction carries where the volume is not the point.
const smallSize = 32 << 20

// TestGuestToGuest: two kernels check what vhostd makes of frames with checksum and segmentation left to it, where the
// other side does not take them so.
func TestGuestToGuest(t *testing.T) {
	for _, tt := range []struct {
		name   string
		o      pair.Options
		change func(a, b *end)
		off    virtio.Features // of b
		cut    bool            // what b receives was cut into segments on the way
	}{
		{"offloads pass", pair.Options{}, nil, 0, false},
		{"one guest has no offloads", pair.Options{}, func(_, b *end) { b.mopts.DeviceProps = noOffloads }, offloadBits, true},
		{"nor merged buffers", pair.Options{}, func(_, b *end) {
			b.mopts.DeviceProps = append([]string{"mrg_rxbuf=off"}, noOffloads...)
		}, offloadBits | virtio.FNetMrgRxbuf, true},
		{"device has no offloads", pair.Options{Lacks: offload.All}, nil, 0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, b := join(t, tt.o, tt.change)
			a.features(virtio.FNetCsum|virtio.FNetGuestCsum|virtio.FNetHostTSO4|virtio.FNetGuestTSO4, 0)
			b.features(virtio.FVersion1, tt.off)
			a.ping(b.ip, 1472)
			a.transfer(b, smallSize)
			b.faultless(0)
			a.faultless(0)
			sent, received := a.be.Stats().Queues[1].Frames, b.be.Stats().Queues[0].Frames
			if cut := received > 2*sent; cut != tt.cut {
				t.Errorf("guest a sent %d frames, and b received %d; cut into segments: want %v", sent, received, tt.cut)
			}
		})
	}
}

// transfer moves n bytes from each guest to the other, checked at both ends.
func (e *end) transfer(to *end, n uint64) {
	e.t.Helper()
	must(e.t, to.vm.Serve(e.ctx, rpc.ServeArgs{Stream: 7001}))
	for i, mode := range []stream.Mode{stream.Sink, stream.Source} {
		way := []string{e.mopts.Name + " to " + to.mopts.Name, to.mopts.Name + " to " + e.mopts.Name}[i]
		res, err := e.vm.TCP(e.ctx, rpc.TCPArgs{Addr: to.ip + ":7001", Mode: mode, Bytes: n, Seed: uint64(i)})
		if err != nil {
			e.t.Fatalf("TCP %s: %v", way, err)
		}
		e.logf("TCP %s: %v", way, res)
		if res.Bytes != n {
			e.t.Errorf("TCP %s: %d bytes, want %d", way, res.Bytes, n)
		}
	}
}
