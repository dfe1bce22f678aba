package l2switch

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/zerocopy"
)

// slot is a frame that waits: data, and behind it what is left of buf after skip bytes. Without a buf, data is all of it.
type slot struct {
	first uint64 // the virtio-net header, as virtio.NetHdr.Words
	last  uint32
	data  []byte
	buf   *zerocopy.Buffer
	skip  int
	from  *queue // who sent it
}

// lost tells a frame that there was no memory to copy.
func (s *slot) lost() bool { return s.buf == nil && len(s.data) == 0 }

// rest appends what is left of b behind skip bytes.
func rest(to [][]byte, b *zerocopy.Buffer, skip int) [][]byte {
	segs := b.Segs()
	for i := range segs {
		m := segs[i].Mem
		if skip >= len(m) {
			skip -= len(m)
			continue
		}
		to = append(to, m[skip:])
		skip = 0
	}
	return to
}

// frags appends the frame's pieces.
func (s *slot) frags(to [][]byte) [][]byte {
	if len(s.data) > 0 {
		to = append(to, s.data)
	}
	if s.buf == nil {
		return to
	}
	return rest(to, s.buf, s.skip)
}

// What the receiveq's worker waits for.
const (
	awake     uint32 = iota // nothing: it will look at the lane before it waits
	forFrames               // a frame
	forRoom                 // the guest, to post more; it sees to being told of that itself
)

// lane is the frames on their way to one receiveq that could not be delivered on the spot, a bounded ring. Senders write head, with push held, and
// whoever takes frames out writes tail, with take held.
//
//	senders --> [slot][slot][slot][slot] --> Recv, or a sender that has got the Door
//	             ^ tail          ^ head
type lane struct {
	sw    *Switch
	index int
	push  sync.Mutex
	slots []slot // nil until it is needed
	head  atomic.Uint64

	take    sync.Mutex
	tail    atomic.Uint64
	scratch [][]byte
	mark    uint64 // what the last sweep saw as head: older than one period

	held     atomic.Int32  // frames with pages
	copied   atomic.Int64  // bytes of private memory in use
	slow     atomic.Bool   // pages have waited for too long here: what comes is copied at once, until all is gone
	frames   atomic.Uint64 // delivered
	bytes    atomic.Uint64
	tooBig   atomic.Uint64
	orphaned atomic.Uint64
	starved  atomic.Uint64 // lost for want of memory to copy them
	faulted  atomic.Uint64 // lost because their pages were gone when they were to be copied
	drainer  drainer

	door  atomic.Pointer[netdev.Door]
	shut  atomic.Bool   // nobody receives
	state atomic.Uint32 // of the worker
	ready *sys.EventFD  // readable when frames came while it waited for them
	rang  atomic.Bool   // ready was signalled since it was drained
	bell  sync.Mutex    // guards ready against its end: a sweep, or a sender, that found the port before it left may want to ring still

	shares [64]share // by sending port
}

func (l *lane) init(sw *Switch, index int) (err error) {
	l.index, l.sw, l.drainer = index, sw, drainer{l}
	if l.ready, err = sys.NewEventFD(); err != nil {
		return fmt.Errorf("receiveq: %w", err)
	}
	return nil
}

// share is what a sender has in the lane.
type share struct {
	frames atomic.Int32
	copied atomic.Int64 // bytes of lane.copied
}

// share finds a sender's. Ports whose indices are 64 apart have one in common.
func (l *lane) share(from *queue) *share { return &l.shares[from.port.index%len(l.shares)] }

// mayCopy reports whether a frame of n bytes of a sender's may be copied: it may have no more of them in the lane than there is room left, as with frames.
func (l *lane) mayCopy(from *queue, n int) bool {
	return l.copied.Load()+l.share(from).copied.Load()+int64(memoryOf(n)) <= int64(l.sw.cfg.BacklogBytes)
}

// copy counts n bytes of memory that a copy takes, or, below 0, that are free again.
func (l *lane) copy(from *queue, n int) {
	l.copied.Add(int64(n))
	l.share(from).copied.Add(int64(n))
}

// put appends a frame. When held is given, the first pieces, private in number, are copied, and the others are what is behind its first skip bytes, which is
// kept; without, all are copied. It reports whether there was room. A sender may have no more frames in the lane than there is room left, so that one which floods leaves some to others; so it is with the bytes of copies. push is held.
func (l *lane) put(from *queue, first uint64, last uint32, frags [][]byte, private int, held *zerocopy.Buffer, skip int) bool {
	if l.slots == nil {
		l.slots = make([]slot, l.sw.backlog)
	}
	head := l.head.Load()
	room := len(l.slots) - l.waiting()
	if int(l.share(from).frames.Load()) >= room {
		return false
	}
	s := l.at(head)
	if held != nil {
		frags = frags[:private]
		l.held.Add(1)
	} else if !l.mayCopy(from, pieces(frags)) {
		return false
	}
	if s.data = nil; len(frags) > 0 {
		s.data = gather(memory(pieces(frags)), frags)
	}
	if held == nil {
		l.copy(from, memoryOf(len(s.data)))
	}
	s.first, s.last, s.buf, s.skip, s.from = first, last, held, skip, from
	l.share(from).frames.Add(1)
	l.head.Store(head + 1)
	return true
}

