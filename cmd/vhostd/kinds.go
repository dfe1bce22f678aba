package main

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"

	"github.com/vhostd/vhostd/internal/netopt"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/null"
	"github.com/vhostd/vhostd/netdev/packet"
	"github.com/vhostd/vhostd/netdev/pair"
	"github.com/vhostd/vhostd/netdev/tap"
	"github.com/vhostd/vhostd/netdev/udp"
	"github.com/vhostd/vhostd/netdev/user"
	"github.com/vhostd/vhostd/netdev/xdp"
)

// kind is one thing that --net can name.
type kind struct {
	name string
	form string // how it is written, for people
	what string
	// pages: frames can leave from the guest's own pages.
	pages bool
	parse func(spec string, s *settings) (opener, error) // settles what --net says of other settings
}

// opener opens a device whose options have been understood.
type opener func() (netdev.Device, error)

// openerOf is what a device's Open and its options come to.
func openerOf[O any, D netdev.Device](open func(O) (D, error), o O) opener {
	return func() (netdev.Device, error) {
		d, err := open(o)
		if err != nil {
			return nil, err // and no Device that is not there
		}
		return d, nil
	}
}

// kinds are all that there are; the first is the default.
var kinds = []kind{
	{"user", "user[,hostfwd=...][,mtu=BYTES][,restrict=on]...", "a network of its own behind the host's sockets, which needs no privilege (the default)", false, parseUser},
	{"tap", "tap[:NAME][,bridge=BR][,mtu=BYTES][,fd=N][,macvtap=DEV]...", "an interface of the host, made if there is none", false, parseTap},
	{"packet", "packet:NAME[,queues=N][,fanout=hash|cpu|qm][,mtu=BYTES][,promisc=off]...", "an interface of the host that is there, such as a network card", false, parsePacket},
	{"xdp", "xdp:NAME[,queue=N][,mode=auto|native|generic|copy|zerocopy][,mtu=BYTES][,no-balloon=on]...", "an interface of the host that is there, past the kernel's network stack (AF_XDP)", true, parseXDP},
	{"null", "null[,generate=on][,size=BYTES][,count=N][,readheaders=on][,echo=on]", "no network: drops frames, makes them, or returns a copy of each, for measurements", false, parseNull},
	{"vxlan", "vxlan:vni=N,remote=ADDR[;ADDR...][,local=ADDR][,port=N][,zerocopy=auto|on|off]...", "a VXLAN tunnel to other hosts or multicast groups, large frames from the guest's pages", true, parseUDP},
	{"geneve", "geneve:vni=N,remote=ADDR[;ADDR...][,local=ADDR][,port=N]...", "a Geneve tunnel to other hosts or multicast groups", true, parseUDP},
	{"dgram", "dgram:local=ADDR:PORT,remote=ADDR:PORT...", "Ethernet frames in UDP datagrams, as QEMU's -netdev dgram has them", true, parseUDP},
}

const hostfwdUsage = "with --net user, forward a port of the host to the guest: `tcp|udp:[ADDR]:PORT-[ADDR]:PORT`; may be repeated"

func kindNames() string {
	var names []string
	for _, k := range kinds {
		names = append(names, k.name)
	}
	return strings.Join(names, ", ")
}

// pageKinds names the kinds of which frames can leave from the guest's pages.
func pageKinds() string {
	var names []string
	for _, k := range kinds {
		if k.pages {
			names = append(names, k.name)
		}
	}
	return strings.Join(names, ", ")
}

// kindsHelp describes the kinds for people.
func kindsHelp() string {
	b := strings.Builder{}
	for _, k := range kinds {
		fmt.Fprintf(&b, "  --net %s\n        %s\n", k.form, k.what)
	}
	return b.String()
}

// parseDevice understands what --net names. All its errors are faults.
func parseDevice(s *settings) (opener, error) {
	name, _, _ := strings.Cut(s.net, ",")
	name, _, _ = strings.Cut(name, ":")
	if len(s.hostfwd) > 0 && name != "user" {
		return nil, s.faultf("hostfwd", "is for %s user; behind %s the guest has addresses of its own", s.word("net"), name)
	}
	for _, k := range kinds {
		if k.name != name {
			continue
		}
		if s.policy == netdev.On && !k.pages {
			return nil, s.faultf("zerocopy", "on: %s %s copies every frame; %s do not", s.word("net"), name, pageKinds())
		}
		return k.parse(s.net, s)
	}
	return nil, s.faultf("net", "%q: unknown kind %q, known are %s", s.net, name, kindNames())
}

// parseUser lets the options of --net have the last word over --mtu. One queue pair will do for most guests.
func parseUser(spec string, s *settings) (opener, error) {
	parts := []string{"user"}
	if s.mtu != 0 {
		parts = append(parts, fmt.Sprintf("mtu=%d", s.mtu))
	}
	if spec = strings.TrimLeft(strings.TrimPrefix(spec, "user"), ":,"); spec != "" {
		parts = append(parts, spec)
	}
	for _, f := range s.hostfwd {
		parts = append(parts, "hostfwd="+f)
	}
	o, err := user.ParseOptions(strings.Join(parts, ","))
	if err != nil {
		return nil, &fault{"net", err}
	}
	s.queues = max(s.queues, 1)
	return openerOf(user.Open, o), nil
}

