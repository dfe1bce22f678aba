package backend

import (
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
	"github.com/vhostd/vhostd/zerocopy"
)

// batchSize is how many frames are moved between two looks at the indices of a ring.
const batchSize = 64

// queue is a virtqueue: its ring, its frames on the way, and the state of its worker. mu guards all of it but
// attention, passed and waits.
type queue struct {
	s         *session
	index     int // as in vhost-user: even is a receiveq, odd a transmitq
	fromGuest bool
	dev       netdev.Queue

	worker *worker

	mu        sync.Mutex
	attention atomic.Bool // the control side waits for mu: the worker leaves it soon
	passed    atomic.Bool // the worker found mu locked, and is to be woken

	setup      ringSetup
	enabled    bool
	kicked     bool // SET_VRING_KICK has come: the ring is to run
	started    bool
	startedAt  time.Time
	wasEnabled bool  // at some time since startedAt
	broken     error // the guest's fault; the ring is started but stands still
	fault      error // guest memory faulted under the worker: what it was doing is half done
	kick       int   // descriptors of the front-end, -1 for none
	call       int
	errfd      int
	bell       bell
	done       chan struct{} // closed when the worker has let go of the ring

	ring   *vring.Device
	window *zerocopy.Window // of a transmitq
	posted *zerocopy.Posted // of a receiveq
	rest   zerocopy.Rest    // and what waited in there when it stopped
	batch  [batchSize]*zerocopy.Buffer
	unsent []*zerocopy.Buffer // the part of batch that the device has not taken yet
	check  bool               // headers are to be validated: the device looks at them
	feat   virtio.Features
	bad    uint64 // chains without a good frame, when last counted
	waste  int    // those that were not made up for

	waits waitSet // the worker's
	live  counters
}

func newQueue(s *session, index int, w *worker) *queue {
	q := &queue{
		s: s, index: index, fromGuest: index%2 == 1, dev: s.b.dev.Queue(index / 2), worker: w, kick: -1, call: -1, errfd: -1,
	}
	q.newBell()
	return q
}

// lock takes the queue from its worker, between two batches; unlock lets the worker look at everything anew.
func (q *queue) lock() {
	q.attention.Store(true)
	q.mu.Lock()
	q.attention.Store(false)
}

func (q *queue) unlock() {
	q.mu.Unlock()
	q.worker.signal()
}

// unlockUnchanged is unlock for who has only looked: the worker is woken if it came by meanwhile, and sleeps on if it did not.
func (q *queue) unlockUnchanged() {
	q.mu.Unlock()
	if q.passed.Swap(false) {
		q.worker.signal()
	}
}

// close frees the descriptors of a queue that has stopped.
func (q *queue) close() {
	q.lock()
	defer q.unlock()
	setFD(&q.kick, -1)
	q.setBell(&q.call, -1)
	q.setBell(&q.errfd, -1)
	q.live.cut += uint64(q.rest.Len())
	q.rest = zerocopy.Rest{}
	q.fold()
}

func setFD(fd *int, to int) {
	if *fd >= 0 {
		vhostuser.CloseFDs([]int{*fd})
	}
	*fd = to
}

// errRunning refuses a change to a ring that runs.
func (q *queue) errRunning(what string) error {
	return fmt.Errorf("%s of queue %d while it runs", what, q.index)
}

// SetVringNum implements vhostuser.Handler.
func (s *session) SetVringNum(index int, num uint32) error {
	q := s.queues[index]
	if q.started {
		return q.errRunning("size")
	}
	if err := vring.CheckSize(int(num), s.packed()); err != nil {
		return fmt.Errorf("queue %d: %w", index, err)
	}
	q.setup.size = int(num)
	return nil
}

// SetVringAddr implements vhostuser.Handler. A front-end may repeat it for a ring that runs (to switch its log flag), but not move the ring.
func (s *session) SetVringAddr(index int, addr vhostuser.VringAddr) error {
	q := s.queues[index]
	if q.started {
		if old := q.setup.addr; addr.Desc != old.Desc || addr.Avail != old.Avail || addr.Used != old.Used {
			return q.errRunning("address")
		}
		return nil
	}
	if q.setup.size != 0 {
		if _, _, _, err := parts(s.table, addr, q.setup.size, s.packed()); err != nil {
			return fmt.Errorf("queue %d: %w", index, err)
		}
	}
	q.setup.addr = &addr
	return q.start()
}

