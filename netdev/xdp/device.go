package xdp

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/offload"
)

// tagged is what an Ethernet frame with a VLAN tag has beside its packet, in bytes.
const tagged = 14 + 4

// Device is an interface of the host's. It implements netdev.Device and netdev.Registrar.
type Device struct {
	opts    Options
	ifindex int
	mtu     int
	frame   int // bytes of the longest frame
	ns      namespace
	promisc int // packet socket that keeps the interface promiscuous, or -1
	prog    *program
	way     way
	ports   []*port
	pairs   []*pair
	wanted  atomic.Bool // ports without a binding are to have one

	mu      sync.Mutex
	regions [][]byte // the guest's memory, as far as it is registered
	closed  bool
}

var (
	_ netdev.Device    = (*Device)(nil)
	_ netdev.Registrar = (*Device)(nil)
)

// Open attaches to the interface that o names, in the network namespace of the calling thread. An XDP program is on the interface from then until Close,
// or the end of the process.
func Open(o Options) (*Device, error) {
	if o.Drain == 0 {
		o.Drain = DefaultDrain
	}
	if err := o.check(); err != nil {
		return nil, fmt.Errorf("xdp: %w", err)
	}
	d := &Device{opts: o, promisc: -1}
	if err := d.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", d, err), d.Close())
	}
	d.wanted.Store(true)
	return d, nil
}

func (d *Device) open() (err error) {
	if d.ns, err = thisNamespace(); err != nil {
		return err
	}
	queues, err := d.findInterface()
	if err != nil {
		return err
	}
	if !d.opts.NoPromisc {
		if d.promisc, err = promiscuous(d.ifindex); err != nil {
			return fmt.Errorf("promiscuous mode: %w (promisc=off does without, if the guest has the interface's own address)", err)
		}
	}
	if d.prog, err = newProgram(d.ifindex, d.opts.Mode, d.opts.Queue, queues, d.frame); err != nil {
		return fmt.Errorf("%w%s", err, explainProgram(err))
	}
	first := max(d.opts.Queue, 0)
	if d.opts.Queue != AllQueues {
		queues = first + 1
	}
	for i := first; i < queues; i++ {
		q, err := newPair()
		if err != nil {
			return err
		}
		d.pairs = append(d.pairs, q)
		p := newPort(d, i, q)
		q.port, q.ports = p, []*port{p}
		d.ports = append(d.ports, p)
	}
	return d.bind()
}

// bind opens all ports in the best way that the first one can be.
func (d *Device) bind() error {
	features := askFeatures(d.ifindex)
	var errs []error
	for _, w := range ways(d.opts.Mode, d.prog.native, features) {
		err := d.ports[0].start(w)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		d.way = w
		for _, p := range d.ports[1:] {
			if err := p.start(w); err != nil {
				return err
			}
		}
		return nil
	}
	if len(errs) == 0 {
		return fmt.Errorf("mode=%s: the driver has no zero-copy AF_XDP", d.opts.Mode)
	}
	return errors.Join(errs...)
}

// String is the device as it is called in errors.
func (d *Device) String() string { return "xdp " + d.opts.Name }

// Capabilities: see netdev.Device. What does not change with the guest's memory is said of transmission.
func (d *Device) Capabilities() netdev.Capabilities {
	c := netdev.Capabilities{Kind: "xdp", Name: d.opts.Name, MaxPairs: len(d.pairs), MTU: d.mtu, ZeroCopy: d.zerocopy()}
	if d.way.meta {
		c.FromGuest = offload.Csum
	}
	return c
}

// zerocopy says how far frames leave without a copy.
func (d *Device) zerocopy() string {
	switch {
	case d.opts.ZeroCopy == netdev.Off:
		return "never: switched off"
	case !d.opts.NoBalloon:
		return "never: guest memory is not registered without the promise that the VM has no balloon"
	case d.way.zerocopy():
		return "all frames but those in more pieces than the driver takes"
	}
	return "no copy by vhostd, one by the kernel: the driver has no zero-copy AF_XDP"
}

// Stats are what a Device counts beside netdev.Counters.
type Stats struct {
	InPlace uint64 // frames that the kernel wrote into the guest's buffers itself
	Unruly  uint64 // times that lending ended because the kernel did not keep the order
	Sockets uint64 // that were opened, one for each queue of the interface and change of memory
	TooLong uint64 // frames that the XDP program dropped because they are longer than the MTU allows
}

// Stats reads the counters; safe from any goroutine.
func (d *Device) Stats() Stats {
	s := Stats{TooLong: d.prog.dropped()}
	for _, p := range d.ports {
		s.InPlace += p.landed.Load()
		s.Unruly += p.unruly.Load()
		s.Sockets += p.opened.Load()
	}
	return s
}

// Queue implements netdev.Device.
func (d *Device) Queue(i int) netdev.Queue { return d.pairs[i] }

// SetOffloads implements netdev.Device: no frame that is received needs any.
func (d *Device) SetOffloads(offload.Set) error { return nil }

// SetPairs implements netdev.Device: the first n pairs share the interface's queues.
func (d *Device) SetPairs(n int) error {
	if n < 0 || n > len(d.pairs) {
		return fmt.Errorf("%s: %d queue pairs, has %d", d, n, len(d.pairs))
	}
	for _, q := range d.pairs {
		q.ports = nil
	}
	var errs []error
	for i, p := range d.ports {
		errs = append(errs, p.move(d.pairs[i%max(n, 1)]))
	}
	return errors.Join(append(errs, d.eachPort((*port).suit))...)
}

// memory is what is registered of the guest's, as far as it can be.
func (d *Device) memory() [][]byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.regions
}

func (d *Device) setMemory(regions [][]byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.regions = regions
}

// SetMemory implements netdev.Registrar: every port gets a new socket, over the new memory.
func (d *Device) SetMemory(regions [][]byte) error {
	if !d.opts.registers() || len(regions) == 0 && d.memory() == nil {
		return nil
	}
	d.setMemory(regions)
	err := d.eachPort(func(p *port) error { return p.replace(regions) })
	if err == nil || len(regions) == 0 {
		return err
	}
	d.setMemory(nil)
	return errors.Join(err, d.eachPort(func(p *port) error { return p.replace(nil) }))
}

// eachPort runs f for all ports at the same time: most of it is waiting.
func (d *Device) eachPort(f func(p *port) error) error {
	errs := make([]error, len(d.ports))
	var wg sync.WaitGroup
	for i, p := range d.ports {
		wg.Go(func() { errs[i] = f(p) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Close implements netdev.Device: sockets, program and promiscuous mode are gone when it returns. It waits for frames in flight for a while; a kernel that does
// not report them has forgotten them when their socket is closed.
func (d *Device) Close() error {
	d.mu.Lock()
	done := d.closed
	d.closed = true
	d.mu.Unlock()
	if done {
		return nil
	}
	d.wanted.Store(false)
	deadline := time.Now().Add(d.opts.Drain)
	errs := []error{d.eachPort(func(p *port) error { return p.close(deadline) })}
	if d.prog != nil {
		errs = append(errs, d.prog.close())
	}
	for _, q := range d.pairs {
		errs = append(errs, q.close())
	}
	if d.promisc >= 0 {
		errs = append(errs, unix.Close(d.promisc))
	}
	return errors.Join(append(errs, d.ns.close())...)
}
