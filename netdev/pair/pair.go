// Package pair is two devices back to back in one process: what one takes in Send comes out of the other's Recv. Or it is one device that is
// its own other side (NewLoop), and returns what it gets.
//
// # Theory of operation
//
// There is one link per direction and queue pair, a bounded ring of slots:
//
//	a.Queue(0).Send --> [slot][slot][slot][slot] --> b.Queue(0).Recv --> b's guest
//	                      ^ tail          ^ head
//
// Nothing is lost: Send takes less when the ring is full, and Recv leaves a frame in it when the guest has posted too little. Frames travel with
// their virtio-net header; what the receiving guest's driver does not take of it, Posted.Write lowers. Frames of queue pairs that the
// other side does not use (SetPairs) come out of those that it does.
//
// Send copies a frame into its slot and is done with the pages, so neither guest can hold the other's. With Options.Hold it keeps the
// pages instead, as a network card's DMA does, and releases them when the other side has received the frame: they cannot be orphaned in
// the meantime. This is for tests of what happens to a guest while its pages are in flight. Device.Held and Device.Release let a test decide
// how long that takes.
package pair

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/zerocopy"
)

// Options are those of both devices. The zero Options are one queue pair of 256 slots that copies.
type Options struct {
	Pairs int         // queue pairs; 0 means 1
	Slots int         // frames that wait in each direction of a queue pair; 0 means 256
	MTU   int         // in bytes, as in netdev.Capabilities
	Lacks offload.Set // offloads that Send does not take
	Hold  bool        // keep the sender's pages until the frame was received
}

// Device is one end.
type Device struct {
	o      Options
	name   string
	out    []*link // to the peer, by queue pair
	in     []*link
	queues []queue
	pairs  atomic.Int32 // in use; 0 before SetPairs
	peer   *Device

	closing sync.Once
}

// New makes the two ends.
func New(o Options) (a, b *Device, err error) {
	a, b = &Device{name: "a"}, &Device{name: "b"}
	a.peer, b.peer = b, a
	if err := connect(o, a, b); err != nil {
		return nil, nil, err
	}
	return a, b, nil
}

// NewLoop makes a device whose other side is itself: a queue pair's Recv returns what its Send took, in order.
func NewLoop(o Options) (*Device, error) {
	d := &Device{name: "loop"}
	d.peer = d
	if err := connect(o, d); err != nil {
		return nil, err
	}
	return d, nil
}

// connect makes the links from each of ends to its peer, and the queues.
func connect(o Options, ends ...*Device) error {
	if o.Pairs < 0 || o.Slots < 0 {
		return fmt.Errorf("%d queue pairs of %d slots", o.Pairs, o.Slots)
	}
	if o.Pairs == 0 {
		o.Pairs = 1
	}
	if o.Slots == 0 {
		o.Slots = 256
	}
	for _, d := range ends {
		d.o = o
		d.queues = make([]queue, o.Pairs)
		for i := range d.queues {
			d.queues[i] = queue{d: d, index: i}
		}
	}
	for range o.Pairs {
		for _, d := range ends {
			l, err := newLink(o)
			if err != nil {
				for _, end := range ends {
					_ = end.Close()
				}
				return err
			}
			d.out = append(d.out, l)
			d.peer.in = append(d.peer.in, l)
		}
	}
	return nil
}

// Capabilities implements netdev.Device.
func (d *Device) Capabilities() netdev.Capabilities {
	c := netdev.Capabilities{
		Kind: "pair", Name: d.name, MaxPairs: d.o.Pairs, MTU: d.o.MTU,
		FromGuest: offload.All &^ d.o.Lacks, ToGuest: offload.All, ZeroCopy: "never",
	}
	if d.o.Hold {
		c.ZeroCopy = "always: frames are copied once, from the sender's pages to the receiver's"
	}
	return c
}

// SetOffloads implements netdev.Device. Posted.Write does all that is needed.
func (d *Device) SetOffloads(offload.Set) error { return nil }

// SetPairs implements netdev.Device.
func (d *Device) SetPairs(n int) error {
	if n < 0 || n > d.o.Pairs {
		return fmt.Errorf("%d queue pairs in use, of %d", n, d.o.Pairs)
	}
	d.pairs.Store(int32(n))
	return nil
}

// Queue implements netdev.Device.
func (d *Device) Queue(i int) netdev.Queue { return &d.queues[i] }

// Held is the number of frames that d took, and whose pages it has not released. It is safe from any goroutine.
func (d *Device) Held() (n int) {
	for _, l := range d.out {
		n += l.held()
	}
	return n
}

// Release lets go of the pages of the n frames that were sent first, of each queue pair, as if they had gone out on a wire: released as
// ZeroCopied, and not received by anybody. It returns how many there were, and is safe from any goroutine.
func (d *Device) Release(n int) (released int) {
	for _, l := range d.out {
		released += l.discard(n, zerocopy.ZeroCopied)
	}
	return released
}

// Close implements netdev.Device: frames that were not received yet are gone. The peer goes on; what it sends is dropped.
func (d *Device) Close() error {
	d.closing.Do(func() {
		for _, l := range d.out {
			l.discard(len(l.slots), zerocopy.Dropped)
			l.close()
		}
		for _, l := range d.in {
			l.cut()
			l.close()
		}
	})
	return nil
}
