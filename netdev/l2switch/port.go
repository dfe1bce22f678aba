package l2switch

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/offload"
)

// Port is one port of a Switch: a guest's, or an uplink.
type Port struct {
	sw      *Switch
	index   int
	name    string
	rules   atomic.Pointer[rules]
	queues  []queue
	pairs   atomic.Int32 // in use, at least 1
	learned learned
	flooded atomic.Uint64
	drops   [NumReasons]atomic.Uint64
	up      *uplink // nil: a guest's
	ended   sync.Once
}

func newPort(s *Switch, index int, c PortConfig, r *rules) (*Port, error) {
	p := &Port{sw: s, index: index, name: c.Name, queues: make([]queue, c.Pairs)}
	p.rules.Store(r)
	p.pairs.Store(1)
	for i := range p.queues {
		q := &p.queues[i]
		q.port, q.index = p, i
		if err := q.lane.init(s, i); err != nil {
			p.free()
			return nil, fmt.Errorf("port %q: %w", c.Name, err)
		}
	}
	return p, nil
}

// free closes the descriptors.
func (p *Port) free() {
	for i := range p.queues {
		p.queues[i].lane.free()
	}
}

// end drops what waits for the port, and what comes from now on.
func (p *Port) end() (err error) {
	p.ended.Do(func() {
		for i := range p.queues {
			p.queues[i].lane.shut.Store(true)
			p.drop(DropNoReceiver, p.queues[i].lane.discard())
		}
		if p.up != nil {
			err = p.up.close()
			p.free()
		}
	})
	return err
}

// drop counts n frames.
func (p *Port) drop(why Reason, n int) {
	if n > 0 {
		p.drops[why].Add(uint64(n))
	}
}

// lane is the one that frames of a sender's queue take to this port: always the same one, so that flows keep their order, and another for each of
// several senders.
func (p *Port) lane(from *queue) *lane {
	n := uint32(p.pairs.Load())
	if n == 1 {
		return &p.queues[0].lane
	}
	return &p.queues[uint32(from.index+from.port.index)%n].lane
}

// device is a guest's port as a netdev.
type device struct{ p *Port }

// Capabilities implements netdev.Device.
func (d *device) Capabilities() netdev.Capabilities {
	return netdev.Capabilities{
		Kind: "switch", Name: d.p.name, MaxPairs: len(d.p.queues), MTU: d.p.rules.Load().cfg.MTU,
		FromGuest: offload.All, ToGuest: offload.All,
		ZeroCopy: "to other guests: a frame is copied once, from the sender's pages into the receiver's buffers",
	}
}

// SetOffloads implements netdev.Device. Posted.Write does all that is needed.
func (d *device) SetOffloads(offload.Set) error { return nil }

// SetPairs implements netdev.Device.
func (d *device) SetPairs(n int) error {
	if n < 0 || n > len(d.p.queues) {
		return fmt.Errorf("%d queue pairs in use, of %d", n, len(d.p.queues))
	}
	d.p.pairs.Store(int32(max(n, 1)))
	return nil
}

// Queue implements netdev.Device.
func (d *device) Queue(i int) netdev.Queue { return &d.p.queues[i] }

// Close implements netdev.Device: the port leaves its switch. What others still have of its pages is copied.
func (d *device) Close() error {
	s := d.p.sw
	s.mu.Lock()
	s.remove(d.p)
	s.mu.Unlock()
	err := d.p.end()
	for i := range d.p.queues {
		d.p.queues[i].Orphan()
	}
	d.p.free()
	return err
}
