package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/config"
	"github.com/vhostd/vhostd/internal/confine"
	"github.com/vhostd/vhostd/netdev/l2switch"
)

// understood is a configuration in which nothing is wrong that can be told without doing it.
type understood struct {
	config.Config
	ports, uplinks map[string]settled
	become         *confine.User // nil: nobody else
}

// settled is a port or an uplink that is ready to be opened.
type settled struct {
	settings
	open  opener              // nil: a port of a switch
	rules l2switch.PortConfig // of one
}

// understand reads a file. What is wrong in it is one error, with a line for each.
func understand(path string) (*understood, error) {
	file, err := config.Load(path)
	if err != nil {
		return nil, err
	}
	u := &understood{Config: file.Config, ports: map[string]settled{}, uplinks: map[string]settled{}}
	u.sandbox(file)
	for name, p := range u.Ports {
		u.ports[name] = u.settle(file, "port."+name, portSettings(p))
	}
	for name, up := range u.Uplinks {
		u.uplinks[name] = u.settle(file, "uplink."+name, uplinkSettings(up))
	}
	if err := file.Err(); err != nil {
		return nil, fmt.Errorf("the configuration is refused:\n%w", err)
	}
	for name, s := range u.ports {
		if p := u.Ports[name]; p.Switch != "" {
			s.rules = portRules(name, s.queues, s.mtu, p.Rules)
			u.ports[name] = s
		}
	}
	for name, s := range u.uplinks {
		s.rules = portRules(name, 0, u.Uplinks[name].MTU, u.Uplinks[name].Rules)
		u.uplinks[name] = s
	}
	return u, nil
}

// sandbox understands that table.
func (u *understood) sandbox(file *config.File) {
	for i, k := range u.Sandbox.Keep {
		if !slices.ContainsFunc(kinds, func(have kind) bool { return have.name == k }) {
			file.Blame("sandbox.keep", fmt.Errorf("element %d: unknown kind %q, known are %s", i+1, k, kindNames()))
		}
	}
	if u.Sandbox.User == "" {
		return
	}
	if !u.Sandbox.Enabled {
		file.Blame("sandbox.user", errors.New("is part of the sandbox, which is not enabled: start vhostd as that user"))
	}
	var err error
	if u.become, err = confine.LookupUser(u.Sandbox.User); err != nil {
		file.Blame("sandbox.user", err)
	}
}

// settle understands what can be understood of a port by itself.
func (u *understood) settle(file *config.File, path string, s settings) settled {
	blame(file, path, s.parse())
	s.become = u.become
	if s.net == "" {
		return settled{settings: s}
	}
	open, err := parseDevice(&s)
	blame(file, path, err)
	return settled{settings: s, open: open}
}

// portSettings are a port's settings, as yet without those that have to be parsed.
func portSettings(p config.Port) settings {
	s := settings{flags: flags{
		socketPath: p.SocketPath, client: p.Client, socketMode: p.SocketMode, socketGroup: p.SocketGroup, fd: -1,
		socketOwner: p.SocketOwner, allowUID: p.AllowUID, allowGID: p.AllowGID,
		net: p.Net, hostfwd: p.Hostfwd, mac: p.MAC, mtu: p.MTU, queues: p.Queues, poll: p.Poll,
		zerocopy: p.ZeroCopy, noBalloon: p.NoBalloon, disable: strings.Join(p.Disable, ","), logLevel: "info",
	}}
	if s.poll == config.PollDefault {
		s.poll = backend.DefaultPoll
	}
	return s
}

// uplinkSettings are the part of settings that is about a network.
func uplinkSettings(u config.Uplink) settings {
	return settings{flags: flags{net: u.Net, mtu: u.MTU, queues: u.Queues, zerocopy: u.ZeroCopy, noBalloon: u.NoBalloon, fd: -1, logLevel: "info"}}
}

// blame takes note of faults, or several that were joined.
func blame(file *config.File, path string, err error) {
	if err == nil {
		return
	}
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		for _, err := range many.Unwrap() {
			blame(file, path, err)
		}
		return
	}
	var f *fault
	if !errors.As(err, &f) {
		panic("bug: no fault: " + err.Error())
	}
	file.Blame(path+"."+f.option, f.err)
}
