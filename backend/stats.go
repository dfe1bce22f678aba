package backend

import (
	"strings"
	"sync"

	"github.com/vhostd/vhostd/zerocopy"
)

// counters are what the queue counts by itself while its ring runs.
type counters struct {
	kicks, calls, waits uint64
	callErrors, invalid uint64
	cut                 uint64 // segments that waited for room when the session ended
	deviceFailed        bool
}

// Stats is a snapshot of a Backend's state and counters.
type Stats struct {
	Connected      bool         `json:"connected"`
	Sessions       uint64       `json:"sessions"`
	FrontEndErrors uint64       `json:"front_end_errors"`
	GuestErrors    uint64       `json:"guest_errors"`
	Features       []string     `json:"features"` // negotiated
	MemoryRegions  int          `json:"memory_regions"`
	MemoryBytes    uint64       `json:"memory_bytes"`
	Device         DeviceStats  `json:"device"`
	Queues         []QueueStats `json:"queues"`
}

// DeviceStats describe the netdev.
type DeviceStats struct {
	Kind     string `json:"kind"`
	Name     string `json:"name,omitempty"`
	MTU      int    `json:"mtu,omitempty"`
	Pairs    int    `json:"pairs"`
	ZeroCopy string `json:"zero_copy"`
}

// QueueStats are the counters of a queue, over all sessions; the state and the gauges are those of the ring that runs.
type QueueStats struct {
	Index     int    `json:"index"`
	Direction string `json:"direction"` // FromGuest or ToGuest
	Size      int    `json:"size,omitempty"`
	Started   bool   `json:"started"`
	Enabled   bool   `json:"enabled"`
	Broken    string `json:"broken,omitempty"` // why the ring stands still

	Frames     uint64            `json:"frames"`
	Bytes      uint64            `json:"bytes"`
	Outcomes   map[string]uint64 `json:"outcomes,omitempty"` // of a transmitq: frames by what became of their pages
	Pending    int               `json:"pending,omitempty"`
	MaxPending int               `json:"max_pending,omitempty"`
	MaxWaitNs  int64             `json:"max_wait_ns,omitempty"` // longest wait of the used ring for one frame
	GivenUp    uint64            `json:"given_up,omitempty"`

	Malformed   uint64 `json:"malformed"`
	Invalid     uint64 `json:"invalid,omitempty"` // frames with a virtio-net header that makes no sense
	TooBig      uint64 `json:"too_big,omitempty"`
	NoRoom      uint64 `json:"no_room,omitempty"`
	SendDropped uint64 `json:"send_dropped,omitempty"`
	RecvDropped uint64 `json:"recv_dropped,omitempty"`

	Kicks        uint64 `json:"kicks"`
	Calls        uint64 `json:"calls"`
	Waits        uint64 `json:"waits"`
	NotifyErrors uint64 `json:"notify_errors,omitempty"` // calls that could not be made
}

// total are the counters of a queue's rings that have stopped.
type total struct {
	mu sync.Mutex // innermost
	QueueStats
}

// Stats returns a snapshot. It waits for a queue's current batch, and for no more than the drain timeout when a ring stops just now.
func (b *Backend) Stats() Stats {
	caps := b.dev.Capabilities()
	b.mu.Lock()
	s, sessions := b.current, b.sessions
	b.mu.Unlock()
	st := Stats{
		Sessions: sessions, FrontEndErrors: b.frontEndErrors.Load(), GuestErrors: b.guestErrors.Load(), Features: []string{},
		Device: DeviceStats{Kind: caps.Kind, Name: caps.Name, MTU: caps.MTU, Pairs: b.opts.MaxPairs, ZeroCopy: caps.ZeroCopy},
		Queues: make([]QueueStats, len(b.totals)),
	}
	if s != nil {
		st.Connected = true
		if f := s.negotiated(); f != 0 {
			st.Features = strings.Split(f.String(), ",")
		}
		st.MemoryRegions, st.MemoryBytes = int(s.memRegions.Load()), s.memBytes.Load()
	}
	for i := range st.Queues {
		st.Queues[i] = b.queueStats(s, i)
	}
	return st
}

func (b *Backend) queueStats(s *session, i int) QueueStats {
	var st QueueStats
	if s != nil {
		q := s.queues[i]
		q.lock()
		defer q.unlockUnchanged()
		q.addTo(&st)
		st.Size, st.Started, st.Enabled = q.setup.size, q.started, q.enabled
		if q.broken != nil {
			st.Broken = q.broken.Error()
		}
		if q.window != nil {
			st.Pending = q.window.Pending()
		}
	}
	t := &b.totals[i]
	t.mu.Lock()
	st.add(&t.QueueStats)
	t.mu.Unlock()
	st.Index, st.Direction = i, "ToGuest"
	c := b.dev.Queue(i / 2).Counters()
	if i%2 == 1 {
		st.Direction, st.SendDropped = "FromGuest", c.SendDropped
	} else {
		st.RecvDropped = c.RecvDropped
	}
	return st
}

// addTo adds what the queue and its ring have counted since they started. The queue is locked.
func (q *queue) addTo(st *QueueStats) {
	l := &q.live
	st.Kicks += l.kicks
	st.Calls += l.calls
	st.Waits += l.waits
	st.Invalid += l.invalid
	st.TooBig += l.cut
	st.NotifyErrors += l.callErrors
	if w := q.window; w != nil {
		st.addWindow(&w.Stats)
		st.MaxWaitNs = max(st.MaxWaitNs, w.LongestWait().Nanoseconds())
	}
	if p := q.posted; p != nil {
		st.Frames += p.Stats.Frames
		st.Bytes += p.Stats.Bytes
		st.TooBig += p.Stats.TooBig
		st.NoRoom += p.Stats.NoRoom
		st.Malformed += p.Stats.Malformed
	}
}

func (st *QueueStats) addWindow(w *zerocopy.WindowStats) {
	for o, n := range w.Frames {
		st.Frames += n
		st.outcome(zerocopy.Outcome(o).String(), n)
	}
	st.Bytes += w.Bytes
	st.Malformed += w.Malformed
	st.GivenUp += w.GivenUp
	st.MaxPending = max(st.MaxPending, w.MaxPending)
}

func (st *QueueStats) outcome(name string, n uint64) {
	if n == 0 {
		return
	}
	if st.Outcomes == nil {
		st.Outcomes = map[string]uint64{}
	}
	st.Outcomes[name] += n
}

// add adds the counters of o.
func (st *QueueStats) add(o *QueueStats) {
	st.Frames += o.Frames
	st.Bytes += o.Bytes
	for name, n := range o.Outcomes {
		st.outcome(name, n)
	}
	st.MaxPending = max(st.MaxPending, o.MaxPending)
	st.MaxWaitNs = max(st.MaxWaitNs, o.MaxWaitNs)
	st.GivenUp += o.GivenUp
	st.Malformed += o.Malformed
	st.Invalid += o.Invalid
	st.TooBig += o.TooBig
	st.NoRoom += o.NoRoom
	st.Kicks += o.Kicks
	st.Calls += o.Calls
	st.Waits += o.Waits
	st.NotifyErrors += o.NotifyErrors
}

// fold moves the counters of the ring that has stopped to the Backend's totals. The queue is locked.
func (q *queue) fold() {
	var st QueueStats
	q.addTo(&st)
	q.live = counters{}
	t := &q.s.b.totals[q.index]
	t.mu.Lock()
	defer t.mu.Unlock()
	t.add(&st)
}
