package vhosttest

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
)

// Backend is what a Guest connects to: something that serves the connections of an Acceptor, as backend.Backend does.
type Backend interface {
	Serve(ctx context.Context, src vhostuser.Acceptor) error
}

// Guest is a virtual machine with one network device; see the package comment.
type Guest struct {
	Mem      *Memory
	FE       *vhostuser.FrontEnd        // of the current connection
	Offered  virtio.Features            // by the back-end
	Features virtio.Features            // that were accepted
	Protocol vhostuser.ProtocolFeatures // that were accepted
	Queues   []*Queue                   // 2*i is the receiveq of pair i, 2*i+1 its transmitq

	t      testing.TB
	opts   Options
	feed   *feed
	stop   func()
	served chan struct{} // closed when the Backend has returned
	err    error         // that it returned
	once   sync.Once
}

// Start makes a guest, connects it to b and starts all its queues, receive buffers posted. Its Close is registered with the test.
func Start(t testing.TB, b Backend, o Options) *Guest {
	t.Helper()
	g := New(t, b, o)
	g.Connect()
	g.StartQueues()
	return g
}

// New makes a guest and has b wait for its connection. With Options.Path, b is nil: the back-end listens there.
func New(t testing.TB, b Backend, o Options) *Guest {
	t.Helper()
	o = o.withDefaults()
	g := &Guest{t: t, opts: o, Mem: newMemory(t, o.Regions), feed: newFeed(), served: make(chan struct{}), stop: func() {}}
	t.Cleanup(g.Close)
	if b == nil {
		close(g.served)
		return g
	}
	var ctx context.Context
	ctx, g.stop = context.WithCancel(context.Background())
	go func() {
		defer close(g.served)
		g.err = b.Serve(ctx, g.feed)
	}()
	return g
}

// Connect makes a connection and goes through negotiation up to the memory table. At the first time it also makes the queues, since the
// ring's form depends on the features.
func (g *Guest) Connect() {
	g.t.Helper()
	g.Dial()
	g.Negotiate()
	g.ShareMemory()
	if g.Queues == nil {
		for i := range 2 * g.opts.Pairs {
			g.Queues = append(g.Queues, newQueue(g, i))
		}
	}
}

// Dial makes a connection, and nothing more. The last one is closed first.
func (g *Guest) Dial() {
	g.t.Helper()
	if g.FE != nil {
		_ = g.FE.Close()
	}
	g.FE = g.dial()
	g.FE.ReplyTimeout = Patience
}

