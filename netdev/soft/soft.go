// Package soft makes a device that takes every offload of one that does not.
//
// # Theory of operation
//
// Send hands what the inner device takes over untouched. Other frames are cut into segments, or have their checksum completed, by
// offload.Segmenter. What comes of a frame are child buffers: headers in private memory, payload still in the guest's pages:
//
//	parent   [ headers | payload ............ ]      guest pages, released when the last child is
//	               |         |         |
//	child 1  [headers']--[payload]     |
//	child 2  [headers']------------[payload]
//
// Each child holds a reference of its parent. So the parent's pages stay for as long as the inner device has one of the children, and what it
// reports of them is what the parent's owner is told.
//
// A frame counts as taken once it is begun. If the inner device has no more room, its children wait here (netdev.Holder); they go
// before anything else, at the next Send or Reap. No more than batchSize of them are made ahead, so a guest that asks for thousands of
// segments gets them one batch at a time. Children are reused: nothing is allocated once there are as many as are in flight at most.
package soft

import (
	"errors"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/offload"
)

// Wrap returns a device that takes all of offload.All from the guest and is dev otherwise: dev itself when it does already. Closing it
// closes dev.
func Wrap(dev netdev.Device) netdev.Device {
	caps := dev.Capabilities()
	if caps.FromGuest.Has(offload.All) {
		return dev
	}
	d := &device{Device: dev, queues: make([]queue, caps.MaxPairs)}
	for i := range d.queues {
		d.queues[i].Queue = dev.Queue(i)
		d.queues[i].takes = caps.FromGuest
		d.queues[i].pool = &pool{}
	}
	return d
}

// device does in software what the Device within does not.
type device struct {
	netdev.Device
	queues []queue
}

// Capabilities are the inner device's, and all offloads.
func (d *device) Capabilities() netdev.Capabilities {
	caps := d.Device.Capabilities()
	caps.FromGuest = offload.All
	caps.IgnoresHeader = false
	return caps
}

// Queue implements netdev.Device.
func (d *device) Queue(i int) netdev.Queue { return &d.queues[i] }

// SetMemory implements netdev.Registrar for an inner device that does.
func (d *device) SetMemory(regions [][]byte) error {
	if r, ok := d.Device.(netdev.Registrar); ok {
		return r.SetMemory(regions)
	}
	return nil
}

// Close drops what waits for room, and closes the inner device.
func (d *device) Close() error {
	for i := range d.queues {
		d.queues[i].drop()
	}
	err := d.Device.Close()
	for i := range d.queues {
		if out := d.queues[i].pool.out(); out > 0 {
			err = errors.Join(err, &heldError{queue: i, children: out})
		}
	}
	return err
}
