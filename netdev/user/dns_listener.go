package user

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/waiter"
)

// guestListener accepts connections of the guest's to one of the router's own ports, a bounded number at a time.
type guestListener struct {
	ctx   context.Context
	ep    tcpip.Endpoint
	wq    *waiter.Queue
	slots chan struct{}
	conns sync.WaitGroup

	closed chan struct{}
	once   sync.Once
}

var errListenerClosed = errors.New("listener is closed")

// newGuestListener takes over ep, which listens.
func newGuestListener(ctx context.Context, wq *waiter.Queue, ep tcpip.Endpoint, limit int) *guestListener {
	return &guestListener{ctx: ctx, ep: ep, wq: wq, slots: make(chan struct{}, limit), closed: make(chan struct{})}
}

// Accept waits for a connection, and before that for a slot: the others wait in the stack's backlog, which is short.
func (l *guestListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.closed:
		return nil, errListenerClosed
	}
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents)
	l.wq.EventRegister(&entry)
	defer l.wq.EventUnregister(&entry)
	for {
		ep, wq, err := l.ep.Accept(nil)
		switch err.(type) {
		case nil:
			l.conns.Add(1)
			return &guestConn{TCPConn: gonet.NewTCPConn(wq, ep), l: l, ep: ep}, nil
		case *tcpip.ErrWouldBlock:
		default:
			<-l.slots
			return nil, errors.New(err.String())
		}
		select {
		case <-ready:
		case <-l.closed:
			<-l.slots
			return nil, errListenerClosed
		}
	}
}

func (l *guestListener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.ep.Close()
	})
	return nil
}

func (l *guestListener) Addr() net.Addr {
	a, err := l.ep.GetLocalAddress()
	if err != nil {
		return &net.TCPAddr{}
	}
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(hostAddr(a.Addr), a.Port))
}

// guestConn counts as a connection until the guest has acknowledged its end.
type guestConn struct {
	*gonet.TCPConn
	l    *guestListener
	ep   tcpip.Endpoint
	once sync.Once
}

// dnsLinger is how long the guest may take for that.
const dnsLinger = 5 * time.Second

func (c *guestConn) Close() error {
	c.once.Do(func() {
		go func() {
			defer c.l.conns.Done()
			closeSlowly(c.l.ctx, c.ep, dnsLinger)
			<-c.l.slots
		}()
	})
	return nil
}
