package main

import (
	"strings"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/tap"
)

// kind is one thing that --net can name.
type kind struct {
	name string
	form string // how it is written, for people
	what string
	open func(spec string, s settings) (netdev.Device, error)
}

// kinds are all that there are; the first is the default.
var kinds = []kind{
	{"tap", "tap:NAME[,queues=N][,bridge=BR][,mtu=BYTES]...", "a tap of the host, made if there is none", openTap},
}

const hostfwdUsage = "forward a port of the host to the guest (--net user), tcp|udp:[ADDRESS]:PORT-[ADDRESS]:PORT; may be repeated"

func kindsUsage() string {
	var forms []string
	for _, k := range kinds {
		forms = append(forms, k.form)
	}
	return strings.Join(forms, " | ")
}

// openDevice opens the device that --net names.
func openDevice(s settings) (netdev.Device, error) {
	name, _, _ := strings.Cut(s.net, ":")
	if before, _, ok := strings.Cut(name, ","); ok {
		name = before
	}
	for _, k := range kinds {
		if k.name == name {
			return k.open(s.net, s)
		}
	}
	var names []string
	for _, k := range kinds {
		names = append(names, k.name)
	}
	return nil, usagef("--net %q: unknown kind %q, known are %s", s.net, name, strings.Join(names, ", "))
}

func openTap(spec string, s settings) (netdev.Device, error) {
	o, err := tap.ParseOptions(spec)
	if err != nil {
		return nil, &usageError{err}
	}
	switch {
	case s.queues == 0 || o.Queues == s.queues:
	case o.Queues != 0 || len(o.FDs) > 0 && len(o.FDs) != s.queues:
		return nil, usagef("--queues %d contradicts --net %q", s.queues, spec)
	default:
		o.Queues = s.queues
	}
	if o.MTU == 0 && len(o.FDs) == 0 && o.Macvtap == "" {
		o.MTU = s.mtu
	}
	return tap.Open(o)
}
