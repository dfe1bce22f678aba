package l2switch

import (
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/soft"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// uplink is the device behind a port that is no guest's. Guests' threads send on it themselves, when nobody else does at the moment; what comes from it is
// received into private memory and sent on like a guest's frames, by a goroutine for each queue pair, which also sees to what could not be sent at once.
type uplink struct {
	port  *Port
	dev   netdev.Device
	lines []*line
	left  chan struct{} // closed when the uplink is to end
	done  sync.WaitGroup
}

// line is one queue pair of an uplink.
type line struct {
	up   *uplink
	q    *queue
	lane *lane // to the device
	in   *zerocopy.Inbox

	mu      sync.Mutex // of the sending side; tried by guests' threads, waited for by the line's own goroutine
	dev     netdev.Queue
	batch   []*zerocopy.Buffer // made of frames of the lane, and not taken by the device yet
	kids    []*child           // whose batch is
	blocked bool               // the device took less than it was given
	stuck   bool               // as the last sweep saw, which was after the batch was made

	got    []*zerocopy.Buffer
	ending bool // guarded by mu
	failed bool // the device cannot receive
}

// inboxSize is how many frames of usual length can come from an uplink's queue pair before the first was delivered.
const inboxSize = 256

// lookAgain is after what time a device that had no room is asked again when it has no descriptor that tells of room.
const lookAgain = time.Millisecond

// Uplink makes a port of a device, which belongs to the switch from now on: Close and RemovePort close it. Its configuration's MTU is the device's when it is
// 0, Pairs as many as the device has, and MaxAddresses all that the switch has.
func (s *Switch) Uplink(dev netdev.Device, c PortConfig) error {
	dev = soft.Wrap(dev)
	caps := dev.Capabilities()
	if c.Pairs == 0 {
		c.Pairs = min(caps.MaxPairs, maxPairs)
	}
	if c.Pairs > caps.MaxPairs {
		return fmt.Errorf("port %q: %d queue pairs, but %s %s has %d", c.Name, c.Pairs, caps.Kind, caps.Name, caps.MaxPairs)
	}
	if c.MTU == 0 {
		c.MTU = caps.MTU
	}
	up := &uplink{dev: dev, left: make(chan struct{})}
	if err := errors.Join(dev.SetOffloads(offload.All), dev.SetPairs(c.Pairs)); err != nil {
		return fmt.Errorf("port %q: %w", c.Name, err)
	}
	_, err := s.add(c, up)
	return err
}

// open makes the lines of p.
func (u *uplink) open(p *Port) error {
	u.port = p
	p.pairs.Store(int32(len(p.queues)))
	for i := range p.queues {
		q := &p.queues[i]
		in, err := zerocopy.NewInbox(inboxSize, q.lane.ring)
		if err != nil {
			u.free()
			return err
		}
		u.lines = append(u.lines, &line{up: u, q: q, lane: &q.lane, in: in, dev: u.dev.Queue(i)})
	}
	return nil
}

// start has the lines work.
func (u *uplink) start() {
	for _, l := range u.lines {
		u.done.Add(1)
		go l.run()
	}
}

func (u *uplink) free() {
	for _, l := range u.lines {
		l.in.Close()
	}
}

// close ends the lines and closes the device.
func (u *uplink) close() error {
	close(u.left)
	for _, l := range u.lines {
		l.end()
	}
	u.done.Wait()
	for i := range u.port.queues {
		u.port.queues[i].Orphan() // frames of the inboxes
	}
	err := u.dev.Close()
	u.free()
	return err
}

func (l *line) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ending = true
	l.lane.ring()
}

// run is the line's goroutine.
func (l *line) run() {
	defer l.up.done.Done()
	defer sys.Heartbeat()()
	debug.SetPanicOnFault(true) // it delivers into guests' memory; see netdev.Door
	if start := l.up.port.sw.cfg.Start; start != nil {
		select {
		case <-start:
		case <-l.up.left:
		}
	}
	for {
		moved, room := l.receive()
		if ok := l.flush(); !ok {
			break
		}
		if moved {
			continue
		}
		l.q.Reap()
		l.q.SendIdle()
		if l.lane.arm(forFrames) || l.full() {
			l.sleep(room)
		}
		l.lane.state.Store(awake)
	}
	if b, ok := l.dev.(netdev.Borrower); ok {
		b.Recall(l.in.Posted())
	}
	l.lane.discard()
	l.mu.Lock() // against a sweep that found the port before it left
	defer l.mu.Unlock()
	zerocopy.ReleaseAll(l.batch, zerocopy.Dropped)
	l.batch, l.kids = nil, nil
	l.dev = nil // it is closed next, which releases what it has
}