// quiet reports whether the worker may sleep as it has: it waits for frames, there are none, and nobody has signalled ready.
func (l *lane) quiet() bool { return l.state.Load() == forFrames && l.empty() && !l.rang.Load() }

// empty reports whether no frame waits.
func (l *lane) empty() bool { return l.tail.Load() == l.head.Load() }

// waiting is the number of frames in the lane.
func (l *lane) waiting() int { return int(l.head.Load() - l.tail.Load()) }

// at is the slot of a cursor. There are slots once there was a frame.
func (l *lane) at(cursor uint64) *slot { return &l.slots[cursor&uint64(len(l.slots)-1)] }

// get moves frames into the guest's buffers: it returns when there are none (idle), when the guest must post more, or after max.
func (l *lane) get(p *zerocopy.Posted, max int) (n int, idle bool) {
	l.take.Lock()
	defer l.take.Unlock()
	return l.move(p, max)
}

// drain moves all frames into the guest's buffers, and reports whether that could be done. take is held.
func (l *lane) drain(p *zerocopy.Posted) bool {
	_, empty := l.move(p, l.sw.backlog)
	return empty
}

// move is get with take held.
func (l *lane) move(p *zerocopy.Posted, max int) (n int, empty bool) {
	for n < max {
		tail := l.tail.Load()
		if tail == l.head.Load() {
			l.slow.Store(false)
			return n, true
		}
		s := l.at(tail)
		if !s.lost() {
			l.scratch = s.frags(l.scratch[:0])
			r := p.WriteWords(s.first, s.last, l.scratch)
			if r == zerocopy.NoRoom {
				return n, false
			}
			l.count(r, pieces(l.scratch))
		}
		l.pop(s, tail, zerocopy.ZeroCopied)
		n++ // a frame that is lost is progress too
	}
	return n, l.empty()
}

func pieces(frags [][]byte) (n int) {
	for _, f := range frags {
		n += len(f)
	}
	return n
}

// count counts a frame of n bytes that was written, or was too big.
func (l *lane) count(r zerocopy.WriteResult, n int) {
	if r == zerocopy.TooBig {
		l.tooBig.Add(1)
		return
	}
	l.frames.Add(1)
	l.bytes.Add(uint64(n))
}

// pop frees the slot at tail. take is held.
func (l *lane) pop(s *slot, tail uint64, o zerocopy.Outcome) {
	b := s.buf
	freeMemory(s.data)
	l.leave(s, tail)
	if b != nil {
		b.Release(o)
	}
}

// leave takes the frame out of the slot at tail. take is held.
func (l *lane) leave(s *slot, tail uint64) {
	if s.buf == nil {
		l.copy(s.from, -memoryOf(len(s.data)))
	} else {
		l.held.Add(-1)
	}
	l.share(s.from).frames.Add(-1)
	s.buf, s.from, s.data = nil, nil, nil
	l.tail.Store(tail + 1)
}

// unwound drops the frame at tail, if its pages are a sender's: it may be these that have faulted, and would again.
func (l *lane) unwound() bool {
	l.take.Lock()
	defer l.take.Unlock()
	tail := l.tail.Load()
	if tail == l.head.Load() || l.at(tail).buf == nil {
		return false
	}
	l.pop(l.at(tail), tail, zerocopy.Dropped)
	return true
}

// discard drops all that waits, and returns how much.
func (l *lane) discard() (n int) {
	l.take.Lock()
	defer l.take.Unlock()
	for tail := l.tail.Load(); tail != l.head.Load(); tail++ {
		l.pop(l.at(tail), tail, zerocopy.Dropped)
		n++
	}
	l.slow.Store(false)
	return n
}

// arm says what the worker is about to wait for, and reports whether that has not come meanwhile.
func (l *lane) arm(state uint32) bool {
	if state == forFrames && l.rang.Swap(false) {
		l.ready.Drain()
	}
	l.state.Store(state)
	return state != forFrames || l.empty()
}

// rouse wakes the worker, if it waits for one of two things.
func (l *lane) rouse(state, or uint32) {
	s := l.state.Load()
	if s == awake || s != state && s != or || !l.state.CompareAndSwap(s, awake) {
		return
	}
	l.ring()
	if d := l.door.Load(); d != nil && s == forRoom {
		(*d).Wake()
	}
}

// ring signals ready.
func (l *lane) ring() {
	l.bell.Lock()
	defer l.bell.Unlock()
	if l.ready.FD() < 0 {
		return // the port has left
	}
	l.ready.Signal()
	l.rang.Store(true) // not before: who drains it then has drained this signal
}

// free closes the descriptor, once nobody waits for it any more.
func (l *lane) free() {
	l.bell.Lock()
	defer l.bell.Unlock()
	if l.ready != nil {
		_ = l.ready.Close()
	}
}
