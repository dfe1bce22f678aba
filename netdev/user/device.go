package user

import (
	"errors"
	"fmt"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/offload"
)

// maxPairs is the number of queue pairs that a guest may use.
const maxPairs = 8

// gw6 is the router's link-local address, which router advertisements come from.
var gw6 = netip.MustParseAddr("fe80::2")

// Device is a user-mode network for one guest.
type Device struct {
	opts     Options
	g        *group
	stack    *stack.Stack
	link     link
	out      outboxes
	ingress  ingress
	queues   [maxPairs]queue
	tcp      *tcpNAT
	udp      *udpNAT
	ping     *pingNAT
	dns      *dnsServer
	forwards []*forward
}

var _ netdev.Device = (*Device)(nil)

// Open makes a network. The error is one of the options, or a port of a Forward that is taken.
func Open(o Options) (netdev.Device, error) {
	d, err := open(o)
	if err != nil {
		return nil, fmt.Errorf("user: %w", err)
	}
	return d, nil
}

func open(o Options) (*Device, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	d := &Device{opts: o, g: newGroup()}
	if err := d.start(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func (d *Device) start() error {
	if err := d.out.open(); err != nil {
		return err
	}
	// The address that slirp gives its router, so that guests keep their neighbor tables.
	host := d.opts.Host.As4()
	d.link.mac = tcpip.LinkAddress(append([]byte{0x52, 0x55}, host[:]...))
	d.link.mtu, d.link.out = uint32(d.opts.MTU), &d.out
	for i := range d.queues {
		d.queues[i].dev, d.queues[i].out = d, &d.out.boxes[i]
	}
	if err := d.newStack(); err != nil {
		return err
	}
	r := routes{opts: &d.opts, gw6: gw6}
	d.ingress = ingress{
		routes: r, link: &d.link,
		dhcp4: newDHCP4(&d.opts, &d.link),
		dhcp6: &dhcp6{opts: &d.opts, link: &d.link, gw: gw6},
		ra:    &advertiser{opts: &d.opts, link: &d.link, gw: gw6},
	}
	d.startNAT(&d.ingress.routes)
	if !d.opts.NoIPv6 {
		d.g.run(func() { d.ingress.ra.run(d.g.ctx) })
	}
	if !d.opts.Restrict {
		if err := d.dns.start(d.stack); err != nil {
			return err
		}
	}
	return d.startForwards()
}

func (d *Device) startNAT(r *routes) {
	out := &icmpOut{stack: d.stack, opts: &d.opts}
	d.tcp = newTCPNAT(d.g, d.stack, r, out)
	d.udp = newUDPNAT(d.g, d.stack, r, out)
	d.ping = newPingNAT(d.g, r, out)
	d.stack.SetTransportProtocolHandler(icmp.ProtocolNumber4, d.ping.packet)
	d.stack.SetTransportProtocolHandler(icmp.ProtocolNumber6, d.ping.packet)
	d.dns = newDNS(d.g.ctx, &d.opts)
}

func (d *Device) startForwards() error {
	for _, f := range d.opts.Forwards {
		fwd := &forward{Forward: f, g: d.g, stack: d.stack, opts: &d.opts, nat: d.tcp}
		if err := fwd.open(); err != nil {
			return err
		}
		d.forwards = append(d.forwards, fwd)
	}
	for _, f := range d.forwards {
		f.start()
	}
	return nil
}

// newStack makes a stack that takes every packet for its own, and may answer from any address.
func (d *Device) newStack() error {
	d.stack = stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{
			tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6,
		},
	})
	s := d.stack
	sack, moderate := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true)
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcpBufferMin, Default: tcpBuffer, Max: tcpBufferMax}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: tcpBufferMin, Default: tcpBuffer, Max: tcpBufferMax}
	linger := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	for _, o := range []tcpip.SettableTransportProtocolOption{&sack, &moderate, &receive, &send, &linger} {
		if err := s.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return fmt.Errorf("stack: %T: %v", o, err)
		}
	}
	if err := s.CreateNIC(nicID, &d.link); err != nil {
		return fmt.Errorf("stack: %v", err)
	}
	if err := s.SetSpoofing(nicID, true); err != nil {
		return fmt.Errorf("stack: %v", err)
	}
	if err := s.SetPromiscuousMode(nicID, true); err != nil {
		return fmt.Errorf("stack: %v", err)
	}
	return d.addAddresses()
}