func (g *Guest) dial() *vhostuser.FrontEnd {
	g.t.Helper()
	if g.opts.Path != "" {
		ctx, cancel := context.WithTimeout(context.Background(), Patience)
		defer cancel()
		fe, err := vhostuser.Dial(ctx, g.opts.Path)
		g.must("connecting", err)
		return fe
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	g.must("socketpair", err)
	theirs, err := vhostuser.NewConnFD(pair[1], connOptions)
	g.must("the back-end's end", err)
	g.feed.offer(theirs)
	mine, err := vhostuser.NewConnFD(pair[0], connOptions)
	g.must("the front-end's end", err)
	return vhostuser.NewFrontEnd(mine)
}

// connOptions keep a hostile case short: what is left unfinished ends soon, though not before a test on a busy machine goes on with a message that it sends in pieces.
var connOptions = vhostuser.ConnOptions{PartialTimeout: 5 * time.Second, WriteTimeout: time.Second}

// Negotiate acks features and protocol features, and owns the session.
func (g *Guest) Negotiate() {
	g.t.Helper()
	offered, err := g.FE.GetFeatures()
	g.must("GET_FEATURES", err)
	g.Offered = virtio.Features(offered)
	g.Features = g.Offered &^ g.opts.Without
	if !g.opts.Packed {
		g.Features &^= virtio.FRingPacked
	} else if !g.Features.Has(virtio.FRingPacked) {
		g.t.Fatal("packed rings are not offered")
	}
	if g.opts.NoProtocol {
		g.Features &^= virtio.FProtocolFeatures
	} else {
		g.Protocol, err = g.FE.GetProtocolFeatures()
		g.must("GET_PROTOCOL_FEATURES", err)
		if g.opts.NoReplyAck {
			g.Protocol &^= vhostuser.ProtocolReplyAck
		}
		g.must("SET_PROTOCOL_FEATURES", g.FE.SetProtocolFeatures(g.Protocol))
	}
	g.must("SET_OWNER", g.FE.SetOwner())
	g.must("SET_FEATURES", g.FE.SetFeatures(uint64(g.Features)))
}

// Barrier returns when the back-end has served all requests so far, acks or not.
func (g *Guest) Barrier() {
	g.t.Helper()
	_, err := g.FE.GetFeatures()
	g.must("GET_FEATURES", err)
}

// ShareMemory hands the guest's memory over.
func (g *Guest) ShareMemory() {
	g.t.Helper()
	regions, fds := g.Mem.table()
	if !g.opts.MemSlots {
		g.must("SET_MEM_TABLE", g.FE.SetMemTable(regions, fds))
		return
	}
	for i, r := range regions {
		g.must("ADD_MEM_REG", g.FE.AddMemReg(r, fds[i]))
	}
}

// StartQueues starts all queues; receive buffers are posted first.
func (g *Guest) StartQueues() {
	g.t.Helper()
	for _, q := range g.Queues {
		g.must("posting buffers", q.Post())
		q.Start()
	}
}

// Successor is another guest, with memory of its own, at the same back-end: g hangs up for it, if it has not yet.
func (g *Guest) Successor(o Options) *Guest {
	g.t.Helper()
	g.Hangup()
	o = o.withDefaults()
	next := &Guest{t: g.t, opts: o, Mem: newMemory(g.t, o.Regions), feed: g.feed, served: make(chan struct{}), stop: func() {}}
	close(next.served)
	g.t.Cleanup(next.Close)
	next.Connect()
	next.StartQueues()
	return next
}

// Receiveq is the receiveq of a pair.
func (g *Guest) Receiveq(pair int) *Queue { return g.Queues[2*pair] }

// Transmitq is the transmitq of a pair.
func (g *Guest) Transmitq(pair int) *Queue { return g.Queues[2*pair+1] }

// Send sends one frame, waiting for room if it must.
func (g *Guest) Send(pair int, hdr virtio.NetHdr, frame []byte, l Layout) error {
	return g.Transmitq(pair).Send(hdr, frame, l)
}

// Recv receives one frame, waiting up to timeout for it.
func (g *Guest) Recv(pair int, timeout time.Duration) (virtio.NetHdr, []byte, error) {
	return g.Receiveq(pair).Recv(timeout)
}

// Stop stops all queues with GET_VRING_BASE. Queue.Start goes on from there.
func (g *Guest) Stop() {
	g.t.Helper()
	for _, q := range g.Queues {
		q.Stop()
	}
}

// Hangup closes the connection without stopping anything, as a VMM that is killed.
func (g *Guest) Hangup() { _ = g.FE.Close() }

// Reconnect hangs up, connects again, and starts all queues where the used rings are, as a front-end does that has lost its back-end.
// The driver does not notice.
func (g *Guest) Reconnect() {
	g.t.Helper()
	g.Hangup()
	g.Connect()
	for _, q := range g.Queues {
		q.Base = q.Driver.RawUsedIndex()
		q.Start()
	}
}

// Reboot gives every queue a fresh driver, whose rings start where a real one's do. The queues must be stopped; StartQueues starts them.
func (g *Guest) Reboot() {
	for _, q := range g.Queues {
		q.reset(q.zero())
	}
}

// Close ends the guest: it hangs up and waits until the Backend has returned. A second call does nothing.
func (g *Guest) Close() {
	g.t.Helper()
	g.once.Do(func() {
		if g.FE != nil {
			_ = g.FE.Close()
		}
		g.stop()
		select {
		case <-g.served:
		case <-time.After(Patience):
			g.t.Errorf("the back-end did not end within %v", Patience)
			return // its memory may still be in use
		}
		if g.err != nil {
			g.t.Errorf("the back-end ended with: %v", g.err)
		}
		_ = g.feed.Close()
		for _, q := range g.Queues {
			q.close()
		}
		g.Mem.close()
	})
}

func (g *Guest) must(what string, err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatalf("%s: %v", what, err)
	}
}

// feed is an Acceptor of connections that are handed to it.
type feed struct {
	conns  chan *vhostuser.Conn
	once   sync.Once
	closed chan struct{}
}

func newFeed() *feed {
	return &feed{conns: make(chan *vhostuser.Conn, 16), closed: make(chan struct{})}
}

func (f *feed) offer(c *vhostuser.Conn) { f.conns <- c }

// Accept implements vhostuser.Acceptor.
func (f *feed) Accept(ctx context.Context) (*vhostuser.Conn, error) {
	select {
	case c := <-f.conns:
		return c, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-f.closed:
		return nil, net.ErrClosed
	}
}

// Close implements vhostuser.Acceptor.
func (f *feed) Close() error {
	f.once.Do(func() { close(f.closed) })
	for {
		select {
		case c := <-f.conns:
			_ = c.Close()
		default:
			return nil
		}
	}
}
