package packet

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/offload"
)

// Device is an interface of the host behind packet sockets. It implements netdev.Device.
type Device struct {
	opts   Options
	link   sys.Interface
	mtu    int // of the guest, in bytes
	header int // bytes of the virtio-net header in front of frames, or 0
	group  uint16
	uso    bool
	queues []*queue
}

var _ netdev.Device = (*Device)(nil)

// String is the device as it is called in errors.
func (d *Device) String() string { return "packet " + d.opts.Interface }

// Capabilities: see netdev.Device. The name is the interface's when it was opened.
func (d *Device) Capabilities() netdev.Capabilities {
	c := netdev.Capabilities{
		Kind: "packet", Name: d.opts.Interface, MaxPairs: len(d.queues), MTU: d.mtu,
		ZeroCopy: "never: every frame is copied between the guest's pages and the socket's rings",
	}
	if d.header > 0 {
		c.FromGuest = offload.All
		c.ToGuest = offload.All &^ offload.UFO
		if !d.uso {
			c.FromGuest &^= offload.USO4 | offload.USO6
			c.ToGuest &^= offload.USO4 | offload.USO6
		}
	}
	return c
}

// Queue returns queue pair i.
func (d *Device) Queue(i int) netdev.Queue { return d.queues[i] }

// SetOffloads says what the guest takes. A packet socket cannot be told: Posted.Write does the rest.
func (d *Device) SetOffloads(accept offload.Set) error {
	for _, q := range d.queues {
		q.recv.accept = accept
	}
	return nil
}

// SetPairs closes the sockets of the pairs from n on, so that the kernel gives them no frames, and opens those before: older kernels
// refuse that while the interface is down. The first one stays, and keeps the frames that come while no pair is in use.
func (d *Device) SetPairs(n int) error {
	if n < 0 || n > len(d.queues) {
		return fmt.Errorf("%s: %d queue pairs, has %d", d, n, len(d.queues))
	}
	for i, q := range d.queues {
		switch open := q.fd >= 0; {
		case i >= max(n, 1) && open:
			if err := q.close(); err != nil {
				return fmt.Errorf("%s: closing queue %d: %w", d, i, err)
			}
		case i < n && !open:
			if err := d.openQueue(i); err != nil {
				return err
			}
		}
	}
	return nil
}

// Close closes the sockets, and with the first the interface's promiscuous mode ends.
func (d *Device) Close() error {
	var errs []error
	for _, q := range d.queues {
		errs = append(errs, q.close())
	}
	return errors.Join(errs...)
}

// queue is one socket. Its two directions are driven by two workers, so they stay off each other's cache lines.
type queue struct {
	dev  *Device
	ring []byte     // both rings: receive, then transmit
	mu   sync.Mutex // over the closing of fd and what Counters reads of it
	fd   int
	lost uint64 // frames that the kernel had no room for, as far as it was asked
	_    [64]byte
	send sender
	_    [64]byte
	recv receiver
}

var _ netdev.Queue = (*queue)(nil)

// Counters: see netdev.Queue.
func (q *queue) Counters() netdev.Counters {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ask()
	return netdev.Counters{SendDropped: q.send.dropped.Load(), RecvDropped: q.recv.lost.Load() + q.lost}
}

// ask adds up what the kernel lost: it counts from zero again after each answer.
func (q *queue) ask() {
	if q.fd < 0 {
		return
	}
	if s, err := unix.GetsockoptTpacketStats(q.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
		q.lost += uint64(s.Drops)
	}
}

// close closes the socket; frames that wait in its ring are lost. A second call does nothing.
func (q *queue) close() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.fd < 0 {
		return nil
	}
	q.ask()
	q.recv.abandon()
	q.send.abandon()
	err := unix.Close(q.fd)
	q.fd = -1
	if q.ring != nil {
		err = errors.Join(err, unix.Munmap(q.ring))
		q.ring = nil
	}
	return err
}
