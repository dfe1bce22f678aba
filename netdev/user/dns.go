package user

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Bounds of the name server.
const (
	maxQueries  = 128 // at a time: what is beyond is dropped, or answered with "server failure" on a connection
	maxDNSConns = 64
	dnsBacklog  = 16
	dnsIdle     = 10 * time.Second // of a connection
	dnsTimeout  = 10 * time.Second // of a query, over all name servers of the host
	dnsPort     = 53
	ownTTL      = 60 // seconds, of answers that are made here
)

// dnsServer answers for the router's names and the host's file of names, and asks the host's name servers for the rest.
type dnsServer struct {
	ctx      context.Context
	opts     *Options
	upstream *upstreams
	hosts    *hostsFile
	slots    chan struct{}
	servers  []*dns.Server
	wg       sync.WaitGroup
}

func newDNS(ctx context.Context, o *Options) *dnsServer {
	return &dnsServer{
		ctx: ctx, opts: o, upstream: &upstreams{path: o.ResolvConf}, hosts: &hostsFile{path: o.HostsFile},
		slots: make(chan struct{}, maxQueries),
	}
}

// start serves on the name server's addresses.
func (d *dnsServer) start(s *stack.Stack) error {
	for _, a := range []struct {
		addr netip.Addr
		off  bool
	}{{d.opts.DNS, d.opts.NoIPv4}, {d.opts.DNS6, d.opts.NoIPv6}} {
		if a.off {
			continue
		}
		if err := d.listen(s, a.addr); err != nil {
			return fmt.Errorf("name server on %v: %w", a.addr, err)
		}
	}
	return nil
}

func (d *dnsServer) listen(s *stack.Stack, a netip.Addr) error {
	full := tcpip.FullAddress{NIC: nicID, Addr: stackAddr(a), Port: dnsPort}
	wq := new(waiter.Queue)
	ep, terr := s.NewEndpoint(udp.ProtocolNumber, protoOf(a), wq)
	if terr == nil {
		terr = ep.Bind(full)
	}
	if terr != nil {
		return errors.New(terr.String())
	}
	d.serve(&dns.Server{PacketConn: gonet.NewUDPConn(wq, ep), Handler: dns.HandlerFunc(d.handleUDP)})

	wq = new(waiter.Queue)
	if ep, terr = s.NewEndpoint(tcp.ProtocolNumber, protoOf(a), wq); terr == nil {
		if terr = ep.Bind(full); terr == nil {
			terr = ep.Listen(dnsBacklog)
		}
	}
	if terr != nil {
		return errors.New(terr.String())
	}
	l := newGuestListener(d.ctx, wq, ep, maxDNSConns)
	d.serve(&dns.Server{
		Listener: l, Handler: dns.HandlerFunc(d.handleTCP), ReadTimeout: dnsIdle,
		IdleTimeout: func() time.Duration { return dnsIdle },
	})
	return nil
}

// serve starts srv, and waits until it can be shut down.
func (d *dnsServer) serve(srv *dns.Server) {
	started := make(chan struct{})
	srv.NotifyStartedFunc = func() { close(started) }
	d.servers = append(d.servers, srv)
	d.wg.Add(1)
	go func() {
		defer d.wg.Done()
		srv.ActivateAndServe()
	}()
	<-started
}

// close waits for the queries that are being answered.
func (d *dnsServer) close() {
	for _, srv := range d.servers {
		srv.Shutdown()
	}
	d.wg.Wait()
	for _, srv := range d.servers {
		if l, ok := srv.Listener.(*guestListener); ok {
			l.conns.Wait()
		}
	}
}

func (d *dnsServer) handleUDP(w dns.ResponseWriter, q *dns.Msg) {
	if r := d.resolve(q, "udp"); r != nil {
		size := dns.MinMsgSize
		if opt := q.IsEdns0(); opt != nil {
			size = max(size, int(opt.UDPSize()))
		}
		r.Truncate(size)
		w.WriteMsg(r)
	}
}