// SetVringBase implements vhostuser.Handler.
func (s *session) SetVringBase(index int, base uint32) error {
	q := s.queues[index]
	switch {
	case q.started:
		return q.errRunning("base")
	case base > math.MaxUint16 && !s.packed():
		return fmt.Errorf("queue %d: base %d, at most %d", index, base, math.MaxUint16)
	}
	q.setup.base, q.setup.based = base, true
	return nil
}

// GetVringBase implements vhostuser.Handler: the ring stops, after what is in flight has been returned.
func (s *session) GetVringBase(index int) (uint32, error) {
	q := s.queues[index]
	if err := s.stop(q); err != nil {
		return 0, err
	}
	// A kick starts the ring again: the old one has done its work.
	setFD(&q.kick, -1)
	return q.base(), nil
}

// SetVringKick implements vhostuser.Handler.
func (s *session) SetVringKick(index int, fd int) error {
	q := s.queues[index]
	if err := checkNotifier(fd); err != nil {
		s.discardFDs(fd)
		return fmt.Errorf("kick of queue %d: %w", index, err)
	}
	setFD(&q.kick, fd)
	q.kicked = true
	if q.started {
		return nil
	}
	return q.start()
}

// SetVringCall implements vhostuser.Handler. What was owed to the old descriptor is owed to the new one: the driver may wait for it.
func (s *session) SetVringCall(index int, fd int) error {
	q := s.queues[index]
	if err := checkNotifier(fd); err != nil {
		s.discardFDs(fd)
		return fmt.Errorf("call of queue %d: %w", index, err)
	}
	q.setBell(&q.call, fd)
	if q.started {
		q.notify()
	}
	return nil
}

// SetVringErr implements vhostuser.Handler.
func (s *session) SetVringErr(index int, fd int) error {
	q := s.queues[index]
	if err := checkNotifier(fd); err != nil {
		s.discardFDs(fd)
		return fmt.Errorf("error descriptor of queue %d: %w", index, err)
	}
	q.setBell(&q.errfd, fd)
	return nil
}

// SetVringEnable implements vhostuser.Handler.
func (s *session) SetVringEnable(index int, enable bool) error {
	q := s.queues[index]
	q.enabled = enable
	q.wasEnabled = q.wasEnabled || enable
	var err error
	s.others(q, func() { err = s.activate() })
	return err
}

// start makes the ring run once the front-end has said all that is needed for it; until then it does nothing.
func (q *queue) start() error {
	if q.started || q.setup.size == 0 || q.setup.addr == nil || !q.kicked {
		return nil
	}
	var err error
	if fault := guard(func() { err = q.open() }); fault != nil {
		err = vhostuser.Fatal(fault)
	}
	if err != nil {
		q.kicked = false
		return fmt.Errorf("queue %d: %w", q.index, err)
	}
	q.started, q.broken = true, nil
	q.startedAt, q.wasEnabled = time.Now(), q.enabled
	q.done = make(chan struct{})
	q.s.b.log.Debug("queue started", "queue", q.index, "size", q.setup.size, "base", q.setup.base, "features", q.feat)
	q.waits = waitSet{}
	q.worker.join(q) // which wakes when the queue is unlocked
	return nil
}

// open makes the ring and what lies on it.
func (q *queue) open() error {
	q.feat = usable(q.s.negotiated())
	if err := q.openRing(); err != nil {
		return err
	}
	q.bad = 0
	if q.fromGuest {
		q.window = zerocopy.NewWindow(q.ring, q.feat, q.worker.signal)
		q.check = !q.s.b.dev.Capabilities().IgnoresHeader
	} else {
		q.posted = zerocopy.NewPosted(q.ring, q.feat)
		q.posted.Inherit(q.rest)
		q.rest = zerocopy.Rest{}
		q.ring.DisableKick() // a driver that posts buffers is heard of only when a frame waits for them
	}
	return nil
}

// setTable makes t the queue's memory. The error says that t does not hold the ring: it has to stop.
func (q *queue) setTable(t *guestmem.Table) error {
	if !q.started {
		return nil
	}
	desc, avail, used, err := parts(t, *q.setup.addr, q.setup.size, q.feat.Has(virtio.FRingPacked))
	if err == nil {
		q.recall()
		err = q.ring.Rebind(desc, avail, used)
	}
	if err != nil {
		return fmt.Errorf("queue %d: %w", q.index, err)
	}
	q.ring.SetView(guestmem.NewView(t, nil))
	if q.window != nil {
		q.window.SetTable(t)
	}
	return nil
}
