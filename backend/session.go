package backend

import (
	"encoding/binary"
	"fmt"
	"runtime/debug"
	"sync/atomic"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// session is one front-end's connection: a vhostuser.Handler. Its methods run on one goroutine.
type session struct {
	*ending
	b       *Backend
	queues  []*queue // 2*i is the receiveq of pair i, 2*i+1 its transmitq
	workers []*worker
	table   *guestmem.Table
	// repeats counts, by region, the ADD_MEM_REGs after the first.
	repeats map[*guestmem.Region]int
	back    *vhostuser.BackendConn
	mtu     uint16
	status  atomic.Uint32

	discarded []int // descriptors that are to be closed when no queue is locked

	features  atomic.Uint64 // negotiated
	protocol  vhostuser.ProtocolFeatures
	activated int // pairs that the device was told are in use

	memRegions atomic.Int64
	memBytes   atomic.Uint64
}

func newSession(b *Backend, conn *vhostuser.Conn) (*session, error) {
	debug.SetPanicOnFault(true) // for this goroutine: see guard
	table, err := guestmem.NewTable()
	if err != nil {
		return nil, err
	}
	s := &session{b: b, ending: &ending{conn: conn}, table: table, repeats: map[*guestmem.Region]int{}, activated: -1}
	for i := range 2 * b.opts.MaxPairs {
		if i%2 == 0 || !b.opts.PairWorkers {
			w, err := newWorker(b.opts)
			if err != nil {
				s.close()
				return nil, err
			}
			s.workers = append(s.workers, w)
		}
		s.queues = append(s.queues, newQueue(s, i, s.workers[len(s.workers)-1]))
	}
	b.openDoors(s)
	return s, nil
}

// close ends the session: every ring stops, every descriptor and all memory goes.
func (s *session) close() {
	s.b.openDoors(nil)
	if err := s.stopAll(); err != nil {
		s.b.log.Warn("session ended unclean", "error", err)
	}
	for _, q := range s.queues {
		q.close()
	}
	for _, w := range s.workers {
		w.close()
	}
	if s.back != nil {
		_ = s.back.Close()
	}
	if r, ok := s.b.dev.(netdev.Registrar); ok {
		if err := r.SetMemory(nil); err != nil {
			s.b.log.Warn("guest memory is still registered", "error", err)
		}
	}
	s.table.Unpin()
}

// ending is how a session is ended from elsewhere. It is apart from the session for the memory that refers to it: what is not unmapped before nobody can
// reach it any more (zerocopy.Window.Abandon) must not be what keeps it within reach.
type ending struct {
	conn  *vhostuser.Conn
	fault atomic.Pointer[error] // why the session ends
	mute  atomic.Bool           // the front-end is not notified any more: see bell
}

// fail ends the session for err; any goroutine may call it.
func (e *ending) fail(err error) {
	if e.fault.CompareAndSwap(nil, &err) {
		go e.conn.Close() // of this front-end's, on what may be another guest's worker: see Conn.Close
	}
}

func (s *session) refused(err error) {
	s.b.frontEndErrors.Add(1)
	s.b.log.Warn("request refused", "error", err)
}

// pause implements vhostuser.Options.Pause.
func (s *session) pause(scope vhostuser.Pause, index int) (resume func()) {
	queues := s.queues
	if scope == vhostuser.PauseVring {
		queues = queues[index : index+1]
	}
	for _, q := range queues {
		q.lock()
	}
	return func() {
		for _, q := range queues {
			q.unlock()
		}
		vhostuser.CloseFDs(s.discarded)
		s.discarded = nil
	}
}

// discardFDs closes descriptors of the front-end's once the request is served: whoever handed them over can have that take a while.
func (s *session) discardFDs(fds ...int) { s.discarded = append(s.discarded, fds...) }

// others runs f with every queue locked but q, whose lock is held already.
func (s *session) others(q *queue, f func()) {
	for _, o := range s.queues {
		if o != q {
			o.lock()
			defer o.unlock()
		}
	}
	f()
}

// GetFeatures implements vhostuser.Handler.
func (s *session) GetFeatures() uint64 { return uint64(s.b.features) }

// SetFeatures implements vhostuser.Handler.
func (s *session) SetFeatures(features uint64) error {
	old, f := s.negotiated(), virtio.Features(features)
	if f != old {
		for _, q := range s.queues {
			if q.started {
				return vhostuser.Fatal(fmt.Errorf("features change from %v to %v while queue %d runs", old, f, q.index))
			}
		}
	}
	s.features.Store(features)
	if err := s.b.dev.SetOffloads(offload.ToGuest(usable(f))); err != nil {
		return fmt.Errorf("offloads of the device: %w", err)
	}
	if !f.Has(virtio.FProtocolFeatures) {
		for _, q := range s.queues {
			q.enabled = true
		}
		return s.activate()
	}
	return nil
}

func (s *session) negotiated() virtio.Features { return virtio.Features(s.features.Load()) }

// GetProtocolFeatures implements vhostuser.Handler.
func (s *session) GetProtocolFeatures() vhostuser.ProtocolFeatures { return s.b.protocol }

// SetProtocolFeatures implements vhostuser.Handler.
func (s *session) SetProtocolFeatures(f vhostuser.ProtocolFeatures) error {
	s.protocol = f
	return nil
}

// SetOwner implements vhostuser.Handler.
func (s *session) SetOwner() error { return nil }

// ResetOwner implements vhostuser.Handler: the specification says to disable all rings, or to do nothing.
func (s *session) ResetOwner() error {
	for _, q := range s.queues {
		q.enabled = false
	}
	return s.activate()
}

// ResetDevice implements vhostuser.Handler.
func (s *session) ResetDevice() error {
	if err := s.stop(s.queues...); err != nil {
		return vhostuser.Fatal(err)
	}
	for _, q := range s.queues {
		q.enabled, q.broken = false, nil
		q.setup = ringSetup{}
	}
	s.features.Store(0)
	s.status.Store(0)
	return s.activate()
}

// GetQueueNum implements vhostuser.Handler.
func (s *session) GetQueueNum() uint64 { return uint64(s.b.opts.MaxPairs) }

// activate tells the device how many pairs are in use: those from the first on of which a ring is enabled. All queues are locked.
func (s *session) activate() error {
	for _, q := range s.queues {
		q.quiet()
	}
	n := 1
	for i := range s.b.opts.MaxPairs {
		if s.queues[2*i].enabled || s.queues[2*i+1].enabled {
			n = i + 1
		}
	}
	if n == s.activated {
		return nil
	}
	if err := s.b.dev.SetPairs(n); err != nil {
		return fmt.Errorf("%d queue pairs: %w", n, err)
	}
	s.activated = n
	return nil
}

// statusReset is the device status that resets the device (virtio-v1.2 §2.1).
const (
	statusReset      = 0
	statusNeedsReset = 64
)

// SetStatus implements vhostuser.Handler. A reset stops what runs: a front-end sends GET_VRING_BASE before, or does not care for the base.
func (s *session) SetStatus(status uint8) error {
	s.status.Store(uint32(status))
	if status != statusReset {
		return nil
	}
	if err := s.stopAll(); err != nil {
		return vhostuser.Fatal(err)
	}
	return nil
}

// GetStatus implements vhostuser.Handler.
func (s *session) GetStatus() uint8 {
	status := uint8(s.status.Load())
	for _, q := range s.queues {
		q.lock()
		if q.broken != nil {
			status |= statusNeedsReset
		}
		q.unlock()
	}
	return status
}

// SetBackendReqFD implements vhostuser.Handler.
func (s *session) SetBackendReqFD(back *vhostuser.BackendConn) error {
	if s.back != nil {
		_ = s.back.Close()
	}
	s.back = back
	return nil
}

// SendRARP implements vhostuser.Handler: the guest has moved here, and the switches on the way learn it from a frame with its address.
func (s *session) SendRARP(mac [6]byte) error {
	q := s.queues[1]
	q.lock()
	defer q.unlock()
	frame := zerocopy.NewBuffer(virtio.NetHdr{}, rarpFrame(mac))
	if s.b.dev.Queue(0).Send([]*zerocopy.Buffer{frame}) == 0 {
		return fmt.Errorf("RARP for %x: the device takes no frame now", mac)
	}
	return nil
}

// rarpFrame is a reverse ARP request (RFC 903), broadcast from mac for mac, padded to the shortest Ethernet frame without FCS.
func rarpFrame(mac [6]byte) []byte {
	f := make([]byte, 60)
	for i := range 6 {
		f[i] = 0xff
	}
	copy(f[6:], mac[:])
	binary.BigEndian.PutUint16(f[12:], 0x8035)
	arp := f[14:]
	binary.BigEndian.PutUint16(arp[0:], 1)      // Ethernet
	binary.BigEndian.PutUint16(arp[2:], 0x0800) // IPv4
	arp[4], arp[5] = 6, 4                       // address lengths
	binary.BigEndian.PutUint16(arp[6:], 3)      // request reverse
	copy(arp[8:], mac[:])                       // sender
	copy(arp[18:], mac[:])                      // target
	return f
}
