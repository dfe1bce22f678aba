package user

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// pingNAT takes the guest's echo requests on to the host's network, where the host lets its users send such (ping_group_range).
type pingNAT struct {
	g      *group
	routes *routes
	icmp   *icmpOut
	flows  *table[pingID, *pingFlow]
}

// maxPings bounds the flows of echo requests.
const maxPings = 64

type pingID struct {
	guest, dst tcpip.Address
	ident      uint16
}

type pingFlow struct {
	dgram
	id    pingID
	n     *pingNAT
	quote quote
}

func newPingNAT(g *group, r *routes, icmp *icmpOut) *pingNAT {
	return &pingNAT{g: g, routes: r, icmp: icmp, flows: newTable[pingID, *pingFlow](maxPings)}
}

// packet sees the guest's ICMP messages. Requests to the router's own addresses are left to the stack, which answers them.
func (p *pingNAT) packet(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	src, dst := id.RemoteAddress, id.LocalAddress
	head := pkt.TransportHeader().Slice()
	v6 := pkt.NetworkProtocolNumber == header.IPv6ProtocolNumber
	if len(head) < header.ICMPv4MinimumSize || head[0] != echoRequest(v6) || p.routes.own(hostAddr(dst)) {
		return false
	}
	target, ok := p.routes.lookup(hostAddr(dst))
	if !ok {
		return true
	}
	key := pingID{guest: src, dst: dst, ident: header.ICMPv4(head).Ident()}
	f, ok := p.flows.get(key)
	if !ok {
		f = &pingFlow{id: key, n: p, quote: quote{guest: src, dst: dst, proto: pkt.TransportProtocolNumber}}
		copy(f.quote.l4[:], head)
		conn, err := dialPing(target)
		if err == nil {
			err = f.init(conn)
		}
		if err != nil {
			p.icmp.unreachable(f.quote, err)
			return true
		}
		if !p.flows.add(key, f) || !p.g.run(f.run) {
			f.close()
			return true
		}
	}
	msg := append(append(make([]byte, 0, len(head)+pkt.Data().Size()), head...), pkt.Data().AsRange().ToSlice()...)
	if err := f.write(msg); err != nil && !errors.Is(err, net.ErrClosed) {
		f.failed(err)
	}
	return true
}

func echoRequest(v6 bool) byte {
	if v6 {
		return byte(header.ICMPv6EchoRequest)
	}
	return byte(header.ICMPv4Echo)
}

func (f *pingFlow) failed(err error) { f.n.icmp.unreachable(f.quote, err) }

// run carries the replies to the guest, with the identifier that it knows: the host's socket has its own.
func (f *pingFlow) run() {
	defer f.close()
	f.read(func(b []byte) {
		if len(b) < header.ICMPv4MinimumSize {
			return
		}
		msg := append([]byte(nil), b...)
		header.ICMPv4(msg).SetIdent(f.id.ident)
		f.n.icmp.send(f.id.dst, f.id.guest, msg)
	}, f.failed)
}

func (f *pingFlow) close() {
	f.n.flows.remove(f.id, f)
	f.conn.Close()
}

// dialPing opens a socket for echo requests to dst (icmp(7)), which the host allows to the groups in net.ipv4.ping_group_range.
func dialPing(dst netip.Addr) (*net.UDPConn, error) {
	family, proto := unix.AF_INET, unix.IPPROTO_ICMP
	var sa unix.Sockaddr = &unix.SockaddrInet4{Addr: dst4(dst)}
	if dst.Is6() {
		family, proto, sa = unix.AF_INET6, unix.IPPROTO_ICMPV6, &unix.SockaddrInet6{Addr: dst.As16()}
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return nil, fmt.Errorf("ping socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "ping")
	defer f.Close()
	if err := unix.Connect(fd, sa); err != nil {
		return nil, fmt.Errorf("ping socket to %v: %w", dst, err)
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("ping socket: %w", err)
	}
	conn, ok := c.(*net.UDPConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("ping socket is a %T", c)
	}
	return conn, nil
}

func dst4(a netip.Addr) (b [4]byte) {
	if a.Is4() {
		b = a.As4()
	}
	return b
}
