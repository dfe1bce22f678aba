package udp

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vhostd/vhostd/netdev"
)

// Engine is one of the kernel's ways to send frames from their pages.
type Engine uint8

// The engines.
const (
	AnyEngine   Engine = iota // the first of the others that is to be had
	IOUring                   // IORING_OP_SENDMSG_ZC: Linux 6.3, where io_uring is allowed
	MsgZeroCopy               // MSG_ZEROCOPY: Linux 5.0; dearer for each frame, and limited by net.core.optmem_max and RLIMIT_MEMLOCK
)

var engines = []string{"auto", "io_uring", "msg_zerocopy"}

// String is the engine's name in options.
func (e Engine) String() string { return engines[e] }

func parseEngine(o *Options, v string) error {
	i := slices.Index(engines, v)
	if i < 0 {
		return fmt.Errorf("want %s", strings.Join(engines, ", "))
	}
	o.Engine = Engine(i)
	return nil
}

// engine has the kernel send frames from their pages, and hears when it is done with them. Its methods are called with flights.mu locked,
// but for fd. It ends each flight that it was given once, by flights.end or flights.done.
type engine interface {
	// send hands over datagrams, and returns how many frames were refused: of these, and of earlier ones as far as that turns out here.
	send(f *flights, p *pageSends) (refused uint64)
	// poke has the kernel tell what it holds back until the worker's next system call.
	poke()
	// reap takes all that the kernel told, and returns how many frames turned out to be refused.
	reap(f *flights) (refused uint64)
	// fd is readable when the kernel has something to tell.
	fd() int
	// close is called when no frame is in flight.
	close() error
}

// openFlights prepares the sending of pages. Where that cannot be had all frames are copied, unless zero-copy was asked for by name.
func (d *Device) openFlights() error {
	s := &d.queue.send
	if d.opts.ZeroCopy == netdev.Off {
		d.zerocopy = "never: switched off"
		return nil
	}
	e, how, err := d.openEngine()
	if err == nil {
		s.flights, err = newFlights(e, d.opts.ZeroCopyPending, d.opts.ZeroCopy)
	}
	if _, ok := e.(*errorQueueEngine); ok && d.opts.Mode == Dgram {
		d.queue.recv.flights = s.flights // which is nil where err is not
	}
	switch {
	case err == nil:
		d.zerocopy = fmt.Sprintf("frames of %d bytes and more, by %s, as far as the network device takes pages", s.min, how)
	case d.opts.ZeroCopy == netdev.On || d.opts.Engine != AnyEngine:
		return fmt.Errorf("zerocopy=%v, zerocopy-engine=%v: %w", d.opts.ZeroCopy, d.opts.Engine, err)
	default:
		d.zerocopy = fmt.Sprintf("never: %v", err)
	}
	return nil
}

// openEngine opens the first engine that is to be had, of those that are wanted, and sets the least size of a frame for it.
func (d *Device) openEngine() (e engine, how string, err error) {
	s := &d.queue.send
	if d.opts.Engine != MsgZeroCopy {
		var ring *ringEngine
		if ring, err = newRingEngine(d.opts.ZeroCopyPending); err == nil {
			ring.noGSO = d.opts.NoGSO
			s.min = d.opts.least(DefaultZeroCopyMin)
			return ring, IOUring.String(), nil
		}
		err = fmt.Errorf("no io_uring: %w", err)
		if d.opts.Engine == IOUring {
			return nil, "", err
		}
	}
	var fds []int
	for i := range s.socks {
		fds = append(fds, s.socks[i].fd)
	}
	eq, err2 := newErrorQueueEngine(fds)
	if err2 != nil {
		return nil, "", errors.Join(err, fmt.Errorf("no MSG_ZEROCOPY: %w", err2))
	}
	s.min = d.opts.least(DefaultMsgZeroCopyMin)
	how = MsgZeroCopy.String()
	if err != nil {
		how += fmt.Sprintf(" (%v)", err)
	}
	return eq, how, nil
}