func (d *Device) addAddresses() error {
	var addrs []netip.Addr
	var nets []netip.Prefix
	if !d.opts.NoIPv4 {
		addrs, nets = append(addrs, d.opts.Host, d.opts.DNS), append(nets, d.opts.Net)
	}
	if !d.opts.NoIPv6 {
		addrs, nets = append(addrs, gw6, d.opts.Host6, d.opts.DNS6), append(nets, d.opts.Net6)
	}
	for _, a := range addrs {
		bits := d.opts.Net.Bits()
		if a.Is6() {
			bits = d.opts.Net6.Bits()
		}
		pa := tcpip.ProtocolAddress{Protocol: protoOf(a), AddressWithPrefix: stackAddr(a).WithPrefix()}
		pa.AddressWithPrefix.PrefixLen = bits
		if err := d.stack.AddProtocolAddress(nicID, pa, stack.AddressProperties{}); err != nil {
			return fmt.Errorf("stack: address %v: %v", a, err)
		}
	}
	var table []tcpip.Route
	for _, n := range nets {
		p := tcpip.AddressWithPrefix{Address: stackAddr(n.Addr()), PrefixLen: n.Bits()}
		table = append(table, tcpip.Route{Destination: p.Subnet(), NIC: nicID})
	}
	table = append(table, tcpip.Route{Destination: header.IPv6LinkLocalPrefix.Subnet(), NIC: nicID})
	d.stack.SetRouteTable(table)
	return nil
}

// fromGuest is what Send takes.
const fromGuest = offload.Csum | offload.TSO4 | offload.TSO6 | offload.ECN

func (d *Device) Capabilities() netdev.Capabilities {
	return netdev.Capabilities{
		Kind: "user", MaxPairs: maxPairs, MTU: d.opts.MTU,
		FromGuest: fromGuest, ToGuest: offload.Csum | offload.TSO4 | offload.TSO6,
		ZeroCopy: "never",
	}
}

func (d *Device) SetOffloads(accept offload.Set) error {
	d.link.accept.Store(uint32(accept))
	return nil
}

// SetPairs steers the flows anew. A guest that comes is told of its router at once.
func (d *Device) SetPairs(n int) error {
	if n < 0 || n > maxPairs {
		return fmt.Errorf("user: %d queue pairs, of %d", n, maxPairs)
	}
	before := d.out.inUse.Load()
	d.out.setInUse(n)
	for i := n; i < maxPairs; i++ {
		d.queues[i].flush()
	}
	if before == 0 && n > 0 && !d.opts.NoIPv6 {
		d.ingress.ra.send()
	}
	return nil
}

func (d *Device) Queue(i int) netdev.Queue { return &d.queues[i] }

// Close resets all connections and ends every goroutine.
func (d *Device) Close() error {
	d.g.stop()
	for _, f := range d.forwards {
		f.close()
	}
	if d.udp != nil {
		d.udp.flows.evictAll()
		d.ping.flows.evictAll()
		d.dns.close()
	}
	if d.stack != nil {
		d.stack.Close()
	}
	d.g.wg.Wait()
	if d.stack != nil {
		d.stack.Wait()
	}
	for i := range d.queues {
		d.queues[i].flush()
	}
	return d.out.close()
}

// Stats is what a network carries now.
type Stats struct {
	Conns      int    // TCP connections, forwarded ones and those being made included
	ConnsTotal uint64 // ever made
	UDPFlows   int
	Pings      int
	Leases     int // addresses that DHCP has leased
	Forwards   []ForwardStats
}

// Stats may be called from any goroutine.
func (d *Device) Stats() Stats {
	s := Stats{
		Conns: len(d.tcp.slots), ConnsTotal: d.tcp.count.Load(),
		UDPFlows: d.udp.flows.len(), Pings: d.ping.flows.len(), Leases: d.ingress.dhcp4.count(),
	}
	for _, f := range d.forwards {
		s.Forwards = append(s.Forwards, f.stats())
	}
	return s
}
