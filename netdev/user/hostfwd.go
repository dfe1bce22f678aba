package user

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// guestPatience is how long a connection waits for a guest that does not have its address yet.
	guestPatience = 30 * time.Second
	// guestAttempt is how long one attempt may take, and guestPause the time between two.
	guestAttempt = 5 * time.Second
	guestPause   = 200 * time.Millisecond
	// acceptPause is the time until the next try when the host is out of descriptors.
	acceptPause = 100 * time.Millisecond
)

// ForwardStats is a Forward at work.
type ForwardStats struct {
	Forward        // with the host's address as it is listened on
	Active  int    // connections, or flows of datagrams, now
	Total   uint64 // since the device was opened
}

// forward listens on the host.
type forward struct {
	Forward
	g      *group
	stack  *stack.Stack
	opts   *Options
	nat    *tcpNAT
	active atomic.Int64
	total  atomic.Uint64

	listener *net.TCPListener // of tcp
	packets  *net.UDPConn     // of udp
	flows    *table[netip.AddrPort, *forwardFlow]
}

// open listens; start serves.
func (f *forward) open() error {
	local := net.JoinHostPort(f.Host.Addr().String(), fmt.Sprint(f.Host.Port()))
	network := f.Proto + "4"
	if f.Host.Addr().Is6() {
		network = f.Proto + "6"
	}
	if f.Proto == "udp" {
		pc, err := net.ListenPacket(network, local)
		if err != nil {
			return fmt.Errorf("hostfwd=%v: %w", f.Forward, err)
		}
		f.packets = pc.(*net.UDPConn)
		f.Host = pc.LocalAddr().(*net.UDPAddr).AddrPort()
		f.flows = newTable[netip.AddrPort, *forwardFlow](maxForwardFlows)
		return nil
	}
	l, err := net.Listen(network, local)
	if err != nil {
		return fmt.Errorf("hostfwd=%v: %w", f.Forward, err)
	}
	f.listener = l.(*net.TCPListener)
	f.Host = l.Addr().(*net.TCPAddr).AddrPort()
	return nil
}

func (f *forward) start() {
	if f.packets != nil {
		f.g.run(f.serveUDP)
		return
	}
	f.g.run(f.serveTCP)
}

// close ends listening; what is being carried ends with the group.
func (f *forward) close() {
	if f.listener != nil {
		f.listener.Close()
	}
	if f.packets != nil {
		f.packets.Close()
		f.flows.evictAll()
	}
}

func (f *forward) stats() ForwardStats {
	s := ForwardStats{Forward: f.Forward, Active: int(f.active.Load()), Total: f.total.Load()}
	if f.flows != nil {
		s.Active = f.flows.len()
	}
	return s
}

// serveTCP takes connections as long as a slot for them is free: the others wait in the host's backlog.
func (f *forward) serveTCP() {
	for f.nat.forwardSlot() {
		conn, err := f.listener.AcceptTCP()
		if err != nil {
			f.nat.freeForwardSlot()
			select {
			case <-f.g.ctx.Done():
				return
			case <-time.After(acceptPause):
				continue
			}
		}
		f.total.Add(1)
		if !f.g.run(func() { f.serveConn(conn) }) {
			conn.Close()
			f.nat.freeForwardSlot()
		}
	}
}

func (f *forward) serveConn(conn *net.TCPConn) {
	defer f.nat.freeForwardSlot()
	f.active.Add(1)
	defer f.active.Add(-1)
	p := pump{wq: new(waiter.Queue), conn: conn}
	ctx, cancel := context.WithTimeout(f.g.ctx, guestPatience)
	defer cancel()
	if p.ep = f.dialGuest(ctx, p.wq); p.ep == nil {
		conn.SetLinger(0)
		conn.Close()
		return
	}
	f.nat.carry(&p)
}

// dialGuest connects to the guest. A guest that refuses is believed, one that does not answer is tried again.
func (f *forward) dialGuest(ctx context.Context, wq *waiter.Queue) tcpip.Endpoint {
	for {
		ep, err := f.attempt(ctx, wq)
		if err == nil {
			return ep
		}
		if _, refused := err.(*tcpip.ErrConnectionRefused); refused {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(guestPause):
		}
	}
}

// attempt connects from the router's address, which the guest knows how to answer.
func (f *forward) attempt(ctx context.Context, wq *waiter.Queue) (_ tcpip.Endpoint, terr tcpip.Error) {
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	ep, terr := f.stack.NewEndpoint(tcp.ProtocolNumber, protoOf(f.Guest.Addr()), wq)
	if terr != nil {
		return nil, terr
	}
	defer func() {
		if terr != nil {
			ep.Abort()
		}
	}()
	if terr = ep.Bind(f.source()); terr != nil {
		return nil, terr
	}
	terr = ep.Connect(f.target())
	if _, started := terr.(*tcpip.ErrConnectStarted); !started {
		return ep, terr
	}
	timeout := time.NewTimer(guestAttempt)
	defer timeout.Stop()
	select {
	case <-ready:
		return ep, ep.LastError()
	case <-timeout.C:
	case <-ctx.Done():
	}
	return nil, &tcpip.ErrTimeout{}
}

// source is the router's address as the guest sees it; the stack chooses a port.
func (f *forward) source() tcpip.FullAddress {
	if f.Guest.Addr().Is6() {
		return tcpip.FullAddress{NIC: nicID, Addr: stackAddr(f.opts.Host6)}
	}
	return tcpip.FullAddress{NIC: nicID, Addr: stackAddr(f.opts.Host)}
}

func (f *forward) target() tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nicID, Addr: stackAddr(f.Guest.Addr()), Port: f.Guest.Port()}
}
