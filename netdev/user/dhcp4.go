package user

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	dhcp4ServerPort = 67
	dhcp4ClientPort = 68
	// maxDHCP is the longest message that is looked at, in bytes.
	maxDHCP = 2048

	leaseTime = 24 * time.Hour
	// offerTime is how long an address that was offered waits for its request.
	offerTime = 2 * time.Minute
	// declineTime is how long an address is not used that a guest found to be taken.
	declineTime = 10 * time.Minute
	// maxLeases bounds the table. A guest has one address; more are for those behind a bridge of its own.
	maxLeases = 128
)

// macAddr is the hardware address of a DHCP client; the zero one owns declined addresses.
type macAddr [6]byte

type lease struct {
	mac   macAddr
	until time.Time
}

// dhcp4 leases addresses (RFC 2131). Each client keeps the address that it had as long as the table has room.
type dhcp4 struct {
	opts *Options
	link *link
	now  func() time.Time

	mu     sync.Mutex
	leases map[netip.Addr]lease
}

// input answers a message of a client. Whoever speaks to port 67 speaks to this server, and to nobody beyond it.
func (d *dhcp4) input(f *frame, payload []byte) verdict {
	if len(payload) > maxDHCP {
		return refuse
	}
	req, err := dhcpv4.FromBytes(payload)
	if err != nil || req.OpCode != dhcpv4.OpcodeBootRequest || len(req.ClientHWAddr) != len(macAddr{}) {
		return refuse
	}
	if reply := d.answer(req); reply != nil {
		d.send(req, reply, header.Ethernet(f.data).SourceAddress())
	}
	return done
}

// answer returns the reply, or nil when there is none to give.
func (d *dhcp4) answer(req *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	mac := macAddr(req.ClientHWAddr)
	wanted := addr4(req.RequestedIPAddress())
	current := addr4(req.ClientIPAddr)
	switch req.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		if a, ok := d.lease(mac, wanted, offerTime); ok {
			return d.reply(req, dhcpv4.MessageTypeOffer, a)
		}
	case dhcpv4.MessageTypeRequest:
		if id := req.ServerIdentifier(); id != nil && addr4(id) != d.opts.Host {
			d.release(mac, netip.Addr{}, false)
			return nil
		}
		if !wanted.IsValid() {
			wanted = current
		}
		if a, ok := d.lease(mac, wanted, leaseTime); ok && a == wanted {
			return d.reply(req, dhcpv4.MessageTypeAck, a)
		}
		return d.reply(req, dhcpv4.MessageTypeNak, netip.Addr{})
	case dhcpv4.MessageTypeInform:
		return d.reply(req, dhcpv4.MessageTypeAck, netip.Addr{})
	case dhcpv4.MessageTypeRelease:
		d.release(mac, current, false)
	case dhcpv4.MessageTypeDecline:
		d.release(mac, wanted, true)
	}
	return nil
}

// addr4 is ip, or no address when it is unset.
func addr4(ip net.IP) netip.Addr {
	a, ok := netip.AddrFromSlice(ip.To4())
	if !ok || a.IsUnspecified() {
		return netip.Addr{}
	}
	return a
}

