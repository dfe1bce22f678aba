package main

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/vhostd/vhostd/internal/config"
	"github.com/vhostd/vhostd/netdev/l2switch"
)

// switchPart is a switch of a fleet, or why it is not there.
type switchPart struct {
	conf  config.Switch
	sw    *l2switch.Switch
	cause error
}

func (f *fleet) openSwitch(c config.Switch) part {
	sw, err := l2switch.New(l2switch.Config{
		Name: c.Name, MaxAddresses: c.MaxAddresses, Ageing: c.Ageing, MTU: c.MTU, Hold: c.Hold, Backlog: c.Backlog, BacklogBytes: c.BacklogBytes,
		// Threads that wait in the kernel while all are confined are woken for each step, and Go 1.26 may then overlook one that waits again: what stops all of
		// them, as a step does, hangs for up to a minute.
		Start: f.confined, Log: f.log.With("switch", c.Name),
	})
	return &switchPart{c, sw, err}
}

func (p *switchPart) err() error                             { return p.cause }
func (p *switchPart) standsIn(c *config.Config, name string) { c.Switches[name] = p.conf }

func (p *switchPart) stop() error {
	if p.sw == nil {
		return nil
	}
	return p.sw.Close()
}

func (p *switchPart) change(*fleet, *understood, string) error {
	panic("bug: a switch has no keys that can be changed in place")
}

// switchOf finds the switch of a port or an uplink.
func (f *fleet) switchOf(name string) (*l2switch.Switch, error) {
	p, ok := f.part(id{config.KindSwitch, name}).(*switchPart)
	switch {
	case !ok:
		panic("bug: a switch that was checked to be there is not: " + name)
	case p.cause != nil:
		return nil, fmt.Errorf("switch %s is not there: %w", name, p.cause)
	}
	return p.sw, nil
}

// uplinkPart is an uplink of a fleet, or why it is not there.
type uplinkPart struct {
	sw    *l2switch.Switch
	cause error

	mu   sync.Mutex
	conf config.Uplink // as it was opened, or changed since
}

func (f *fleet) openUplink(c config.Uplink, s settled) part {
	p := &uplinkPart{conf: c}
	p.sw, p.cause = f.switchOf(c.Switch)
	if p.cause != nil {
		return p
	}
	dev, err := s.open()
	if err != nil {
		p.cause = err
		return p
	}
	if err := p.sw.Uplink(dev, s.rules); err != nil {
		p.cause = errors.Join(err, closeDevice(dev, f.log))
	}
	return p
}

func (p *uplinkPart) err() error { return p.cause }

func (p *uplinkPart) configured() config.Uplink {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.conf
}

func (p *uplinkPart) standsIn(c *config.Config, name string) { c.Uplinks[name] = p.configured() }

func (p *uplinkPart) stop() error {
	if p.cause != nil {
		return nil
	}
	return p.sw.RemovePort(p.configured().Name)
}

func (p *uplinkPart) change(_ *fleet, u *understood, name string) error {
	if err := p.sw.Update(u.uplinks[name].rules); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conf = u.Uplinks[name]
	return nil
}

// portRules are what a switch holds a port to. The strings in them were checked when the file was read.
func portRules(name string, pairs, mtu int, r config.Rules) l2switch.PortConfig {
	c := l2switch.PortConfig{
		Name: name, Pairs: pairs, MTU: mtu, Isolated: r.Isolated, MaxAddresses: r.MaxAddresses,
		VLAN:      l2switch.VLAN{Access: uint16(r.Access), Native: uint16(r.Native)},
		Guard:     l2switch.Guard{NoDHCPServer: r.NoDHCPServer, NoRouter: r.NoRouter},
		FromGuest: rate(r.FromGuest), ToGuest: rate(r.ToGuest),
		Storm: l2switch.Storm{Broadcast: uint64(r.Broadcast), Multicast: uint64(r.Multicast), UnknownUnicast: uint64(r.Unknown)},
	}
	for _, s := range r.Trunk {
		first, last, err := config.VLANs(s)
		checked(err)
		c.VLAN.Trunk = append(c.VLAN.Trunk, l2switch.VLANRange{First: uint16(first), Last: uint16(last)})
	}
	for _, s := range r.MACs {
		mac, err := config.MAC(s)
		checked(err)
		c.Guard.MACs = append(c.Guard.MACs, mac)
	}
	for _, s := range r.IPs {
		var ip netip.Prefix
		ip, err := config.IP(s)
		checked(err)
		c.Guard.IPs = append(c.Guard.IPs, ip)
	}
	return c
}

func checked(err error) {
	if err != nil {
		panic("bug: a file was accepted that is wrong: " + err.Error())
	}
}

func rate(l config.Limit) l2switch.Limit {
	return l2switch.Limit{Frames: uint64(l.Frames), Bytes: uint64(l.Bytes), BurstFrames: uint64(l.BurstFrames), BurstBytes: uint64(l.BurstBytes)}
}