// receive sends on what has come from the device. room tells whether more could come.
func (l *line) receive() (moved, room bool) {
	room = l.in.Post()
	if l.failed || !room {
		return false, room
	}
	n, _, err := l.dev.Recv(l.in.Posted(), batchSize)
	if err != nil {
		l.failed = true
		l.up.port.sw.cfg.Log.Error("the uplink cannot receive", "port", l.up.port.name, "error", err)
	}
	l.got = l.in.Take(l.got[:0])
	if len(l.got) > 0 {
		l.q.Send(l.got)
	}
	return n > 0, room
}

// flush has the device send what waits, and reports whether the line is to go on.
func (l *line) flush() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.send()
	return !l.ending
}

// full reports whether the device has no room: nothing can be done for what waits in the lane before SendFD says that it has.
func (l *line) full() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.blocked
}

// send has the device send what waits, in order. mu is held.
func (l *line) send() {
	fault := shm.Guard(l.sendAll)
	if fault == nil {
		return
	}
	if fault.Owner != nil {
		fault.Owner.Faulted(fault)
	}
	l.unwound()
}

// unwound gives up the batch that a fault in the pages of one of its frames has ended. Nobody can say which of them the device has.
func (l *line) unwound() {
	if u, ok := l.dev.(netdev.Unwinder); ok {
		u.SendUnwound()
	}
	for _, c := range l.kids {
		c.give(zerocopy.Dropped)
		c.let()
	}
	l.up.port.drop(DropFault, len(l.batch))
	l.batch, l.kids = nil, nil
}

// orphan has the line keep no guest's pages: neither what the device has not taken nor, if it can copy, what it has.
func (l *line) orphan() {
	l.mu.Lock()
	defer l.mu.Unlock()
	fault := shm.Guard(func() {
		for i, b := range l.batch {
			if l.kids[i].parent.Load() == nil {
				continue
			}
			if err := b.Orphan(zerocopy.HeapAllocator); err != nil {
				panic("bug: " + err.Error()) // nobody else has a reference, and the heap does not say no
			}
		}
		if o, ok := l.dev.(netdev.Orphaner); ok {
			o.Orphan()
		}
	})
	if fault != nil {
		if fault.Owner != nil {
			fault.Owner.Faulted(fault)
		}
		l.unwound()
	}
}

// sweep orphans what the device has not taken since the last sweep, and reports whether there is more to come.
func (u *uplink) sweep() (more bool) {
	for _, l := range u.lines {
		if !l.mu.TryLock() {
			more = true
			continue
		}
		stuck := l.stuck && l.blocked
		l.stuck = l.blocked
		more = more || l.blocked && !stuck
		l.mu.Unlock()
		if stuck {
			l.orphan()
		}
	}
	return more
}

// held reports whether pages may wait here that no sweep has seen.
func (u *uplink) held() bool {
	for _, l := range u.lines {
		if !l.mu.TryLock() {
			return true
		}
		held := l.blocked && !l.stuck
		l.mu.Unlock()
		if held {
			return true
		}
	}
	return false
}

// sendAll is send up to a fault. What comes meanwhile, which may go on for ever, is mostly left to those who bring it: they send it themselves, or rouse the line.
func (l *line) sendAll() {
	for end := l.lane.head.Load(); l.lane.tail.Load() <= end; {
		if len(l.batch) == 0 {
			if l.batch, l.kids = l.lane.unload(l.batch, l.kids, batchSize); len(l.batch) == 0 {
				break
			}
			l.stuck = false
		}
		if l.taken(l.dev.Send(l.batch)); len(l.batch) > 0 {
			break
		}
	}
	l.dev.Reap()
	h, ok := l.dev.(netdev.Holder)
	if l.blocked = len(l.batch) > 0 || ok && h.Held(); !l.blocked {
		l.stuck = false
	}
}

// taken takes the first n frames, which are the device's now, out of the batch.
func (l *line) taken(n int) {
	for _, c := range l.kids[:n] {
		c.let()
	}
	clear(l.batch[:n])
	clear(l.kids[:n])
	l.batch, l.kids = l.batch[:copy(l.batch, l.batch[n:])], l.kids[:copy(l.kids, l.kids[n:])]
}

