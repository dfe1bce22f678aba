package user

import (
	"bytes"
	"net"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// maxUDPFlows bounds the flows of datagrams from the guest: the longest idle one makes room for a new one.
const maxUDPFlows = 1024

// udpNAT takes the guest's datagrams on to the host's network.
type udpNAT struct {
	g      *group
	stack  *stack.Stack
	routes *routes
	icmp   *icmpOut
	flows  *table[stack.TransportEndpointID, *udpFlow]
}

// udpFlow is the datagrams between one socket of the guest's and one address.
type udpFlow struct {
	dgram
	id stack.TransportEndpointID
	wq waiter.Queue
	ep tcpip.Endpoint
	n  *udpNAT

	entry waiter.Entry
}

func newUDPNAT(g *group, s *stack.Stack, r *routes, icmp *icmpOut) *udpNAT {
	u := &udpNAT{g: g, stack: s, routes: r, icmp: icmp, flows: newTable[stack.TransportEndpointID, *udpFlow](maxUDPFlows)}
	s.SetTransportProtocolHandler(udp.ProtocolNumber, u.packet)
	return u
}

// packet sees the datagrams that belong to no flow. Those that it refuses are answered with "port unreachable" by the stack.
func (u *udpNAT) packet(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	dst, ok := u.routes.lookup(hostAddr(id.LocalAddress))
	if !ok {
		return false
	}
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(dst, id.LocalPort)))
	if err != nil {
		u.icmp.unreachable(quoteUDP(id), err)
		return true
	}
	f := &udpFlow{id: id, n: u}
	if err := f.init(conn); err != nil {
		conn.Close()
		return true
	}
	var terr tcpip.Error
	// The request leaves the packet in the endpoint's queue.
	if f.ep, terr = udp.NewForwarderRequest(u.stack, id, pkt).CreateEndpoint(&f.wq); terr != nil {
		conn.Close() // another queue was faster
		return true
	}
	f.entry.Init(f, waiter.ReadableEvents)
	f.wq.EventRegister(&f.entry)
	if !u.flows.add(id, f) || !u.g.run(f.run) {
		f.close()
		return true
	}
	f.NotifyEvent(waiter.ReadableEvents)
	return true
}

// NotifyEvent carries what the guest sent to the host. It is called by the worker that delivered it.
func (f *udpFlow) NotifyEvent(waiter.EventMask) {
	buf := pumpBuffers.Get().(*pumpBuffer)
	defer pumpBuffers.Put(buf)
	for {
		w := tcpip.SliceWriter(buf[:])
		res, err := f.ep.Read(&w, tcpip.ReadOptions{})
		if err != nil {
			return
		}
		b := buf[:res.Count]
		if err := f.write(b); err != nil {
			f.failed(err)
			f.write(b) // the error was about one before
		}
	}
}

func (f *udpFlow) failed(err error) { f.n.icmp.unreachable(quoteUDP(f.id), err) }

// run carries what the host's side sends to the guest.
func (f *udpFlow) run() {
	defer f.close()
	var data bytes.Reader
	f.read(func(b []byte) {
		data.Reset(b)
		f.ep.Write(&data, tcpip.WriteOptions{})
	}, f.failed)
}

func (f *udpFlow) close() {
	f.n.flows.remove(f.id, f)
	f.wq.EventUnregister(&f.entry)
	f.ep.Close()
	f.conn.Close()
}