func (d *dnsServer) handleTCP(w dns.ResponseWriter, q *dns.Msg) {
	r := d.resolve(q, "tcp")
	if r == nil {
		r = new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)
	}
	w.WriteMsg(r)
}

// resolve returns the answer to q, or nil when there are too many queries at a time.
func (d *dnsServer) resolve(q *dns.Msg, network string) *dns.Msg {
	select {
	case d.slots <- struct{}{}:
		defer func() { <-d.slots }()
	default:
		return nil
	}
	if q.Opcode != dns.OpcodeQuery || q.Response {
		return new(dns.Msg).SetRcode(q, dns.RcodeNotImplemented)
	}
	if len(q.Question) != 1 {
		return new(dns.Msg).SetRcode(q, dns.RcodeFormatError)
	}
	if r := d.own(q); r != nil {
		return r
	}
	ctx, cancel := context.WithTimeout(d.ctx, dnsTimeout)
	defer cancel()
	r, err := d.upstream.exchange(ctx, q, network)
	if err != nil {
		return new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)
	}
	return r
}

// own answers for names that are known here, or returns nil.
func (d *dnsServer) own(q *dns.Msg) *dns.Msg {
	question := q.Question[0]
	if question.Qclass != dns.ClassINET {
		return nil
	}
	r := new(dns.Msg).SetReply(q)
	r.RecursionAvailable = true
	head := dns.RR_Header{Name: question.Name, Rrtype: question.Qtype, Class: dns.ClassINET, Ttl: ownTTL}
	if question.Qtype == dns.TypePTR {
		names := d.reverse(question.Name)
		for _, name := range names {
			r.Answer = append(r.Answer, &dns.PTR{Hdr: head, Ptr: dns.Fqdn(name)})
		}
		if names == nil {
			return nil
		}
		return r
	}
	addrs := d.lookup(strings.ToLower(strings.TrimSuffix(question.Name, ".")))
	if addrs == nil {
		return nil
	}
	for _, a := range addrs {
		switch {
		case question.Qtype == dns.TypeA && a.Is4():
			r.Answer = append(r.Answer, &dns.A{Hdr: head, A: a.AsSlice()})
		case question.Qtype == dns.TypeAAAA && a.Is6():
			r.Answer = append(r.Answer, &dns.AAAA{Hdr: head, AAAA: a.AsSlice()})
		}
	}
	return r
}

// The router's own names.
const (
	gatewayName = "gateway"
	hostName    = "host.vhostd"
)

// lookup returns the addresses that the guest may use for name. A name of the host's loopback stands for the router, which stands for it.
func (d *dnsServer) lookup(name string) []netip.Addr {
	loopback := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	switch {
	case name == gatewayName || name == hostName:
		return d.gateway()
	case name == "localhost" || strings.HasSuffix(name, ".localhost"):
		return loopback // the guest's own (RFC 6761 §6.3)
	}
	var addrs []netip.Addr
	for _, a := range d.hosts.lookup(name) {
		if a.IsLoopback() {
			return d.gateway()
		}
		addrs = append(addrs, a)
	}
	return addrs
}

func (d *dnsServer) gateway() (addrs []netip.Addr) {
	if !d.opts.NoIPv4 {
		addrs = append(addrs, d.opts.Host)
	}
	if !d.opts.NoIPv6 {
		addrs = append(addrs, d.opts.Host6)
	}
	return addrs
}

// reverse returns the names of an address in the form of a PTR query's name.
func (d *dnsServer) reverse(arpa string) []string {
	switch arpa = strings.ToLower(arpa); arpa {
	case reverseName(d.opts.Host), reverseName(d.opts.Host6):
		return []string{hostName}
	}
	return d.hosts.reverse(arpa)
}

func reverseName(a netip.Addr) string {
	name, err := dns.ReverseAddr(a.String())
	if err != nil {
		return ""
	}
	return name
}
