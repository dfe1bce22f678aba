package user

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// ParseOptions reads options as QEMU's "-netdev user" writes them, "net=10.0.2.0/24,hostfwd=tcp:127.0.0.1:2222-:22". A leading "user" is
// allowed, the empty string is the default network.
//
//	ipv4=on|off  net=PREFIX  host=ADDR  dns=ADDR  dhcpstart=ADDR
//	ipv6=on|off  net6=PREFIX (or ipv6-net=)  ipv6-host=ADDR  ipv6-dns=ADDR
//	mtu=BYTES  hostname=NAME  domainname=NAME  dnssearch=NAME (repeated)
//	restrict=on|off  hostloopback=on|off
//	hostfwd=[tcp|udp]:[HOSTADDR]:HOSTPORT-[GUESTADDR]:GUESTPORT (repeated; IPv6 addresses in brackets)
func ParseOptions(s string) (Options, error) {
	var o Options
	if s == "user" {
		s = ""
	}
	s = strings.TrimPrefix(s, "user,")
	if s == "" {
		return o.withDefaults()
	}
	for field := range strings.SplitSeq(s, ",") {
		key, value, found := strings.Cut(field, "=")
		set, known := setters[key]
		switch {
		case !known:
			return o, fmt.Errorf("user: unknown option %q", key)
		case !found || value == "":
			return o, fmt.Errorf("user: option %q lacks a value", key)
		}
		if err := set(&o, value); err != nil {
			return o, fmt.Errorf("user: %s=%s: %w", key, value, err)
		}
	}
	o, err := o.withDefaults()
	if err != nil {
		return o, fmt.Errorf("user: %w", err)
	}
	return o, nil
}

type setter func(o *Options, value string) error

var setters = map[string]setter{
	"ipv4":         flag(func(o *Options) *bool { return &o.NoIPv4 }, true),
	"net":          network(func(o *Options) *netip.Prefix { return &o.Net }),
	"host":         address(func(o *Options) *netip.Addr { return &o.Host }),
	"dns":          address(func(o *Options) *netip.Addr { return &o.DNS }),
	"dhcpstart":    address(func(o *Options) *netip.Addr { return &o.DHCPStart }),
	"ipv6":         flag(func(o *Options) *bool { return &o.NoIPv6 }, true),
	"net6":         network(func(o *Options) *netip.Prefix { return &o.Net6 }),
	"ipv6-net":     network(func(o *Options) *netip.Prefix { return &o.Net6 }),
	"ipv6-host":    address(func(o *Options) *netip.Addr { return &o.Host6 }),
	"ipv6-dns":     address(func(o *Options) *netip.Addr { return &o.DNS6 }),
	"mtu":          setMTU,
	"hostname":     name(func(o *Options) *string { return &o.Hostname }),
	"domainname":   name(func(o *Options) *string { return &o.DomainName }),
	"dnssearch":    addSearch,
	"restrict":     flag(func(o *Options) *bool { return &o.Restrict }, false),
	"hostloopback": flag(func(o *Options) *bool { return &o.NoHostLoopback }, true),
	"hostfwd":      addForward,
}

// flag reads on and off. A field that says "no" is the opposite of its option.
func flag(field func(*Options) *bool, opposite bool) setter {
	return func(o *Options, value string) error {
		switch value {
		case "on", "yes", "true", "y":
			*field(o) = !opposite
		case "off", "no", "false", "n":
			*field(o) = opposite
		default:
			return errors.New("neither on nor off")
		}
		return nil
	}
}

func address(field func(*Options) *netip.Addr) setter {
	return func(o *Options, value string) (err error) {
		*field(o), err = parseAddr(value)
		return err
	}
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err == nil && a.Zone() != "" {
		err = errors.New("an address with a zone has no meaning here")
	}
	return a.Unmap(), err
}

func network(field func(*Options) *netip.Prefix) setter {
	return func(o *Options, value string) (err error) {
		*field(o), err = netip.ParsePrefix(value)
		return err
	}
}

func setMTU(o *Options, value string) error {
	n, err := strconv.Atoi(value)
	if err != nil {
		return errors.New("not a number of bytes")
	}
	if n < MinMTU || n > MaxMTU {
		return fmt.Errorf("not within %d to %d bytes", MinMTU, MaxMTU)
	}
	o.MTU = n
	return nil
}

// maxName is the longest domain name in text form (RFC 1035 §2.3.4), maxLabel the longest part of one.
const (
	maxName  = 253
	maxLabel = 63
)

func checkName(s string) error {
	s = strings.TrimSuffix(s, ".")
	if len(s) > maxName {
		return fmt.Errorf("longer than %d bytes", maxName)
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > maxLabel || strings.ContainsFunc(label, notInName) {
			return fmt.Errorf("%q cannot be part of a name", label)
		}
	}
	return nil
}

func notInName(r rune) bool {
	return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_')
}

func name(field func(*Options) *string) setter {
	return func(o *Options, value string) error {
		*field(o) = strings.TrimSuffix(value, ".")
		return checkName(value)
	}
}

func addSearch(o *Options, value string) error {
	o.DNSSearch = append(o.DNSSearch, strings.TrimSuffix(value, "."))
	return checkName(value)
}

func addForward(o *Options, value string) error {
	f, err := ParseForward(value)
	o.Forwards = append(o.Forwards, f)
	return err
}

// ParseForward reads "[tcp|udp]:[HOSTADDR]:HOSTPORT-[GUESTADDR]:GUESTPORT".
func ParseForward(s string) (f Forward, err error) {
	proto, rest, found := strings.Cut(s, ":")
	if !found {
		return f, errors.New("want [tcp|udp]:[HOSTADDR]:HOSTPORT-[GUESTADDR]:GUESTPORT")
	}
	if f.Proto = proto; proto == "" {
		f.Proto = "tcp"
	}
	if f.Proto != "tcp" && f.Proto != "udp" {
		return f, fmt.Errorf("protocol %q is neither tcp nor udp", proto)
	}
	host, guest, found := strings.Cut(rest, "-")
	if !found {
		return f, errors.New("no - between the host's part and the guest's")
	}
	if f.Host, err = parseEndpoint(host); err != nil {
		return f, fmt.Errorf("the host's part: %w", err)
	}
	if f.Guest, err = parseEndpoint(guest); err != nil {
		return f, fmt.Errorf("the guest's part: %w", err)
	}
	if f.Guest.Port() == 0 {
		return f, errors.New("the guest's port is 0")
	}
	return f, nil
}

// parseEndpoint reads "ADDR:PORT" or ":PORT".
func parseEndpoint(s string) (netip.AddrPort, error) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return netip.AddrPort{}, fmt.Errorf("%q has no port", s)
	}
	port, err := strconv.ParseUint(s[i+1:], 10, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is not a port", s[i+1:])
	}
	if i == 0 {
		return netip.AddrPortFrom(netip.Addr{}, uint16(port)), nil
	}
	host := s[:i]
	if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
		host = host[1 : len(host)-1]
	} else if strings.Contains(host, ":") {
		return netip.AddrPort{}, fmt.Errorf("the IPv6 address in %q lacks its brackets", s)
	}
	a, err := parseAddr(host)
	return netip.AddrPortFrom(a, uint16(port)), err
}
