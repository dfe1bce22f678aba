package user

import (
	"bytes"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// maxForwardFlows bounds the peers of one forwarded port of datagrams.
	maxForwardFlows = 256
	// sweepInterval is how often idle ones are looked for.
	sweepInterval = 10 * time.Second
)

// forwardFlow is the datagrams between a peer of the host's and the guest.
type forwardFlow struct {
	usage
	f     *forward
	wq    waiter.Queue
	entry waiter.Entry
	ep    tcpip.Endpoint
	peer  unix.Sockaddr
	rc    syscall.RawConn

	mu   sync.Mutex // of writing
	out  []byte
	send func(fd uintptr) bool
	gone atomic.Bool
}

// serveUDP carries what peers send to the guest.
func (f *forward) serveUDP() {
	defer f.flows.evictAll()
	buf := make([]byte, toGuestChunk+ethLen)
	var data bytes.Reader
	swept := time.Now()
	for {
		f.packets.SetReadDeadline(time.Now().Add(sweepInterval))
		n, from, err := f.packets.ReadFromUDPAddrPort(buf)
		if f.g.ctx.Err() != nil {
			return
		}
		if now := time.Now(); now.Sub(swept) >= sweepInterval {
			f.sweep(now)
			swept = now
		}
		if err != nil {
			continue // the deadline, or a peer that is gone
		}
		flow, ok := f.flows.get(from)
		if !ok {
			if flow = f.newFlow(from); flow == nil {
				continue
			}
		}
		flow.touch()
		data.Reset(buf[:n])
		flow.ep.Write(&data, tcpip.WriteOptions{})
	}
}

func (f *forward) sweep(now time.Time) {
	f.flows.mu.Lock()
	defer f.flows.mu.Unlock()
	for k, flow := range f.flows.m {
		if now.After(flow.expires()) {
			flow.evict()
			delete(f.flows.m, k)
		}
	}
}

// newFlow returns nil when the stack has no port left.
func (f *forward) newFlow(from netip.AddrPort) *forwardFlow {
	rc, err := f.packets.SyscallConn()
	if err != nil {
		return nil
	}
	flow := &forwardFlow{f: f, rc: rc, peer: sockaddr(from)}
	flow.send = flow.trySend
	flow.touch()
	var terr tcpip.Error
	if flow.ep, terr = f.stack.NewEndpoint(udp.ProtocolNumber, protoOf(f.Guest.Addr()), &flow.wq); terr != nil {
		return nil
	}
	if terr = flow.ep.Bind(f.source()); terr == nil {
		terr = flow.ep.Connect(f.target())
	}
	if terr != nil {
		flow.ep.Close()
		return nil
	}
	flow.entry.Init(flow, waiter.ReadableEvents)
	flow.wq.EventRegister(&flow.entry)
	f.flows.add(from, flow)
	f.total.Add(1)
	return flow
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16(), ZoneId: scope(a.Addr().Zone())}
}

// scope is the number of the interface that a link-local address is behind, as package net names it: by its number where names cannot be asked for.
func scope(zone string) uint32 {
	if zone == "" {
		return 0
	}
	if i, err := net.InterfaceByName(zone); err == nil {
		return uint32(i.Index)
	}
	n, err := strconv.ParseUint(zone, 10, 32)
	if err != nil {
		return 0 // the interface is gone
	}
	return uint32(n)
}

// NotifyEvent carries the guest's answers to the peer, on the worker that delivered them. It drops what the host has no room for.
func (l *forwardFlow) NotifyEvent(waiter.EventMask) {
	buf := pumpBuffers.Get().(*pumpBuffer)
	defer pumpBuffers.Put(buf)
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		w := tcpip.SliceWriter(buf[:])
		res, err := l.ep.Read(&w, tcpip.ReadOptions{})
		if err != nil {
			return
		}
		l.touch()
		l.replied.Store(true)
		l.out = buf[:res.Count]
		l.rc.Write(l.send) // an error is the host's, or that the port is being closed
		l.out = nil
	}
}

func (l *forwardFlow) trySend(fd uintptr) bool {
	unix.Sendto(int(fd), l.out, 0, l.peer) // non-blocking
	return true
}

// evict closes the flow, which has no goroutine of its own.
func (l *forwardFlow) evict() {
	if l.gone.CompareAndSwap(false, true) {
		l.wq.EventUnregister(&l.entry)
		l.ep.Close()
	}
}
