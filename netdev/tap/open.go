package tap

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/virtio"
)

// hdrSize is the length in bytes of the kernel's virtio-net header: with num_buffers, whatever the guest's is.
const hdrSize = virtio.NetHdrSize

// Open attaches to the tap that o asks for, in the network namespace of the calling thread.
func Open(o Options) (*Device, error) {
	if err := o.check(); err != nil {
		closeAll(o.FDs)
		return nil, fmt.Errorf("tap: %w", err)
	}
	d, err := openQueues(&o)
	if err != nil {
		return nil, err
	}
	if err := d.setup(&o); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// openQueues returns a Device that owns its descriptors, and all of o.FDs in any case.
func openQueues(o *Options) (*Device, error) {
	switch {
	case len(o.FDs) > 0:
		return inherit(o.FDs)
	case o.Macvtap != "":
		return openMacvtap(o.Macvtap, max(o.Queues, 1))
	}
	return openTap(o.Name, max(o.Queues, 1))
}

// setup brings the queues and the interface into the state that o asks for.
func (d *Device) setup(o *Options) error {
	for _, q := range d.queues {
		if q.hdr == 0 {
			continue
		}
		if err := sys.TunSetVnetHdrSize(q.fd, q.hdr); err != nil {
			return fmt.Errorf("%s: %w", d, err)
		}
	}
	if err := d.probeOffloads(); err != nil {
		return err
	}
	mtu, err := configure(d, o)
	if err != nil {
		return err
	}
	d.mtu = mtu
	if err := d.setBatching(o.IOUring); err != nil {
		return err
	}
	if o.Persist {
		// Last, so that a tap that could not be set up does not stay.
		if err := sys.TunSetPersist(d.queues[0].fd, true); err != nil {
			return fmt.Errorf("%s: making it persistent: %w", d, err)
		}
	}
	return nil
}

// setBatching makes what it takes to hand over frames many at a time.
func (d *Device) setBatching(how Batching) error {
	if how == BatchNever {
		return nil
	}
	least := batchLeast
	if how == BatchAlways {
		least = 1
	}
	for i, q := range d.queues {
		b, err := newBatcher(q.fd, least)
		if err != nil && how == BatchAlways {
			return fmt.Errorf("%s: queue %d: io-uring=on: %w: leave it out, and frames are written one by one", d, i, err)
		}
		q.send.batch = b
	}
	return nil
}

// busyWait is how long a tap may be held by a process that has ended: the kernel closes what an io_uring refers to a moment after a kill.
const busyWait = 2 * time.Second

// attach is TunSetIff, which waits for a predecessor's end.
func attach(fd int, name string, flags uint16) (string, error) {
	for deadline := time.Now().Add(busyWait); ; time.Sleep(10 * time.Millisecond) {
		got, err := sys.TunSetIff(fd, name, flags)
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return got, err
		}
	}
}

// openTap creates the tap called name, or attaches to it, with n queues.
func openTap(name string, n int) (*Device, error) {
	flags := uint16(sys.TunTap | sys.TunNoPI | sys.TunVnetHdr)
	if n > 1 {
		flags |= sys.TunMultiQueue
	}
	d := &Device{}
	for range n {
		fd, err := openNode(sys.TunPath)
		if err != nil {
			d.Close()
			return nil, err
		}
		d.queues = append(d.queues, newQueue(fd, hdrSize))
		got, err := attach(fd, name, flags)
		if err != nil && n == 1 && isMultiQueue(name) {
			// One queue of a tap that was made for several is fine.
			flags |= sys.TunMultiQueue
			got, err = sys.TunSetIff(fd, name, flags)
		}
		if err != nil {
			d.Close()
			return nil, fmt.Errorf("tap %s: attaching: %w: %s", shown(name), err, explainAttach(err, name, n))
		}
		name = got
	}
	d.name, d.multi = name, flags&sys.TunMultiQueue != 0
	return d, nil
}

// openNode opens a device node. It is non-blocking: a write to a blocking tap costs more than twice the time.
func openNode(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &openError{path, err}
	}
	return fd, nil
}

// inherit makes a Device of descriptors that somebody else opened. They are closed if it fails.
func inherit(fds []int) (_ *Device, err error) {
	defer func() {
		if err != nil {
			closeAll(fds)
		}
	}()
	d := &Device{inherited: true}
	for i, fd := range fds {
		name, flags, err := sys.TunGetIff(fd)
		switch {
		case err != nil:
			return nil, fmt.Errorf("tap: descriptor %d: %w: %s", fd, err, explainFD(err))
		case flags&sys.TunTap == 0:
			return nil, fmt.Errorf("tap: descriptor %d is a tun (%s), which carries no Ethernet frames: pass a tap's", fd, name)
		case i > 0 && name != d.name:
			return nil, fmt.Errorf("tap: descriptor %d is a queue of %s, the first one of %s: all must be of one interface", fd, name, d.name)
		case flags&sys.TunVnetHdr == 0 && i > 0 && d.queues[0].hdr > 0, flags&sys.TunVnetHdr != 0 && i > 0 && d.queues[0].hdr == 0:
			return nil, fmt.Errorf("tap: descriptor %d: some descriptors have IFF_VNET_HDR and some have not", fd)
		}
		if err := own(fd); err != nil {
			return nil, fmt.Errorf("tap: descriptor %d: %w", fd, err)
		}
		hdr := 0
		if flags&sys.TunVnetHdr != 0 {
			hdr = hdrSize
		}
		d.name, d.multi = name, flags&sys.TunMultiQueue != 0
		q := newQueue(fd, hdr)
		q.detached = flags&unix.IFF_DETACH_QUEUE != 0
		d.queues = append(d.queues, q)
	}
	d.macvtap = isMacvtapFD(fds[0])
	d.multi = d.multi || d.macvtap
	d.mark()
	return d, nil
}

// own makes an inherited descriptor as those that we open.
func own(fd int) error {
	unix.CloseOnExec(fd)
	return unix.SetNonblock(fd, true)
}

func closeAll(fds []int) error {
	var errs []error
	for _, fd := range fds {
		errs = append(errs, unix.Close(fd))
	}
	return errors.Join(errs...)
}
