package user

import (
	"errors"
	"fmt"
	"net/netip"
)

// Limits of Options.
const (
	// MinMTU and MaxMTU bound Options.MTU, in bytes: what IPv6 asks of a link (RFC 8200 §5), and what a 64 KiB frame holds.
	MinMTU = 1280
	MaxMTU = 65520
	// defaultMTU in bytes.
	defaultMTU = 1500
)

// Options says what network the guest sees. The zero value is the default network; fields left zero take the value given here.
type Options struct {
	NoIPv4    bool
	Net       netip.Prefix // the guest's IPv4 network, 10.0.2.0/24
	Host      netip.Addr   // the router, which also stands for the host's loopback: the 2nd address of Net
	DNS       netip.Addr   // the name server: the 3rd address of Net
	DHCPStart netip.Addr   // first address that DHCP leases: the 15th of Net

	NoIPv6 bool
	Net6   netip.Prefix // the guest's IPv6 network, a /64: fd00::/64
	Host6  netip.Addr   // as Host: the 2nd address of Net6
	DNS6   netip.Addr   // as DNS: the 3rd address of Net6

	MTU int // bytes of the largest IP packet, MinMTU to MaxMTU: 1500

	Hostname   string   // what DHCP tells the guest that it is called; none
	DomainName string   // what DHCP tells the guest that its domain is; none
	DNSSearch  []string // domains that a guest appends to short names; none

	Restrict       bool // the guest reaches nothing but what Forwards bring
	NoHostLoopback bool // Host and Host6 do not stand for the host's loopback: nothing answers there
	Forwards       []Forward

	ResolvConf string // where the host's name servers are listed: /etc/resolv.conf
	HostsFile  string // names that are answered from a file: /etc/hosts
}

// Forward is a port of the host that leads to the guest.
type Forward struct {
	Proto string // "tcp" or "udp"
	// Host is listened on. The zero address is every IPv4 address of the host, port 0 one that the host chooses.
	Host netip.AddrPort
	// Guest is where it leads. The zero address is DHCPStart, which the first guest gets.
	Guest netip.AddrPort
}

// String is f as ParseOptions reads it.
func (f Forward) String() string {
	return f.Proto + ":" + endpoint(f.Host) + "-" + endpoint(f.Guest)
}

func endpoint(ap netip.AddrPort) string {
	if !ap.Addr().IsValid() {
		return fmt.Sprintf(":%d", ap.Port())
	}
	return ap.String()
}

// withDefaults fills in what is zero and checks the whole.
func (o Options) withDefaults() (Options, error) {
	if o.NoIPv4 && o.NoIPv6 {
		return o, errors.New("neither IPv4 nor IPv6 is left")
	}
	if o.MTU == 0 {
		o.MTU = defaultMTU
	}
	if o.MTU < MinMTU || o.MTU > MaxMTU {
		return o, fmt.Errorf("mtu %d is not within %d to %d", o.MTU, MinMTU, MaxMTU)
	}
	if o.ResolvConf == "" {
		o.ResolvConf = "/etc/resolv.conf"
	}
	if o.HostsFile == "" {
		o.HostsFile = "/etc/hosts"
	}
	if err := o.checkNames(); err != nil {
		return o, err
	}
	if err := o.fill4(); err != nil {
		return o, err
	}
	if err := o.fill6(); err != nil {
		return o, err
	}
	return o, o.fillForwards()
}

// maxSearchBytes bounds the search list, which has to fit into a router advertisement and a DHCP message.
const maxSearchBytes = 512

func (o *Options) checkNames() error {
	total := 0
	for _, s := range o.DNSSearch {
		if total += len(s) + 2; total > maxSearchBytes {
			return fmt.Errorf("the domains of dnssearch are longer than %d bytes", maxSearchBytes)
		}
		if err := checkName(s); err != nil {
			return fmt.Errorf("dnssearch=%s: %w", s, err)
		}
	}
	for _, s := range []string{o.Hostname, o.DomainName} {
		if s == "" {
			continue
		}
		if err := checkName(s); err != nil {
			return err
		}
	}
	return nil
}

// Place of the well-known addresses in their networks.
const (
	nthHost, nthDNS, nthDHCP = 2, 3, 15
	// leastHostBits leaves room for the addresses above in an IPv4 network.
	leastHostBits = 5
)

