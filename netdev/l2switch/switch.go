package l2switch

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vhostd/vhostd/netdev"
)

// Switch joins ports; see the package comment. Its methods are safe from any goroutine.
type Switch struct {
	cfg     Config
	backlog int // slots of a lane
	table   *table
	clock   func() time.Duration // since some time; never back
	view    atomic.Pointer[view]
	sweep   sweeper

	mu     sync.Mutex // the control side: who makes the next view
	closed bool
}

// view is the ports as the data path sees them. It is not changed once it is published.
type view struct {
	ports  []*Port          // by index; nil where none is
	owners map[uint64]*Port // who alone may have an address
}

// named finds a port.
func (v *view) named(name string) *Port {
	for _, p := range v.ports {
		if p != nil && p.name == name {
			return p
		}
	}
	return nil
}

// has tells whether p is one of the ports: it may have left, and another have its index.
func (v *view) has(p *Port) bool { return p.index < len(v.ports) && v.ports[p.index] == p }

// mayHave tells whether a station may be behind p: its VLAN is the port's, and its address no other port's own.
func (v *view) mayHave(p *Port, key uint64) bool {
	o := v.owners[key&macMask]
	return v.has(p) && (o == nil || o == p) && p.rules.Load().carries(uint16(key>>48))
}

// New returns a Switch without ports.
func New(c Config) (*Switch, error) {
	c, err := c.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("switch %q: %w", c.Name, err)
	}
	start := time.Now()
	s := &Switch{cfg: c, clock: func() time.Duration { return time.Since(start) }}
	s.backlog = 1 << bits.Len(uint(c.Backlog-1))
	s.table = newTable(c.MaxAddresses, uint32(c.Ageing/time.Second))
	s.view.Store(&view{})
	s.sweep.init(s)
	return s, nil
}

// stamp is a time in the table's seconds, which begin at 1.
func stamp(now time.Duration) uint32 { return 1 + uint32(now/time.Second) }

// errClosed refuses what comes after Close.
var errClosed = errors.New("the switch is closed")

// AddPort makes a port for a guest. The Device is the caller's to close, before or after RemovePort; closing it removes the port.
func (s *Switch) AddPort(c PortConfig) (netdev.Device, error) {
	p, err := s.add(c, nil)
	if err != nil {
		return nil, err
	}
	return &device{p}, nil
}

// add makes a port, of a guest's if up is nil.
func (s *Switch) add(c PortConfig, up *uplink) (*Port, error) {
	if up != nil && c.MaxAddresses == 0 {
		c.MaxAddresses = s.cfg.MaxAddresses
	}
	c, err := c.withDefaults(s.cfg)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.view.Load()
	switch {
	case s.closed:
		return nil, errClosed
	case old.named(c.Name) != nil:
		return nil, fmt.Errorf("port %q: the switch has one of that name", c.Name)
	}
	r, err := newRules(c, nil)
	if err != nil {
		return nil, err
	}
	i := slices.Index(old.ports, nil)
	if i < 0 {
		i = len(old.ports)
	}
	if i == maxPorts {
		return nil, fmt.Errorf("port %q: a switch has at most %d", c.Name, maxPorts)
	}
	p, err := newPort(s, i, c, r)
	if err != nil {
		return nil, err
	}
	next := &view{ports: slices.Clone(old.ports)}
	if i == len(next.ports) {
		next.ports = append(next.ports, nil)
	}
	if up != nil {
		if err := up.open(p); err != nil {
			p.free()
			return nil, fmt.Errorf("port %q: %w", c.Name, err)
		}
	}
	next.ports[i], p.up = p, up
	if err := s.publish(next); err != nil {
		if up != nil {
			up.free()
		}
		p.free()
		return nil, err
	}
	if up != nil {
		up.start()
	}
	return p, nil
}

// publish makes v the view. The error says that two ports claim one address. The caller holds mu.
func (s *Switch) publish(v *view) error {
	v.owners = map[uint64]*Port{}
	for _, p := range v.ports {
		if p == nil {
			continue
		}
		for mac := range p.rules.Load().macs {
			if o := v.owners[mac]; o != nil {
				return errOwned(p, mac, o)
			}
			v.owners[mac] = p
		}
	}
	s.view.Store(v)
	// What was learned before somebody owned an address is no longer true.
	s.table.forget(s.share, func(key, val uint64) bool {
		o := v.owners[key&macMask]
		return o != nil && o.index != int(val>>32)
	})
	return nil
}