// sleep waits for the device, or for somebody to rouse the lane. What came before that was armed is looked for once more.
func (l *line) sleep(room bool) {
	if !room && l.in.Post() {
		return
	}
	fds := [4]unix.PollFd{
		{Fd: int32(l.lane.ready.FD()), Events: unix.POLLIN}, {Fd: -1, Events: unix.POLLIN},
		{Fd: -1, Events: unix.POLLOUT}, {Fd: -1, Events: unix.POLLIN},
	}
	if room && !l.failed {
		fds[1].Fd = int32(l.dev.RecvFD())
	}
	l.mu.Lock()
	if l.ending {
		l.mu.Unlock()
		return
	}
	timeout := -1
	if l.blocked {
		if fds[2].Fd = int32(l.dev.SendFD()); fds[2].Fd < 0 {
			timeout = int(lookAgain.Milliseconds())
		}
	}
	if c, ok := l.dev.(netdev.Completer); ok {
		fds[3].Fd = int32(c.CompletionFD())
	}
	l.mu.Unlock()
	if _, err := unix.Poll(fds[:], timeout); err != nil && !errors.Is(err, unix.EINTR) {
		panic("bug: waiting for an uplink's descriptors: " + err.Error())
	}
}

// deliver sends a run on the device, if nobody else is at it.
func (u *uplink) deliver(w *run) {
	l := u.lines[w.lane.index]
	w.wait()
	w.releaseLost(0)
	if !l.mu.TryLock() {
		l.lane.rouse(forFrames, forRoom)
		u.port.sw.sweep.arm()
		return
	}
	defer l.mu.Unlock()
	if l.ending {
		return // the device may be closed: what waits is dropped by pass
	}
	l.send()
	if l.blocked {
		l.lane.rouse(forFrames, forRoom)
		u.port.sw.sweep.arm()
	}
}

// child is a frame of a lane as an uplink's device sends it. Its own memory is what the slot's was. It is used again when both the device, which may be done
// with it before Send returns, and the line, whose batch it is in until then, have let it go.
type child struct {
	buf    zerocopy.Buffer
	mem    []byte
	frags  [][]byte
	parent atomic.Pointer[zerocopy.Buffer] // whose pages the rest is; nil: nobody's, or they were given up
	lets   atomic.Uint32                   // calls of let, two for each use
}

// let says that the device, or the line, will not look at the child any more.
func (c *child) let() {
	if c.lets.Add(1)%2 == 0 {
		children.Put(c)
	}
}

// give releases the parent, once.
func (c *child) give(o zerocopy.Outcome) {
	if p := c.parent.Swap(nil); p != nil {
		p.Release(o)
	}
}

var children = sync.Pool{New: func() any { return new(child) }}

// unload takes up to max frames out of the lane, as buffers, and returns these and whose they are.
func (l *lane) unload(to []*zerocopy.Buffer, kids []*child, max int) ([]*zerocopy.Buffer, []*child) {
	l.take.Lock()
	defer l.take.Unlock()
	frames, bytes := 0, 0
	for len(to) < max {
		tail := l.tail.Load()
		if tail == l.head.Load() {
			l.slow.Store(false)
			break
		}
		s := l.at(tail)
		if s.lost() {
			l.pop(s, tail, zerocopy.Dropped)
			continue
		}
		c := children.Get().(*child)
		c.mem, c.frags = s.data, s.frags(c.frags[:0])
		c.parent.Store(s.buf)
		if err := c.buf.RecycleUbuf(zerocopy.Ubuf{Callback: childBack, Arg: c}, virtio.NetHdrOf(s.first, s.last), c.frags...); err != nil {
			panic("bug: a child is in use: " + err.Error())
		}
		l.leave(s, tail)
		to, kids = append(to, &c.buf), append(kids, c)
		frames++
		bytes += c.buf.Len()
	}
	l.frames.Add(uint64(frames))
	l.bytes.Add(uint64(bytes))
	return to, kids
}

// childBack runs when the device is done with a frame, on any goroutine.
func childBack(u *zerocopy.Ubuf, o zerocopy.Outcome) {
	c := u.Arg.(*child)
	if c.buf.Held() { // orphaned: the Buffer is its holder's for good
		c.give(o)
		return
	}
	parent := c.parent.Swap(nil)
	freeMemory(c.mem)
	c.mem = nil
	c.let()
	if parent != nil {
		parent.Release(o)
	}
}