func (o *Options) fill4() error {
	if !o.Net.IsValid() {
		o.Net = netip.MustParsePrefix("10.0.2.0/24")
	}
	o.Net = o.Net.Masked()
	if !o.Net.Addr().Is4() || o.Net.Bits() > 32-leastHostBits || o.Net.Bits() < 8 {
		return fmt.Errorf("net=%v is not an IPv4 network of /8 to /%d", o.Net, 32-leastHostBits)
	}
	if !routable4(o.Net.Addr()) {
		return fmt.Errorf("net=%v cannot be a network of hosts", o.Net)
	}
	for _, f := range []struct {
		name string
		addr *netip.Addr
		nth  int
	}{{"host", &o.Host, nthHost}, {"dns", &o.DNS, nthDNS}, {"dhcpstart", &o.DHCPStart, nthDHCP}} {
		if err := place(f.name, f.addr, o.Net, f.nth); err != nil {
			return err
		}
		if *f.addr == o.Net.Addr() || *f.addr == lastAddr(o.Net) {
			return fmt.Errorf("%s=%v is not the address of a host in %v", f.name, *f.addr, o.Net)
		}
	}
	if o.Host == o.DNS || o.DHCPStart == o.Host || o.DHCPStart == o.DNS {
		return fmt.Errorf("host=%v, dns=%v and dhcpstart=%v must differ", o.Host, o.DNS, o.DHCPStart)
	}
	return nil
}

func (o *Options) fill6() error {
	if !o.Net6.IsValid() {
		o.Net6 = netip.MustParsePrefix("fd00::/64")
	}
	o.Net6 = o.Net6.Masked()
	if a := o.Net6.Addr(); !a.Is6() || o.Net6.Bits() != 64 {
		return fmt.Errorf("net6=%v is not an IPv6 /64, as a guest needs to choose its address in", o.Net6)
	} else if !routable6(a.Next()) {
		return fmt.Errorf("net6=%v cannot be a network of hosts", o.Net6)
	}
	if err := place("ipv6-host", &o.Host6, o.Net6, nthHost); err != nil {
		return err
	}
	if err := place("ipv6-dns", &o.DNS6, o.Net6, nthDNS); err != nil {
		return err
	}
	if o.Host6 == o.DNS6 {
		return fmt.Errorf("ipv6-host and ipv6-dns are both %v", o.DNS6)
	}
	return nil
}

// place makes *a the nth address of network if it is not set, and checks that it is in there.
func place(name string, a *netip.Addr, network netip.Prefix, nth int) error {
	if !a.IsValid() {
		*a = network.Addr()
		for range nth {
			*a = a.Next()
		}
	}
	if !network.Contains(*a) {
		return fmt.Errorf("%s=%v is not in %v", name, *a, network)
	}
	return nil
}

// lastAddr is the broadcast address of an IPv4 network.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

func (o *Options) fillForwards() error {
	forwards := append([]Forward(nil), o.Forwards...)
	for i := range forwards {
		f := &forwards[i]
		if f.Proto != "tcp" && f.Proto != "udp" {
			return fmt.Errorf("hostfwd=%v: the protocol is %q, not tcp or udp", *f, f.Proto)
		}
		if f.Guest.Port() == 0 {
			return fmt.Errorf("hostfwd=%v: the guest's port is missing", *f)
		}
		if !f.Host.Addr().IsValid() {
			f.Host = netip.AddrPortFrom(netip.IPv4Unspecified(), f.Host.Port())
		}
		if !f.Guest.Addr().IsValid() {
			f.Guest = netip.AddrPortFrom(o.DHCPStart, f.Guest.Port())
		}
		if err := o.checkGuest(f.Guest.Addr()); err != nil {
			return fmt.Errorf("hostfwd=%v: %w", *f, err)
		}
	}
	o.Forwards = forwards
	return nil
}

func (o *Options) checkGuest(a netip.Addr) error {
	switch {
	case a.Is4() && o.NoIPv4, a.Is6() && o.NoIPv6:
		return fmt.Errorf("the guest has no address of the kind of %v", a)
	case a.Is4() && !o.Net.Contains(a), a.Is6() && !o.Net6.Contains(a):
		return fmt.Errorf("%v is not in the guest's network", a)
	case a == o.Host || a == o.DNS || a == o.Host6 || a == o.DNS6:
		return fmt.Errorf("%v is not the guest", a)
	}
	return nil
}
