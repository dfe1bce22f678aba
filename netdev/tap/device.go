package tap

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/offload"
)

// Device is a tap or macvtap interface. It implements netdev.Device.
type Device struct {
	name      string
	macvtap   bool
	multi     bool // queues can be detached
	inherited bool
	mtu       int
	queues    []*queue
	toGuest   offload.Set // that the kernel can be told to deliver
	fromGuest offload.Set
}

var _ netdev.Device = (*Device)(nil)

// String is the device as it is called in errors.
func (d *Device) String() string {
	if d.macvtap {
		return "macvtap " + d.name
	}
	return "tap " + d.name
}

// Capabilities: see netdev.Device. Name is the interface, MTU is its MTU when it was opened.
func (d *Device) Capabilities() netdev.Capabilities {
	return netdev.Capabilities{
		Kind: "tap", Name: d.name, MaxPairs: len(d.queues), MTU: d.mtu,
		FromGuest: d.fromGuest, ToGuest: d.toGuest, ZeroCopy: "never",
	}
}

// Queue returns queue pair i.
func (d *Device) Queue(i int) netdev.Queue { return d.queues[i] }

// SetPairs detaches the queues from n on, and attaches those before. Queue 0 is always attached: frames that come while no pair is in
// use wait there, as many as the interface's txqueuelen, and the kernel drops the others.
func (d *Device) SetPairs(n int) error {
	if n < 0 || n > len(d.queues) {
		return fmt.Errorf("%s: %d queue pairs, has %d", d, n, len(d.queues))
	}
	if !d.multi {
		return nil
	}
	for i := len(d.queues) - 1; i >= max(n, 1); i-- {
		if err := d.attach(i, false); err != nil {
			return err
		}
	}
	for i := range max(n, 1) {
		if err := d.attach(i, true); err != nil {
			return err
		}
	}
	return nil
}

func (d *Device) attach(i int, on bool) error {
	q := d.queues[i]
	if q.detached != on {
		return nil
	}
	if err := sys.TunSetQueue(q.fd, on); err != nil {
		verb := "detaching"
		if on {
			verb = "attaching"
		}
		return fmt.Errorf("%s: %s queue %d: %w", d, verb, i, err)
	}
	q.detached = !on
	return nil
}

// mark hands down to the queues what they need to know of the device.
func (d *Device) mark() {
	for _, q := range d.queues {
		q.recv.macvtap = d.macvtap
	}
}

// Close closes the descriptors: a tap that vhostd made goes away, unless it was made to persist.
func (d *Device) Close() error {
	var errs []error
	for _, q := range d.queues {
		q.stopBatches() // first: the ring holds the descriptor's file
		if q.fd >= 0 {
			errs = append(errs, unix.Close(q.fd))
			q.fd = -1
		}
	}
	return errors.Join(errs...)
}