func parseTap(spec string, s *settings) (opener, error) {
	o, err := tap.ParseOptions(spec)
	if err != nil {
		return nil, &fault{"net", err}
	}
	if len(o.FDs) > 0 && !s.inherits {
		return nil, s.faultf("net", "%q: descriptors are inherited by vhostd run alone", spec)
	}
	if o.Queues, err = s.pairs(spec, max(o.Queues, len(o.FDs))); err != nil {
		return nil, err
	}
	if o.MTU == 0 && len(o.FDs) == 0 && o.Macvtap == "" {
		o.MTU = s.mtu
	}
	return openerOf(tap.Open, o), nil
}

// pairs is the number of queue pairs where --net says have, and 0 if neither that nor --queues says one.
func (s *settings) pairs(spec string, have int) (int, error) {
	if have != 0 && s.queues != 0 && have != s.queues {
		return 0, s.faultf("queues", "%d contradicts %s %q, which has %d", s.queues, s.word("net"), spec, have)
	}
	return cmp.Or(have, s.queues), nil
}

// parsePacket lets the options of --net have the last word over --mtu.
func parsePacket(spec string, s *settings) (opener, error) {
	o, err := packet.ParseOptions(spec)
	if err != nil {
		return nil, &fault{"net", err}
	}
	if o.Queues, err = s.pairs(spec, o.Queues); err != nil {
		return nil, err
	}
	o.MTU = cmp.Or(o.MTU, s.mtu)
	return openerOf(packet.Open, o), nil
}

// parseXDP lets the options of --net have the last word over --mtu, --zerocopy and --no-balloon. There is a queue pair for each queue of the interface.
func parseXDP(spec string, s *settings) (opener, error) {
	o, err := xdp.ParseOptions(spec)
	if err != nil {
		return nil, &fault{"net", err}
	}
	o.MTU, o.ZeroCopy = cmp.Or(o.MTU, s.mtu), cmp.Or(o.ZeroCopy, s.policy)
	o.NoBalloon = o.NoBalloon || s.flags.noBalloon
	return openerOf(xdp.Open, o), nil
}

// parseUDP lets the options of --net have the last word over --mtu. A tunnel has one queue pair.
func parseUDP(spec string, s *settings) (opener, error) {
	o, err := udp.ParseOptions(spec)
	if err != nil {
		return nil, &fault{"net", err}
	}
	if s.queues > 1 {
		return nil, s.faultf("queues", "%d: %s %s has one queue pair", s.queues, s.word("net"), o.Mode)
	}
	o.MTU, o.ZeroCopy = cmp.Or(o.MTU, s.mtu), cmp.Or(o.ZeroCopy, s.policy)
	o.NoBalloon = o.NoBalloon || s.flags.noBalloon
	return openerOf(udp.Open, o), nil
}

// nullOptions are those of --net null.
type nullOptions struct {
	null.Options
	echo bool
}

var nullKeys = netopt.Keys[nullOptions]{
	{Name: "generate", Value: "on|off", Set: func(o *nullOptions, v string) (err error) { o.Generate, err = netopt.OnOff(v); return }},
	{Name: "size", Value: "BYTES", Set: func(o *nullOptions, v string) (err error) { o.Size, err = strconv.Atoi(v); return }},
	{Name: "count", Value: "N", Set: func(o *nullOptions, v string) (err error) { o.Count, err = strconv.ParseUint(v, 10, 64); return }},
	{Name: "readheaders", Value: "on|off", Set: func(o *nullOptions, v string) (err error) { o.ReadHeaders, err = netopt.OnOff(v); return }},
	{Name: "echo", Value: "on|off", Set: func(o *nullOptions, v string) (err error) { o.echo, err = netopt.OnOff(v); return }},
}

func parseNull(spec string, s *settings) (opener, error) {
	none := null.Options{Pairs: s.queues}
	o := nullOptions{Options: none}
	if _, err := nullKeys.Parse(&o, netopt.Split(strings.TrimLeft(strings.TrimPrefix(spec, "null"), ":,"))); err != nil {
		return nil, s.faultf("net", "%q: %w", spec, err)
	}
	if o.echo {
		if o.Options != none {
			return nil, s.faultf("net", "%q: echo=on goes with no other option: all frames come from the guest, and their headers are read", spec)
		}
		return openerOf(pair.NewLoop, pair.Options{Pairs: s.queues}), nil
	}
	d, err := null.New(o.Options) // it takes nothing of the host
	if err != nil {
		return nil, s.faultf("net", "%q: %w", spec, err)
	}
	return func() (netdev.Device, error) { return d, nil }, nil
}
