package udp

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/offload"
)

// Device is one end of a tunnel. It implements netdev.Device.
type Device struct {
	opts     Options
	mtu      int
	zerocopy string
	queue    queue
}

var _ netdev.Device = (*Device)(nil)

// queue is the one queue pair of a Device. Its two directions are driven by two workers, so they stay off each other's cache lines.
type queue struct {
	_    [64]byte
	send sender
	_    [64]byte
	recv receiver
}

// Open opens the end of the tunnel that o describes, in the network namespace of the calling thread. Every peer must be routable.
func Open(o Options) (*Device, error) {
	o, err := o.complete()
	if err != nil {
		return nil, fmt.Errorf("udp: %w", err)
	}
	d := &Device{opts: o, queue: queue{recv: receiver{fd: -1}}}
	if err := d.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", o.Mode, err), d.closeSockets())
	}
	return d, nil
}

func (d *Device) open() (err error) {
	if d.mtu, err = d.room(); err != nil {
		return err
	}
	if err := d.openReceiver(); err != nil {
		return err
	}
	if err := d.openSender(); err != nil {
		return err
	}
	return d.openFlights()
}

// room is the guest's MTU: what the narrowest way to a peer leaves.
func (d *Device) room() (int, error) {
	if d.opts.MTU != 0 {
		return d.opts.MTU, nil
	}
	mtu := maxMTU
	for _, r := range d.opts.Remotes {
		outer, err := d.opts.pathMTU(r)
		if err != nil {
			return 0, err
		}
		mtu = min(mtu, outer-d.opts.Mode.overhead(r.Addr().Is6()))
	}
	if mtu < minMTU {
		return 0, fmt.Errorf("the way to the peers leaves a guest %d bytes, less than any network has (%d): set mtu= if it cuts datagrams", mtu, minMTU)
	}
	return mtu, nil
}

func (d *Device) openReceiver() (err error) {
	r := &d.queue.recv
	at := d.opts.Local
	if len(d.opts.groups()) > 0 {
		at = netip.AddrPortFrom(unspecified(at.Addr().Is6()), at.Port()) // else nothing for a group would come
	}
	if r.fd, err = newSocket(at, d.opts.Dev); err != nil {
		return err
	}
	if err := d.opts.join(r.fd); err != nil {
		return err
	}
	r.mode, r.vni, r.inbox = d.opts.Mode, d.opts.VNI, sys.NewInbox(recvBatch, recvSize)
	return grow(r.fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, recvBuffer)
}

func (d *Device) openSender() error {
	s := &d.queue.send
	s.tunnel, s.mark, s.full = d.opts.Mode.header(d.opts.VNI), s.marked, -1
	var hosts []sys.Sockaddr
	for _, r := range d.opts.Remotes {
		a := sys.NewSockaddr(r, zone(r.Addr(), d.opts.Dev))
		if s.remotes = append(s.remotes, a); !r.Addr().IsMulticast() {
			hosts = append(hosts, a)
		}
	}
	if d.opts.Mode != Dgram && !d.opts.NoLearn {
		s.table = newTable(d.opts.Local.Port(), hosts)
		d.queue.recv.table = s.table
	}
	if d.opts.Mode == Dgram { // the peer answers to where frames come from
		sock := outSocket{fd: d.queue.recv.fd}
		if err := sock.own(); err != nil {
			return err
		}
		s.socks = append(s.socks, sock)
		return nil
	}
	for range d.opts.Ports {
		sock, err := newOut(netip.AddrPortFrom(d.opts.Local.Addr(), 0), d.opts.Dev)
		if err != nil {
			return err
		}
		s.socks = append(s.socks, sock)
		if err := d.opts.prepare(sock.fd); err != nil {
			return err
		}
	}
	return nil
}

// String is the device as it is called in errors.
func (d *Device) String() string { return fmt.Sprintf("%s at %s", d.opts.Mode, d.opts.Local) }

// Capabilities: see netdev.Device. Checksums and segmentation are left to netdev/soft, whose frames still lie in the guest's pages.
func (d *Device) Capabilities() netdev.Capabilities {
	return netdev.Capabilities{
		Kind: d.opts.Mode.String(), Name: d.opts.Local.String(), MaxPairs: 1, MTU: d.mtu, ZeroCopy: d.zerocopy,
	}
}

// Queue implements netdev.Device.
func (d *Device) Queue(int) netdev.Queue { return &d.queue }

// SetOffloads implements netdev.Device: no frame that comes out of a datagram needs any.
func (d *Device) SetOffloads(offload.Set) error { return nil }

// SetPairs implements netdev.Device.
func (d *Device) SetPairs(n int) error {
	if n < 0 || n > 1 {
		return fmt.Errorf("%s: %d queue pairs, has 1", d, n)
	}
	return nil
}

// HeldError is what Close returns when the kernel does not let go of frames in time.
type HeldError = netdev.HeldError

// Close implements netdev.Device, but for frames that the kernel does not let go of in time, for which the error is a HeldError.
func (d *Device) Close() error {
	s := &d.queue.send
	if d.queue.recv.fd < 0 {
		return nil // closed before
	}
	var err error
	if s.flights != nil {
		held, refused := s.flights.close(d.opts.Drain)
		s.dropped.Add(refused)
		if held > 0 {
			err = fmt.Errorf("%s: %w", d, &HeldError{Frames: held, Waited: d.opts.Drain})
		}
	}
	return errors.Join(err, d.closeSockets())
}

func (d *Device) closeSockets() error {
	var errs []error
	fd := &d.queue.recv.fd
	for _, s := range d.queue.send.socks {
		if s.fd != *fd {
			errs = append(errs, unix.Close(s.fd))
		}
	}
	d.queue.send.socks = nil
	if *fd >= 0 {
		errs = append(errs, unix.Close(*fd))
		*fd = -1
	}
	return errors.Join(errs...)
}

// Counters implements netdev.Queue.
func (q *queue) Counters() netdev.Counters {
	return netdev.Counters{
		SendDropped: q.send.dropped.Load(),
		RecvDropped: q.recv.malformed.Load() + q.recv.otherVNI.Load() + q.recv.failed.Load() + q.recv.tooBig.Load(),
	}
}

// Stats are what a Device counts beside netdev.Counters.
type Stats struct {
	FlightStats
	Flooded             uint64 // frames that went to several peers
	Malformed, OtherVNI uint64 // datagrams without a frame for the guest
	NotLearnt           uint64 // frames whose source address found no room in the table
	Moved               uint64 // source addresses that came from another peer than before
}

// Stats reads the counters; safe from any goroutine.
func (d *Device) Stats() Stats {
	q := &d.queue
	s := Stats{Flooded: q.send.flooded.Load(), Malformed: q.recv.malformed.Load(), OtherVNI: q.recv.otherVNI.Load()}
	if t := q.send.table; t != nil {
		t.mu.Lock()
		s.NotLearnt, s.Moved = t.full, t.moved
		t.mu.Unlock()
	}
	if q.send.flights != nil {
		s.FlightStats = q.send.flights.stats()
	}
	return s
}
