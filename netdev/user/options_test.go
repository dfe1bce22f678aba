package user

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var compareNetip = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}, netip.AddrPort{})

func defaults() Options {
	return Options{
		Net: netip.MustParsePrefix("10.0.2.0/24"), Host: gateway, DNS: dnsIP, DHCPStart: guestIP,
		Net6: netip.MustParsePrefix("fd00::/64"), Host6: gateway6, DNS6: netip.MustParseAddr("fd00::3"),
		MTU: 1500, ResolvConf: "/etc/resolv.conf", HostsFile: "/etc/hosts",
	}
}

func TestParseOptions(t *testing.T) {
	for _, c := range []struct {
		in   string
		edit func(o *Options)
	}{
		{"", func(*Options) {}},
		{"user", func(*Options) {}},
		{"user,mtu=9000,restrict=on,hostloopback=off,ipv6=off", func(o *Options) {
			o.MTU, o.Restrict, o.NoHostLoopback, o.NoIPv6 = 9000, true, true, true
		}},
		{"net=192.168.76.9/24", func(o *Options) {
			o.Net = netip.MustParsePrefix("192.168.76.0/24")
			o.Host, o.DNS = netip.MustParseAddr("192.168.76.2"), netip.MustParseAddr("192.168.76.3")
			o.DHCPStart = netip.MustParseAddr("192.168.76.15")
		}},
		{"host=10.0.2.1,dns=10.0.2.4,dhcpstart=10.0.2.100,ipv6-dns=fd00::9", func(o *Options) {
			o.Host, o.DNS, o.DHCPStart = netip.MustParseAddr("10.0.2.1"), netip.MustParseAddr("10.0.2.4"), netip.MustParseAddr("10.0.2.100")
			o.DNS6 = netip.MustParseAddr("fd00::9")
		}},
		{"net6=fd12:1::/64", func(o *Options) {
			o.Net6 = netip.MustParsePrefix("fd12:1::/64")
			o.Host6, o.DNS6 = netip.MustParseAddr("fd12:1::2"), netip.MustParseAddr("fd12:1::3")
		}},
		{"hostname=vm1,domainname=example.org.,dnssearch=a.b,dnssearch=c", func(o *Options) {
			o.Hostname, o.DomainName, o.DNSSearch = "vm1", "example.org", []string{"a.b", "c"}
		}},
		{"hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::53-10.0.2.77:5353,hostfwd=:[::1]:80-[fd00::77]:8080", func(o *Options) {
			o.Forwards = []Forward{
				{"tcp", netip.MustParseAddrPort("127.0.0.1:2222"), netip.MustParseAddrPort("10.0.2.15:22")},
				{"udp", netip.MustParseAddrPort("0.0.0.0:53"), netip.MustParseAddrPort("10.0.2.77:5353")},
				{"tcp", netip.MustParseAddrPort("[::1]:80"), netip.MustParseAddrPort("[fd00::77]:8080")},
			}
		}},
	} {
		want := defaults()
		c.edit(&want)
		got, err := ParseOptions(c.in)
		if diff := cmp.Diff(want, got, compareNetip); err != nil || diff != "" {
			t.Errorf("%q: %v\n%s", c.in, err, diff)
		}
	}
}

func TestParseOptionsRefuses(t *testing.T) {
	for in, why := range map[string]string{
		"nett=1":                                `unknown option "nett"`,
		"net":                                   `"net" lacks a value`,
		"net=10.0.2.0":                          "no '/'",
		"net=10.0.2.0/30":                       "/8 to /27",
		"net=127.0.0.0/8":                       "network of hosts",
		"net=fd00::/64":                         "not an IPv4 network",
		"host=10.0.3.2":                         "not in 10.0.2.0/24",
		"host=10.0.2.3":                         "must differ",
		"dns=10.0.2.255":                        "not the address of a host",
		"dhcpstart=10.0.2.0":                    "not the address of a host",
		"net6=fd00::/48":                        "/64",
		"net6=ff02::/64":                        "network of hosts",
		"net6=10.0.0.0/8":                       "/64",
		"ipv6-host=fd01::2":                     "not in fd00::/64",
		"ipv6-host=fd00::3":                     "both fd00::3",
		"mtu=1000":                              "1280 to 65520",
		"mtu=x":                                 "not a number",
		"restrict=maybe":                        "neither on nor off",
		"ipv4=off,ipv6=off":                     "neither IPv4 nor IPv6",
		"hostname=a b":                          "cannot be part of a name",
		"dnssearch=a..b":                        "cannot be part of a name",
		"hostfwd=22":                            "want [tcp|udp]",
		"hostfwd=sctp::22-:22":                  "neither tcp nor udp",
		"hostfwd=tcp::22":                       "no - between",
		"hostfwd=tcp::22-:0":                    "guest's port is 0",
		"hostfwd=tcp::99999-:22":                "not a port",
		"hostfwd=tcp:localhost:1-:22":           "unable to parse IP",
		"hostfwd=tcp:::1:1-:22":                 "lacks its brackets",
		"hostfwd=tcp::1-192.168.0.1:22":         "not in the guest's network",
		"hostfwd=tcp::1-10.0.2.2:22":            "is not the guest",
		"ipv6=off,hostfwd=tcp::1-[fd00::15]:22": "no address of the kind",
		"dnssearch=" + strings.Repeat("a.", 130) + "a":                                         "longer than 253",
		strings.TrimSuffix(strings.Repeat("dnssearch="+strings.Repeat("a.", 40)+"a,", 7), ","): "longer than 512",
	} {
		if o, err := ParseOptions(in); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%q: %v, want %q in it (%+v)", in, err, why, o)
		}
	}
}

func TestForwardString(t *testing.T) {
	for _, s := range []string{"tcp:127.0.0.1:2222-:22", "udp::53-10.0.2.77:5353", "tcp:[::1]:80-[fd00::77]:8080"} {
		f, err := ParseForward(s)
		if err != nil || f.String() != s {
			t.Errorf("%s: %v, %v", s, f, err)
		}
	}
}

func FuzzParseOptions(f *testing.F) {
	f.Add("net=10.0.0.0/8,hostfwd=tcp:127.0.0.1:2222-:22")
	f.Add("net6=fd00::/64,ipv6-host=fd00::9,hostfwd=udp:[::1]:80-[fd00::77]:8080")
	f.Fuzz(func(t *testing.T, s string) {
		o, err := ParseOptions(s)
		if err != nil {
			return
		}
		again, err := o.withDefaults()
		if diff := cmp.Diff(o, again, compareNetip, cmpopts.EquateEmpty()); err != nil || diff != "" {
			t.Errorf("%q is not stable: %v\n%s", s, err, diff)
		}
	})
}
