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
	open  func(spec string, s *settings) (netdev.Device, error) // settles what --net says of other settings
}

// kinds are all that there are; the first is the default.
var kinds = []kind{
	{"user", "user[,hostfwd=...][,mtu=BYTES][,restrict=on]...", "a network of its own behind the host's sockets, which needs no privilege (the default)", false, openUser},
	{"tap", "tap[:NAME][,bridge=BR][,mtu=BYTES][,fd=N][,macvtap=DEV]...", "an interface of the host, made if there is none", false, openTap},
	{"packet", "packet:NAME[,queues=N][,fanout=hash|cpu|qm][,mtu=BYTES][,promisc=off]...", "an interface of the host that is there, such as a network card", false, openPacket},
	{"xdp", "xdp:NAME[,queue=N][,mode=auto|native|generic|copy|zerocopy][,mtu=BYTES][,no-balloon=on]...", "an interface of the host that is there, past the kernel's network stack (AF_XDP)", true, openXDP},
	{"null", "null[,generate=on][,size=BYTES][,count=N][,readheaders=on][,echo=on]", "no network: drops frames, makes them, or returns a copy of each, for measurements", false, openNull},
	{"vxlan", "vxlan:vni=N,remote=ADDR[;ADDR...][,local=ADDR][,port=N][,zerocopy=auto|on|off]...", "a VXLAN tunnel to other hosts or multicast groups, large frames from the guest's pages", true, openUDP},
	{"geneve", "geneve:vni=N,remote=ADDR[;ADDR...][,local=ADDR][,port=N]...", "a Geneve tunnel to other hosts or multicast groups", true, openUDP},
	{"dgram", "dgram:local=ADDR:PORT,remote=ADDR:PORT...", "Ethernet frames in UDP datagrams, as QEMU's -netdev dgram has them", true, openUDP},
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

// openDevice opens the device that --net names.
func openDevice(s *settings) (netdev.Device, error) {
	name, _, _ := strings.Cut(s.net, ",")
	name, _, _ = strings.Cut(name, ":")
	if len(s.hostfwd) > 0 && name != "user" {
		return nil, usagef("--hostfwd is for --net user; behind %s the guest has addresses of its own", name)
	}
	for _, k := range kinds {
		if k.name != name {
			continue
		}
		if s.policy == netdev.On && !k.pages {
			return nil, usagef("--zerocopy on: --net %s copies every frame; %s do not", name, pageKinds())
		}
		return k.open(s.net, s)
	}
	return nil, usagef("--net %q: unknown kind %q, known are %s", s.net, name, kindNames())
}

// openUser lets the options of --net have the last word over --mtu. One queue pair will do for most guests.
func openUser(spec string, s *settings) (netdev.Device, error) {
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
		return nil, &usageError{err}
	}
	s.queues = max(s.queues, 1)
	return user.Open(o)
}

func openTap(spec string, s *settings) (netdev.Device, error) {
	o, err := tap.ParseOptions(spec)
	if err != nil {
		return nil, &usageError{err}
	}
	if o.Queues, err = s.pairs(spec, max(o.Queues, len(o.FDs))); err != nil {
		return nil, err
	}
	if o.MTU == 0 && len(o.FDs) == 0 && o.Macvtap == "" {
		o.MTU = s.mtu
	}
	return tap.Open(o)
}

// pairs is the number of queue pairs where --net says have, and 0 if neither that nor --queues says one.
func (s *settings) pairs(spec string, have int) (int, error) {
	if have != 0 && s.queues != 0 && have != s.queues {
		return 0, usagef("--queues %d contradicts --net %q, which has %d", s.queues, spec, have)
	}
	return cmp.Or(have, s.queues), nil
}

// openPacket lets the options of --net have the last word over --mtu.
func openPacket(spec string, s *settings) (netdev.Device, error) {
	o, err := packet.ParseOptions(spec)
	if err != nil {
		return nil, &usageError{err}
	}
	if o.Queues, err = s.pairs(spec, o.Queues); err != nil {
		return nil, err
	}
	o.MTU = cmp.Or(o.MTU, s.mtu)
	return packet.Open(o)
}

// openXDP lets the options of --net have the last word over --mtu, --zerocopy and --no-balloon. There is a queue pair for each queue of the interface.
func openXDP(spec string, s *settings) (netdev.Device, error) {
	o, err := xdp.ParseOptions(spec)
	if err != nil {
		return nil, &usageError{err}
	}
	o.MTU, o.ZeroCopy = cmp.Or(o.MTU, s.mtu), cmp.Or(o.ZeroCopy, s.policy)
	o.NoBalloon = o.NoBalloon || s.flags.noBalloon
	return xdp.Open(o)
}

// openUDP lets the options of --net have the last word over --mtu. A tunnel has one queue pair.
func openUDP(spec string, s *settings) (netdev.Device, error) {
	o, err := udp.ParseOptions(spec)
	if err != nil {
		return nil, &usageError{err}
	}
	if s.queues > 1 {
		return nil, usagef("--queues %d: --net %s has one queue pair", s.queues, o.Mode)
	}
	o.MTU, o.ZeroCopy = cmp.Or(o.MTU, s.mtu), cmp.Or(o.ZeroCopy, s.policy)
	o.NoBalloon = o.NoBalloon || s.flags.noBalloon
	return udp.Open(o)
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

func openNull(spec string, s *settings) (netdev.Device, error) {
	none := null.Options{Pairs: s.queues}
	o := nullOptions{Options: none}
	if _, err := nullKeys.Parse(&o, netopt.Split(strings.TrimLeft(strings.TrimPrefix(spec, "null"), ":,"))); err != nil {
		return nil, usagef("--net %q: %w", spec, err)
	}
	if o.echo {
		if o.Options != none {
			return nil, usagef("--net %q: echo=on goes with no other option: all frames come from the guest, and their headers are read", spec)
		}
		return pair.NewLoop(pair.Options{Pairs: s.queues})
	}
	d, err := null.New(o.Options)
	if err != nil {
		return nil, usagef("--net %q: %w", spec, err)
	}
	return d, nil
}