// errOwned says that p claims an address that is o's.
func errOwned(p *Port, mac uint64, o *Port) error {
	return fmt.Errorf("port %q: its address %012x is that of port %q", p.name, mac, o.name)
}

// share is the learned addresses' share of a port, or nil when it has gone.
func (s *Switch) share(port int) *learned {
	if v := s.view.Load(); port < len(v.ports) && v.ports[port] != nil {
		return &v.ports[port].learned
	}
	return nil
}

// ErrNoPort says that there is no port of a name.
var ErrNoPort = errors.New("the switch has no such port")

// Update changes a port while frames flow. Name says which; Pairs cannot change, and is taken as it was when 0.
func (s *Switch) Update(c PortConfig) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.view.Load()
	p := old.named(c.Name)
	if p == nil {
		return fmt.Errorf("port %q: %w", c.Name, ErrNoPort)
	}
	if c.Pairs == 0 {
		c.Pairs = len(p.queues)
	}
	if p.up != nil && c.MaxAddresses == 0 {
		c.MaxAddresses = s.cfg.MaxAddresses
	}
	if p.up != nil && c.MTU == 0 {
		c.MTU = p.up.dev.Capabilities().MTU
	}
	c, err := c.withDefaults(s.cfg)
	if err != nil {
		return err
	}
	before := p.rules.Load()
	switch {
	case c.Pairs != len(p.queues):
		return fmt.Errorf("port %q: %d queue pairs, was made with %d", c.Name, c.Pairs, len(p.queues))
	case c.MTU != before.cfg.MTU && p.up == nil:
		return fmt.Errorf("port %q: MTU %d, the guest was told %d", c.Name, c.MTU, before.cfg.MTU)
	}
	r, err := newRules(c, before)
	if err != nil {
		return err
	}
	// Before frames are judged by the new rules: what was learned in a VLAN that is refused would stay.
	for mac := range r.macs {
		if o := old.owners[mac]; o != nil && o != p {
			return errOwned(p, mac, o)
		}
	}
	p.rules.Store(r)
	if err := s.publish(&view{ports: old.ports}); err != nil {
		panic("bug: " + err.Error())
	}
	// Its addresses may be of VLANs that it is not in any more.
	s.table.forget(s.share, func(key, val uint64) bool { return int(val>>32) == p.index && !r.carries(uint16(key>>48)) })
	return nil
}

// RemovePort takes a port away: frames for it are dropped from now on, as is what its Device is still asked to send. An uplink's device is closed.
func (s *Switch) RemovePort(name string) error {
	s.mu.Lock()
	p := s.view.Load().named(name)
	if p != nil {
		s.remove(p)
	}
	s.mu.Unlock()
	if p == nil {
		return fmt.Errorf("port %q: %w", name, ErrNoPort)
	}
	return p.end()
}

// remove takes p out of the view. The caller holds mu.
func (s *Switch) remove(p *Port) {
	old := s.view.Load()
	if !old.has(p) {
		return
	}
	next := &view{ports: slices.Clone(old.ports)}
	next.ports[p.index] = nil
	if err := s.publish(next); err != nil {
		panic("bug: " + err.Error()) // fewer ports claim fewer addresses
	}
	s.table.forget(s.share, func(_, val uint64) bool { return int(val>>32) == p.index })
}

// Close removes all ports, closes the uplinks, and lets nobody in any more. Guests' Devices are their holders' to close.
func (s *Switch) Close() error {
	s.mu.Lock()
	s.closed = true
	ports := s.view.Load().ports
	for _, p := range ports {
		if p != nil {
			s.remove(p)
		}
	}
	s.mu.Unlock()
	var errs []error
	for _, p := range ports {
		if p != nil {
			errs = append(errs, p.end())
		}
	}
	s.sweep.stop()
	return errors.Join(errs...)
}