// lease gives mac an address for that long: the one that it has, else the wanted one if that is free, else any.
func (d *dhcp4) lease(mac macAddr, wanted netip.Addr, long time.Duration) (netip.Addr, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	for a, l := range d.leases {
		if l.mac == mac && mac != (macAddr{}) {
			d.leases[a] = lease{mac, later(l.until, now.Add(long))}
			return a, true
		}
	}
	d.expire(now)
	if len(d.leases) >= maxLeases {
		return netip.Addr{}, false
	}
	a := wanted
	if !a.IsValid() || !d.free(a) {
		a = d.firstFree()
	}
	if !a.IsValid() {
		return a, false
	}
	d.leases[a] = lease{mac, now.Add(long)}
	return a, true
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func (d *dhcp4) expire(now time.Time) {
	for a, l := range d.leases {
		if l.until.Before(now) {
			delete(d.leases, a)
		}
	}
}

// pool tells whether a is an address for guests: from DHCPStart on.
func (d *dhcp4) pool(a netip.Addr) bool {
	return d.opts.Net.Contains(a) && a.Compare(d.opts.DHCPStart) >= 0 && a != lastAddr(d.opts.Net) && a != d.opts.Host && a != d.opts.DNS
}

func (d *dhcp4) free(a netip.Addr) bool {
	_, taken := d.leases[a]
	return !taken && d.pool(a)
}

// firstFree looks no further than the table and the router's addresses can fill.
func (d *dhcp4) firstFree() netip.Addr {
	const ours = 2
	a := d.opts.DHCPStart
	for range maxLeases + ours + 1 {
		if d.free(a) {
			return a
		}
		if a = a.Next(); !d.opts.Net.Contains(a) {
			break
		}
	}
	return netip.Addr{}
}

// release ends what mac has, or keeps the address a from being used for a while when it was declined.
func (d *dhcp4) release(mac macAddr, a netip.Addr, declined bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for held, l := range d.leases {
		if l.mac != mac || a.IsValid() && a != held {
			continue
		}
		delete(d.leases, held)
		if declined {
			d.leases[held] = lease{until: d.now().Add(declineTime)}
		}
	}
}

// count is the number of addresses leased.
func (d *dhcp4) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.expire(d.now())
	return len(d.leases)
}

func (d *dhcp4) reply(req *dhcpv4.DHCPv4, kind dhcpv4.MessageType, a netip.Addr) *dhcpv4.DHCPv4 {
	host := net.IP(d.opts.Host.AsSlice())
	mods := []dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind),
		dhcpv4.WithServerIP(host),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(host)),
	}
	if kind != dhcpv4.MessageTypeNak {
		mods = append(mods, d.configuration()...)
	}
	if a.IsValid() {
		mods = append(mods,
			dhcpv4.WithYourIP(a.AsSlice()),
			dhcpv4.WithOption(dhcpv4.OptIPAddressLeaseTime(leaseTime)))
	}
	r, err := dhcpv4.NewReplyFromRequest(req, mods...)
	if err != nil {
		return nil
	}
	if req.MessageType() == dhcpv4.MessageTypeInform {
		r.ClientIPAddr = req.ClientIPAddr
	}
	return r
}

// configuration is what every client learns. With Restrict there is neither a way out nor a name server.
func (d *dhcp4) configuration() []dhcpv4.Modifier {
	o := d.opts
	mods := []dhcpv4.Modifier{
		dhcpv4.WithNetmask(net.CIDRMask(o.Net.Bits(), 32)),
		dhcpv4.WithOption(dhcpv4.OptBroadcastAddress(lastAddr(o.Net).AsSlice())),
		dhcpv4.WithGeneric(dhcpv4.OptionInterfaceMTU, []byte{byte(o.MTU >> 8), byte(o.MTU)}),
	}
	if !o.Restrict {
		mods = append(mods, dhcpv4.WithRouter(o.Host.AsSlice()), dhcpv4.WithDNS(o.DNS.AsSlice()))
	}
	if o.Hostname != "" {
		mods = append(mods, dhcpv4.WithOption(dhcpv4.OptHostName(o.Hostname)))
	}
	if o.DomainName != "" {
		mods = append(mods, dhcpv4.WithOption(dhcpv4.OptDomainName(o.DomainName)))
	}
	if len(o.DNSSearch) > 0 {
		mods = append(mods, dhcpv4.WithDomainSearchList(o.DNSSearch...))
	}
	return mods
}

// send addresses the reply as RFC 2131 §4.1 says.
func (d *dhcp4) send(req, reply *dhcpv4.DHCPv4, from tcpip.LinkAddress) {
	dst, mac := addr4(reply.YourIPAddr), from
	if a := addr4(req.ClientIPAddr); a.IsValid() {
		dst = a
	}
	if req.IsBroadcast() || reply.MessageType() == dhcpv4.MessageTypeNak || !dst.IsValid() {
		dst, mac = limitedBroadcast, header.EthernetBroadcastAddress
	}
	d.link.sendUDP(mac, netip.AddrPortFrom(d.opts.Host, dhcp4ServerPort), netip.AddrPortFrom(dst, dhcp4ClientPort), reply.ToBytes())
}

func newDHCP4(o *Options, l *link) *dhcp4 {
	return &dhcp4{opts: o, link: l, now: time.Now, leases: make(map[netip.Addr]lease)}
}
