package config

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Port is [port.NAME]: the network card of one guest. Fields have the meaning of the options of `vhostd run` that are called as their keys are.
type Port struct {
	Name        string
	SocketPath  string
	Client      bool
	SocketMode  string
	SocketGroup string
	SocketOwner string
	AllowUID    []string
	AllowGID    []string
	Net         string // or
	Switch      string
	Hostfwd     []string
	MAC         string
	MTU         int // bytes; 0: the device's
	Queues      int // pairs; 0: 1, or what Net says
	Poll        time.Duration
	ZeroCopy    string
	NoBalloon   bool
	Disable     []string // features
	Rules                // of a port of a switch
}

// Bounds of numbers.
const (
	minMTU  = 68
	maxMTU  = 65535
	maxPair = 128
)

// defaultPort has a Poll that the reader of the Config replaces: see PollDefault.
var defaultPort = Port{ZeroCopy: "auto", Poll: PollDefault}

// PollDefault stands for the default of `vhostd run`.
const PollDefault time.Duration = -1

var portKeys = append(keys[Port]{
	{name: "socket-path", form: "a path", field: func(p *Port) any { return &p.SocketPath }},
	{name: "client", form: "true or false", field: func(p *Port) any { return &p.Client }},
	{name: "socket-mode", form: `octal permissions like "0660"`, field: func(p *Port) any { return &p.SocketMode }, live: true},
	{name: "socket-group", form: "a group's name or number", field: func(p *Port) any { return &p.SocketGroup }, live: true},
	{name: "socket-owner", form: "a user's name or number", field: func(p *Port) any { return &p.SocketOwner }, live: true},
	{name: "allow-uid", form: "users' names or numbers", field: func(p *Port) any { return &p.AllowUID }},
	{name: "allow-gid", form: "groups' names or numbers", field: func(p *Port) any { return &p.AllowGID }},
	{name: "net", form: "a network as --net has it", field: func(p *Port) any { return &p.Net }},
	{name: "switch", form: "the name of a switch", field: func(p *Port) any { return &p.Switch }},
	{name: "hostfwd", form: "forwards as --hostfwd has them", field: func(p *Port) any { return &p.Hostfwd }},
	{name: "mac", form: "an address like 52:54:00:12:34:56", field: func(p *Port) any { return &p.MAC }},
	{name: "mtu", form: "bytes", field: func(p *Port) any { return &p.MTU }, lo: minMTU, hi: maxMTU},
	{name: "queues", form: "queue pairs", field: func(p *Port) any { return &p.Queues }, lo: 1, hi: maxPair},
	{name: "poll", form: `a duration like "30us"`, field: func(p *Port) any { return &p.Poll }, hi: int64(time.Second)},
	{name: "zerocopy", form: `"auto", "on" or "off"`, field: func(p *Port) any { return &p.ZeroCopy }, check: oneOf("auto", "on", "off")},
	{name: "no-balloon", form: "true or false", field: func(p *Port) any { return &p.NoBalloon }},
	{name: "disable-features", form: "names of features", field: func(p *Port) any { return &p.Disable }},
}, rulesOf(func(p *Port) *Rules { return &p.Rules })...)

// networkKeys belong to ports of a network, and not to those of a switch.
var networkKeys = []string{"hostfwd", "zerocopy", "no-balloon"}

// ruleKeys belong to ports of a switch.
var ruleKeys = rulesOf(func(r *Rules) *Rules { return r }).names()

// placeholder stands for the port's name in paths and networks, so that [defaults] can say where all sockets are.
const placeholder = "{port}"

func (p *Port) expand() {
	for _, s := range []*string{&p.SocketPath, &p.Net} {
		*s = strings.ReplaceAll(*s, placeholder, p.Name)
	}
}

// clone is p with lists of its own.
func (p Port) clone() Port {
	p.AllowUID, p.AllowGID = slices.Clone(p.AllowUID), slices.Clone(p.AllowGID)
	p.Hostfwd, p.Disable, p.Rules = slices.Clone(p.Hostfwd), slices.Clone(p.Disable), p.Rules.clone()
	return p
}

// check looks at what one key does not tell.
func (f *File) check() {
	f.checkUplinks()
	if f.Metrics.Profiles && f.Metrics.Listen == "" && f.lines["metrics.listen"] == 0 {
		f.Blame("metrics.pprof", errors.New("needs listen: the address to serve on"))
	}
	if f.lines["defaults.net"] > 0 && f.lines["defaults.switch"] > 0 {
		f.Blame("defaults.switch", errors.New("is for ports that are at a switch, and net for the others: say one of them"))
	}
	sockets := map[string]string{}
	if f.Control.Socket != ControlNone {
		sockets[f.Control.Socket] = "control.socket"
	}
	for _, name := range slices.Sorted(maps.Keys(f.Ports)) {
		p, path := f.Ports[name], "port."+name
		f.checkNetwork(path, &p)
		if p.SocketPath == "" {
			if !f.says(path, "socket-path") {
				f.Blame(path, errors.New("socket-path is missing: where the VMM is to connect"))
			}
			continue
		}
		if other, ok := sockets[p.SocketPath]; ok {
			f.Blame(path+".socket-path", fmt.Errorf("%s is %s's as well", p.SocketPath, other))
		}
		sockets[p.SocketPath] = path
	}
}

// checkNetwork checks that a port is on a network or at a switch, and has no keys of the other kind. Where [defaults] say one and the port the other, the
// port has the last word.
func (f *File) checkNetwork(path string, p *Port) {
	own := func(key string) bool { return f.lines[path+"."+key] > 0 }
	switch {
	case own("net") && own("switch"):
		f.Blame(path+".switch", errors.New("a port is on a network of its own (net) or at a switch, not both"))
	case !f.says(path, "net") && !f.says(path, "switch"):
		f.Blame(path, errors.New("net or switch is missing: which network the guest is on"))
	case own("net"), f.lines["defaults.switch"] == 0 && !own("switch"):
		f.foreign(path, ruleKeys, "is for ports of a switch, and this one has a network of its own")
		p.Switch, p.Rules = "", Rules{}
	default:
		f.foreign(path, networkKeys, "is for ports with a network of their own, and this one is at a switch")
		p.Net, p.Hostfwd, p.ZeroCopy, p.NoBalloon = "", nil, defaultPort.ZeroCopy, false
		f.checkRules(path, p.Switch, &p.Rules)
	}
	f.Ports[p.Name] = *p
}

// foreign finds keys of a port that mean nothing there.
func (f *File) foreign(path string, keys []string, why string) {
	for _, key := range keys {
		if f.lines[path+"."+key] > 0 {
			f.Blame(path+"."+key, errors.New(why))
		}
	}
}

// says reports whether a port has a key, be it wrong, or gets it from [defaults].
func (f *File) says(path, key string) bool {
	return f.lines[path+"."+key] > 0 || f.lines["defaults."+key] > 0
}
