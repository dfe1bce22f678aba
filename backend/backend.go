// Package backend joins the parts into a vhost-user net back-end: a session with a front-end, its memory table and its queues, and one
// worker per virtqueue that moves frames between the guest and a netdev.Device.
//
// # Theory of operation
//
//	vhostuser.Serve --(one goroutine, the control side)--> session: features, memory table, rings
//	                                                          | locks a queue, changes it, wakes its worker
//	worker of queue 0 (receiveq of pair 0):  Recv  -> posted buffers -> used ring -> call
//	worker of queue 1 (transmitq of pair 0): chains -> Window -> Send ... release -> used ring -> call
//
// A worker has an OS thread to itself while its ring is started. It holds its queue's lock while it works on batches and never while
// it waits; the control side takes the lock of a queue before it changes anything about it. Workers never wait for a queue's lock, and
// the control side alone takes several, so nothing can deadlock, not even where one worker serves both queues of a pair (Options.PairWorkers).
//
// Whose fault decides: a guest that breaks its ring stops that queue (err eventfd, a counter, Stats say why); a front-end that breaks the
// protocol loses its session; guest memory that faults (its file was truncated) ends the session too. The daemon and other
// back-ends go on.
package backend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/soft"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
)

// Defaults of Options.
const (
	DefaultDrainTimeout = time.Second
	DefaultPoll         = 30 * time.Microsecond
)

// maxPairs is what fits the 8 bits of a vring index in SET_VRING_KICK.
const maxPairs = 128

// Options are what a Backend is made of. Only Device is needed.
type Options struct {
	Device netdev.Device // stays the caller's to close
	MAC    [6]byte       // shown in the configuration space; zero: VIRTIO_NET_F_MAC is not offered
	MTU    int           // bytes, shown in the configuration space; 0: the device's
	Log    *slog.Logger
	// Poll is the longest busy wait for more work before a worker sleeps; how much of it is used tunes itself to what it
	// brings. 0 is none.
	Poll time.Duration
	// PairWorkers has one worker serve both queues of a pair, instead of a worker each. What comes back soon comes back sooner, and
	// there are half as many threads to wake; but the two directions of a pair are no longer moved at once.
	PairWorkers bool
	// DrainTimeout bounds the wait for frames in flight when a ring stops. 0 is DefaultDrainTimeout.
	DrainTimeout time.Duration
	MaxPairs     int             // 0: as many as the device has
	Disable      virtio.Features // bits not to offer
	MessageRate  float64         // as in vhostuser.NewPace; with none, sessions are not bounded either
	Left         func()          // called when a session has ended; nil: nobody cares
}

// Backend serves one VM's network device, to one front-end after the other.
type Backend struct {
	opts     Options
	dev      netdev.Device
	log      *slog.Logger
	features virtio.Features
	protocol vhostuser.ProtocolFeatures
	totals   []total
	pace     *vhostuser.Pace

	frontEndErrors atomic.Uint64 // requests refused and sessions ended for a fault of the front-end
	guestErrors    atomic.Uint64 // rings stopped for a fault of the guest

	mu       sync.Mutex // innermost: no other lock is taken under it
	current  *session
	sessions uint64
}

// New returns a Backend; Serve makes it work.
func New(o Options) (*Backend, error) {
	if o.Device == nil {
		panic("bug: a backend without a device")
	}
	dev := soft.Wrap(o.Device)
	caps := dev.Capabilities()
	if o.MaxPairs == 0 {
		o.MaxPairs = min(caps.MaxPairs, maxPairs)
	}
	switch {
	case o.MaxPairs < 1 || o.MaxPairs > maxPairs:
		return nil, fmt.Errorf("%d queue pairs, must be 1 to %d", o.MaxPairs, maxPairs)
	case o.MaxPairs > caps.MaxPairs:
		return nil, fmt.Errorf("%d queue pairs, but %s %s has %d", o.MaxPairs, caps.Kind, caps.Name, caps.MaxPairs)
	case o.MTU != 0 && (o.MTU < minMTU || o.MTU > maxMTU):
		return nil, fmt.Errorf("MTU %d, must be %d to %d", o.MTU, minMTU, maxMTU)
	case o.MTU > caps.MTU && caps.MTU != 0:
		return nil, fmt.Errorf("MTU %d, but %s %s carries %d", o.MTU, caps.Kind, caps.Name, caps.MTU)
	}
	if o.MTU == 0 {
		o.MTU = caps.MTU
	}
	if o.DrainTimeout == 0 {
		o.DrainTimeout = DefaultDrainTimeout
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	b := &Backend{opts: o, dev: dev, log: o.Log, totals: make([]total, 2*o.MaxPairs), pace: vhostuser.NewPace(o.MessageRate)}
	b.features, b.protocol = offered(o)
	b.openDoors(nil)
	return b, nil
}

// Features returns the virtio and vhost-user protocol features that are offered.
func (b *Backend) Features() (virtio.Features, vhostuser.ProtocolFeatures) {
	return b.features, b.protocol
}

// Serve accepts one front-end after the other and serves each until it goes away; the next may be the same VMM, restarted, or its guest after a
// crash. It returns nil when ctx ends or the Acceptor has no more connections, and else the Acceptor's error.
func (b *Backend) Serve(ctx context.Context, src vhostuser.Acceptor) error {
	var storm budget
	for {
		conn, err := src.Accept(ctx)
		switch {
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return nil
		case err != nil:
			return fmt.Errorf("waiting for a front-end: %w", err)
		}
		if b.opts.MessageRate >= 0 {
			pause(ctx, storm.spend(sessionBurst, sessionRate, time.Now()))
		}
		b.serve(ctx, conn)
	}
}

func (b *Backend) serve(ctx context.Context, conn *vhostuser.Conn) {
	s, err := newSession(b, conn)
	if err != nil {
		b.log.Error("cannot serve the front-end", "error", err)
		_ = conn.Close()
		return
	}
	b.mu.Lock()
	b.current = s
	b.sessions++
	b.mu.Unlock()
	b.log.Info("front-end connected")
	err = vhostuser.Serve(ctx, conn, s, vhostuser.Options{
		MaxVrings: len(s.queues), Pause: s.pause, Refused: s.refused, Pace: b.pace,
	})
	if fault := s.fault.Load(); fault != nil {
		err = *fault
	}
	s.close()
	b.mu.Lock()
	b.current = nil
	b.mu.Unlock()
	if b.opts.Left != nil {
		defer b.opts.Left()
	}
	if s.mute.Load() && b.opts.MessageRate >= 0 {
		defer pause(ctx, bellPause) // others' workers may have waited with it
	}
	if err != nil && ctx.Err() == nil {
		b.frontEndErrors.Add(1)
		b.log.Warn("session ended", "error", err)
		return
	}
	b.log.Info("front-end disconnected")
}
