package user

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Bounds of TCP.
const (
	maxConns     = 1024 // connections of one guest, forwarded ones included
	maxForwarded = 768  // of these, those that come from outside: whoever reaches a forwarded port leaves some to the guest
	maxDialing   = 256  // of these, those that wait for the host's connect or the guest's handshake
	dialTimeout  = 30 * time.Second
	tcpBufferMin = 4 << 10
	tcpBuffer    = 256 << 10 // bytes that a connection starts with in each direction
	tcpBufferMax = 4 << 20   // to which it may grow while it is read
	// keepAlive is how long a connection is silent before its ends are asked whether they are there.
	keepAlive = 30 * time.Minute
	// timeWait is how long a connection that was closed is remembered: between two ends of one cable, segments do not stray.
	timeWait = 5 * time.Second
	// lingerTime is how long a guest may take to acknowledge the end of a connection.
	lingerTime = time.Minute
)

// tcpNAT takes the guest's connections on to the host's network.
type tcpNAT struct {
	g      *group
	routes *routes
	icmp   *icmpOut
	fwd    *tcp.Forwarder
	dialer net.Dialer
	slots  chan struct{} // holds one of maxConns for each connection
	inward chan struct{} // holds one of maxForwarded for each that is forwarded
	count  atomic.Uint64 // connections ever made
	linger time.Duration

	mu  sync.Mutex
	syn map[stack.TransportEndpointID]uint32 // sequence numbers of the SYNs that are waited on
}

func newTCPNAT(g *group, s *stack.Stack, r *routes, icmp *icmpOut) *tcpNAT {
	t := &tcpNAT{
		g: g, routes: r, icmp: icmp, linger: lingerTime,
		slots: make(chan struct{}, maxConns), inward: make(chan struct{}, maxForwarded),
		syn: make(map[stack.TransportEndpointID]uint32),
		dialer: net.Dialer{
			Timeout: dialTimeout, FallbackDelay: -1,
			KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: keepAlive},
		},
	}
	t.fwd = tcp.NewForwarder(s, 0, maxDialing, t.connect)
	s.SetTransportProtocolHandler(tcp.ProtocolNumber, t.packet)
	return t
}

// slot takes one of the connections that a guest may have.
func (t *tcpNAT) slot() bool {
	select {
	case t.slots <- struct{}{}:
		return true
	default:
		return false
	}
}

func (t *tcpNAT) freeSlot() { <-t.slots }

// forwardSlot waits for a slot for a connection from outside. It reports false at the end of the device.
func (t *tcpNAT) forwardSlot() bool {
	for _, slots := range []chan struct{}{t.inward, t.slots} {
		select {
		case slots <- struct{}{}:
		case <-t.g.ctx.Done():
			return false
		}
	}
	return true
}

func (t *tcpNAT) freeForwardSlot() {
	t.freeSlot()
	<-t.inward
}

// packet sees the segments that belong to no connection.
func (t *tcpNAT) packet(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.TCP(pkt.TransportHeader().Slice())
	if h.Flags().Contains(header.TCPFlagSyn) && !h.Flags().Contains(header.TCPFlagAck) {
		t.mu.Lock()
		if len(t.syn) >= maxDialing {
			clear(t.syn) // of what the forwarder did not take
		}
		t.syn[id] = h.SequenceNumber()
		t.mu.Unlock()
	}
	return t.fwd.HandlePacket(id, pkt)
}

// connect runs on a goroutine of its own, for a SYN of the guest's.
func (t *tcpNAT) connect(r *tcp.ForwarderRequest) {
	if !t.g.enter() {
		r.Complete(false)
		return
	}
	defer t.g.leave()
	id := r.ID()
	defer t.forget(id)
	dst, ok := t.routes.lookup(hostAddr(id.LocalAddress))
	if !ok || !t.slot() {
		r.Complete(true)
		return
	}
	defer t.freeSlot()
	conn, err := t.dialer.DialContext(t.g.ctx, "tcp", netip.AddrPortFrom(dst, id.LocalPort).String())
	if err != nil {
		t.mirror(r, err)
		return
	}
	p := pump{wq: new(waiter.Queue), conn: conn.(*net.TCPConn)}
	ep, terr := r.CreateEndpoint(p.wq)
	r.Complete(terr != nil)
	if terr != nil {
		p.conn.SetLinger(0)
		p.conn.Close()
		return
	}
	p.ep = ep
	t.carry(&p)
}

func (t *tcpNAT) carry(p *pump) {
	t.count.Add(1)
	p.ep.SocketOptions().SetKeepAlive(true)
	idle := tcpip.KeepaliveIdleOption(keepAlive)
	p.ep.SetSockOpt(&idle)
	p.linger = t.linger
	p.run(t.g.ctx)
}

// mirror tells the guest why the host could not connect, in the way it would have been told itself.
func (t *tcpNAT) mirror(r *tcp.ForwarderRequest, err error) {
	id := r.ID()
	seq, known := t.sequence(id)
	switch {
	case unreachable(err) && known:
		r.Complete(false)
		t.icmp.unreachable(quoteTCP(id, seq), err)
	case isTimeout(err):
		r.Complete(false) // silence was the answer
	default:
		r.Complete(true)
	}
}

func isTimeout(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.Is(err, context.Canceled) || errors.Is(err, syscall.ETIMEDOUT) || errors.As(err, &timeout) && timeout.Timeout()
}

func (t *tcpNAT) sequence(id stack.TransportEndpointID) (seq uint32, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	seq, ok = t.syn[id]
	return seq, ok
}

func (t *tcpNAT) forget(id stack.TransportEndpointID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.syn, id)
}
