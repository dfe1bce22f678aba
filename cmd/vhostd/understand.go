package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/config"
)

// understood is a configuration in which nothing is wrong that can be told without doing it.
type understood struct {
	config.Config
	settled map[string]settled // by port
}

// settled is a port that is ready to be opened.
type settled struct {
	settings
	open opener
}

// understand reads a file. What is wrong in it is one error, with a line for each.
func understand(path string) (*understood, error) {
	file, err := config.Load(path)
	if err != nil {
		return nil, err
	}
	u := &understood{Config: file.Config, settled: map[string]settled{}}
	for name, p := range u.Ports {
		s := portSettings(p)
		blame(file, "port."+name, s.parse())
		if s.net != "" {
			open, err := parseDevice(&s)
			blame(file, "port."+name, err)
			u.settled[name] = settled{s, open}
		}
	}
	if err := file.Err(); err != nil {
		return nil, fmt.Errorf("the configuration is refused:\n%w", err)
	}
	return u, nil
}

// portSettings are a port's settings, as yet without those that have to be parsed.
func portSettings(p config.Port) settings {
	s := settings{flags: flags{
		socketPath: p.SocketPath, client: p.Client, socketMode: p.SocketMode, socketGroup: p.SocketGroup, fd: -1,
		net: p.Net, hostfwd: p.Hostfwd, mac: p.MAC, mtu: p.MTU, queues: p.Queues, poll: p.Poll,
		zerocopy: p.ZeroCopy, noBalloon: p.NoBalloon, disable: strings.Join(p.Disable, ","), logLevel: "info",
	}}
	if s.poll == config.PollDefault {
		s.poll = backend.DefaultPoll
	}
	return s
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
