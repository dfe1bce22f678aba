package xdp

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/zerocopy"
)

// Pauses of port.tend.
const (
	tendNap  = 250 * time.Microsecond // what is in flight is left to the worker for so long
	openNap  = time.Millisecond       // before a socket is opened again: the memory may change first
	retryNap = 100 * time.Millisecond // after an error, and while the interface is down
)

// port is a queue of the interface.
type port struct {
	dev   *Device
	queue int // of the interface

	// cur is the binding, or nil for none. It is stored with all locks held, a binding over nil without receiving.
	cur atomic.Pointer[binding]

	// lends: the kernel may write into the guest's buffers. Not so when owner looks at several ports, or after the kernel has used places in
	// another order than they were given.
	lends atomic.Bool

	control sync.Mutex // before mu: held by whoever replaces cur
	owner   *pair      // whose Recv looks here
	closed  bool

	receiving sync.Mutex // after control, before mu: held for a call of Recv, which uses cur's receiving half

	mu      sync.Mutex // held for a batch by whoever sends, and for every change of cur
	turns   uint64     // calls of Send and Reap: a sign that the worker is awake
	full    bool       // Send was refused, and owner.room is blocked
	home    *pair      // whose Send goes here
	results []zerocopy.Outcome

	work    chan struct{} // tells tend that there is something to see to
	ended   chan struct{}
	dropped atomic.Uint64 // frames that could not be sent
	lost    atomic.Uint64 // frames that could not be received: too big for the guest, or as bindings that are gone have counted
	landed  atomic.Uint64 // frames that the kernel wrote into the guest's buffers itself
	unruly  atomic.Uint64 // times that it used places in another order
	opened  atomic.Uint64 // bindings
	failed  atomic.Pointer[error]
}

// errClosed says that the device has been closed.
var errClosed = errors.New("closed")

func newPort(d *Device, queue int, home *pair) *port {
	p := &port{dev: d, queue: queue, owner: home, home: home, work: make(chan struct{}, 1), ended: make(chan struct{})}
	p.lends.Store(true)
	go p.tend()
	return p
}

// start binds the port for the first time.
func (p *port) start(w way) error {
	p.control.Lock()
	defer p.control.Unlock()
	return p.open(w, nil, time.Now().Add(p.dev.opts.Drain))
}

// replace gives the port a binding over other memory. No worker runs.
func (p *port) replace(regions [][]byte) error {
	p.control.Lock()
	defer p.control.Unlock()
	deadline := time.Now().Add(p.dev.opts.Drain)
	err := p.shut(deadline, nil)
	return errors.Join(err, p.open(p.dev.way, regions, deadline.Add(p.dev.opts.Drain)))
}

// move has another pair receive from the port. No worker runs.
func (p *port) move(to *pair) error {
	p.control.Lock()
	defer p.control.Unlock()
	to.ports = append(to.ports, p)
	for _, o := range to.ports {
		o.lends.Store(len(to.ports) == 1 && o.unruly.Load() == 0)
	}
	from := p.owner
	p.owner = to
	b := p.cur.Load()
	if b == nil || from == to {
		return nil
	}
	return errors.Join(from.unwatch(b.sock.FD()), to.watch(b.sock.FD()))
}

// suit replaces a binding that lends although it may not any more, or does not although it might, and one that a pair which is not in use any more
// took with it: what comes after the front-end has its answer is received. No worker runs.
func (p *port) suit() error {
	p.control.Lock()
	defer p.control.Unlock()
	deadline := time.Now().Add(p.dev.opts.Drain)
	switch b := p.cur.Load(); {
	case b == nil && (p.closed || !p.dev.wanted.Load()):
		return nil
	case b == nil:
	case !b.guest || b.way.zerocopy() || !b.single() || b.recv.inPlace == p.lends.Load():
		return nil
	default:
		if err := p.shut(deadline, nil); err != nil {
			return err
		}
	}
	p.reopenUntil(deadline) // else tend goes on trying
	return nil
}

// orphan ends the binding if it refers to guests' pages. It is called by the transmitq's side.
func (p *port) orphan() {
	p.control.Lock()
	defer p.control.Unlock()
	p.mu.Lock()
	b := p.cur.Load()
	holds := b != nil && b.guest && b.send.pieces > 0
	p.mu.Unlock()
	if !holds {
		return
	}
	if err := p.shut(time.Now(), nil); err != nil {
		p.failed.Store(&err)
	}
}

// recall ends the binding, and what is lent with it. It is called by the receiveq's side.
func (p *port) recall(posted *zerocopy.Posted) {
	p.control.Lock()
	defer p.control.Unlock()
	err := p.shut(time.Now().Add(p.dev.opts.Drain), func(b *binding) {
		if posted != nil {
			b.handOver(posted)
		}
	})
	if err != nil {
		p.failed.Store(&err)
	}
}

