package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/vhostd/vhostd/internal/config"
	"github.com/vhostd/vhostd/internal/confine"
	"github.com/vhostd/vhostd/internal/sys"
)

// confine takes from this process what the configuration does not need, now and when it is read again; what goes beyond that needs a restart from then on.
func (f *fleet) confine(u *understood) error {
	if !u.Sandbox.Enabled {
		f.log.Warn("not confined: whoever finds a fault in vhostd has all that this user has")
		return nil
	}
	n := u.needs()
	n.User = u.become
	n.Add(f.ownNeeds(u))
	r, err := confine.Apply(n)
	if err != nil {
		return err
	}
	f.kept = &n
	logConfined(f.log, r)
	return nil
}

// ownNeeds are those of everything around the ports: the file, the control socket, metrics, the service manager.
func (f *fleet) ownNeeds(u *understood) confine.Needs {
	n := confine.Needs{Use: confine.Open, Read: []string{f.path, "/etc/passwd", "/etc/group"}}
	// A file is mostly replaced by another one of the same name, for which a rule for the file does not count.
	if dir := filepath.Dir(f.path); dir != "/etc" {
		n.Read = append(n.Read, dir)
	} else {
		f.log.Warn("a configuration that is replaced cannot be read again: put it into a directory of its own", "config", f.path)
	}
	if u.Control.Socket != config.ControlNone {
		n.Remove = append(n.Remove, filepath.Dir(u.Control.Socket))
	}
	if manager := os.Getenv("NOTIFY_SOCKET"); manager != "" {
		n.Use |= confine.Unix
		n.Connect = append(n.Connect, manager)
	}
	if u.Metrics.Listen != "" {
		n.Use |= confine.Metrics
	}
	if u.Metrics.Profiles {
		n.Use |= confine.Profile
	}
	return n
}

// needs are those of opening and running all of the file's ports and uplinks.
func (u *understood) needs() (n confine.Needs) {
	for _, s := range u.ports {
		n.Add(s.needs())
	}
	for _, s := range u.uplinks {
		n.Add(s.needs())
	}
	if dir := filepath.Dir(u.Defaults.SocketPath); u.Defaults.SocketPath != "" && !strings.Contains(dir, "{") {
		n.Make = append(n.Make, dir)
	}
	for _, kind := range u.Sandbox.Keep {
		s := settled{settings: settings{flags: flags{net: kind}, become: u.become}}
		n.Add(s.needs())
	}
	return n
}

// needs are those of opening and running a port or an uplink.
func (s *settled) needs() (n confine.Needs) {
	switch {
	case s.socketPath == "":
	case s.client:
		n.Use, n.Connect = confine.Unix, []string{s.socketPath}
	default:
		n.Make = []string{filepath.Dir(s.socketPath)}
		if s.owner >= 0 || s.group >= 0 {
			n.Caps = confine.CapChown
		}
	}
	switch kind, _, _ := strings.Cut(strings.ReplaceAll(s.net, ",", ":"), ":"); kind {
	case "user":
		n.Add(confine.Needs{Use: confine.Inet, Read: nameFiles(s.become)})
	case "tap":
		n.Add(confine.Needs{Use: confine.Ring | confine.NewRing, Caps: confine.CapNetAdmin, Devices: []string{sys.TunPath}})
		if _, dev, ok := strings.Cut(s.net, "macvtap=/"); ok {
			dev, _, _ = strings.Cut(dev, ",")
			n.Devices = append(n.Devices, "/"+dev)
		}
	case "packet":
		n.Add(confine.Needs{Use: confine.Packet, Caps: confine.CapNetRaw | confine.CapNetAdmin})
	case "xdp":
		n.Add(confine.Needs{Use: confine.XDP, Caps: confine.CapNetRaw | confine.CapNetAdmin | confine.CapBPF | confine.CapIPCLock})
	case "vxlan", "geneve", "dgram":
		n.Add(confine.Needs{Use: confine.Ring | confine.NewRing | confine.Inet, Caps: confine.CapIPCLock})
	}
	return n
}

// lacks tells why a port or an uplink cannot be opened by a process that is confined; nil: it can.
func (f *fleet) lacks(s settled) error {
	if f.kept == nil {
		return nil
	}
	if strings.HasPrefix(s.net, "xdp") {
		return errors.New("needs a restart: xdp reads what a process that is confined cannot")
	}
	if lacks := f.kept.Covers(s.needs()); len(lacks) > 0 {
		return fmt.Errorf("needs a restart: vhostd was confined to what it had at its start, and has no more %s ([sandbox] keep = [ kinds of networks ] keeps it)",
			strings.Join(lacks, ", "))
	}
	return nil
}

// cannotOwn adds to an error of ownSocket why root cannot do what only root can.
func (f *fleet) cannotOwn(err error, s settled) error {
	root := os.Geteuid() == 0 || s.become != nil
	if f.kept == nil || f.kept.Caps&confine.CapChown != 0 || !root || !errors.Is(err, os.ErrPermission) {
		return err
	}
	return fmt.Errorf("needs a restart: vhostd was confined to what it had at its start, and has no more %v: %w", confine.CapChown, err)
}

// refuse fails the steps that would need more than was kept, before anything is closed for them.
func (f *fleet) refuse(r *reloadReport, u *understood) {
	for s := range r.steps(config.Reopen, config.Add) {
		set := u.ports
		switch s.Kind {
		case config.KindSwitch:
			continue
		case config.KindUplink:
			set = u.uplinks
		}
		if err := f.lacks(set[s.Name]); err != nil {
			stands := "it is closed"
			if s.Action == config.Reopen {
				stands = "it goes on as before"
			}
			s.fail(err, stands)
		}
	}
}