// open binds the port, over regions of guest memory or none. control is held.
func (p *port) open(w way, regions [][]byte, deadline time.Time) error {
	if p.closed {
		return errClosed
	}
	b, err := p.dev.openBinding(p, w, regions, deadline)
	if err != nil {
		return err
	}
	if err := p.connect(b); err != nil {
		_, end := b.close() // nothing was sent
		return errors.Join(err, end)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cur.Store(b)
	p.opened.Add(1)
	p.unblock()
	return nil
}

// connect lets frames come to a binding.
func (p *port) connect(b *binding) error {
	fd := b.sock.FD()
	if err := p.dev.prog.sockets.Put(uint32(p.queue), uint32(fd)); err != nil {
		return fmt.Errorf("queue %d: the XDP program's map of sockets: %w", p.queue, err)
	}
	return p.owner.watch(fd)
}

// shut closes the binding, if there is one. Before, take is told that no more frames come, and may look at those that have. Frames in flight are
// waited for until deadline. control is held.
func (p *port) shut(deadline time.Time, take func(b *binding)) (err error) {
	b := p.cur.Load()
	if b == nil {
		return nil
	}
	// Whatever happens: take touches guest memory, which can fault.
	defer func() {
		lost, end := b.close()
		p.dropped.Add(uint64(lost))
		err = errors.Join(err, end)
	}()
	var errs []error
	if err := p.dev.prog.sockets.Delete(uint32(p.queue)); err != nil {
		errs = append(errs, fmt.Errorf("queue %d: the XDP program's map of sockets: %w", p.queue, err))
	}
	// Before the socket is closed: somebody who polls could keep it open.
	errs = append(errs, p.owner.unwatch(b.sock.FD()))
	p.receiving.Lock()
	p.mu.Lock()
	p.cur.Store(nil)
	p.block()
	p.mu.Unlock()
	p.receiving.Unlock()
	b.drain(deadline)
	if take != nil {
		settle()
		take(b)
	}
	p.note(&b.recv)
	p.lost.Add(b.lost())
	return errors.Join(errs...)
}

// membarrierGlobal is MEMBARRIER_CMD_GLOBAL of membarrier(2).
const membarrierGlobal = 1

// settle waits until no frame is on its way to a socket that was taken out of the XDP program's map.
func settle() {
	// Where the kernel refuses (nohz_full), closing the socket waits for the same.
	_, _, _ = unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0)
}

// drain waits for what is in flight. Nobody else has the binding.
func (b *binding) drain(deadline time.Time) {
	for pause := 20 * time.Microsecond; ; pause = min(2*pause, time.Millisecond) {
		b.reap()
		if b.send.pieces == 0 || time.Now().After(deadline) {
			return
		}
		b.kick()
		time.Sleep(pause)
	}
}

// block makes the home's SendFD wait; mu is held.
func (p *port) block() {
	if !p.full {
		p.full = true
		p.home.room.Block()
	}
	p.wake()
}

func (p *port) unblock() {
	if p.full {
		p.full = false
		p.home.room.Drain()
	}
}

// wake has tend look.
func (p *port) wake() {
	select {
	case p.work <- struct{}{}:
	default:
	}
}

// tend sees to the port while the worker does not, until the port is closed.
func (p *port) tend() {
	defer close(p.ended)
	for range p.work {
		for nap := p.nap(); nap > 0; nap = p.nap() {
			seen := p.count()
			time.Sleep(nap)
			p.see(seen)
		}
	}
}

// nap is how long to sleep until the port is to be seen to, 0 if there is nothing to do.
func (p *port) nap() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.cur.Load()
	switch {
	case b == nil && (!p.dev.wanted.Load() || p.gone() != nil):
		return 0
	case b == nil && p.failed.Load() != nil:
		return retryNap
	case b == nil:
		return openNap
	case b.send.pieces == 0 && !p.full:
		return 0
	case b.send.down:
		return retryNap
	}
	return tendNap
}

// gone is why the port will never have a binding again: there is no interface any more. Else it is nil.
func (p *port) gone() error {
	if err := p.failed.Load(); err != nil && errors.Is(*err, unix.ENODEV) {
		return *err
	}
	return nil
}

// giveUp is the end of what was on the way to an interface that is gone. Send, which drops from now on, has room. mu is held.
func (p *port) giveUp(b *binding) {
	p.dropped.Add(uint64(b.abandon(b.sock.Tx.Taken())))
	p.unblock()
}

func (p *port) count() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.turns
}

// see does what the worker has not done since it had taken seen turns.
func (p *port) see(seen uint64) {
	p.mu.Lock()
	b := p.cur.Load()
	if b != nil && p.turns == seen {
		p.turn(b)
	}
	p.mu.Unlock()
	if b == nil {
		p.reopen()
	}
}

// turn takes what the kernel reports, and gives it what it refused before; mu is held.
func (p *port) turn(b *binding) {
	b.reap()
	if b.sock.Tx.Waiting() > 0 {
		b.kick()
		b.reap()
	}
	if b.send.gone {
		p.giveUp(b)
		return
	}
	if p.full && b.room(b.way.pieces) {
		p.unblock()
	}
}

// reopen binds the port again after it has lost its binding.
func (p *port) reopen() {
	p.control.Lock()
	defer p.control.Unlock()
	if p.cur.Load() == nil && !p.closed {
		p.reopenUntil(time.Now().Add(busyPause))
	}
}

// reopenUntil binds the port again, and notes in failed what stands in the way for longer. control is held.
func (p *port) reopenUntil(deadline time.Time) {
	err := p.open(p.dev.way, p.dev.memory(), deadline)
	if err != nil && !errors.Is(err, unix.EBUSY) && len(p.dev.memory()) > 0 {
		err = p.open(p.dev.way, nil, deadline)
	}
	switch {
	case err == nil:
		p.failed.Store(nil)
	case !errors.Is(err, unix.EBUSY):
		p.failed.Store(&err)
		if p.gone() != nil {
			p.mu.Lock()
			p.unblock() // Send drops
			p.mu.Unlock()
		}
	}
}

// close ends the port.
func (p *port) close(deadline time.Time) error {
	p.control.Lock()
	p.closed = true
	err := p.shut(deadline, nil)
	p.control.Unlock()
	close(p.work)
	<-p.ended
	return err
}
