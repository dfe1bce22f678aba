package pair

import (
	"sync"
	"sync/atomic"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/zerocopy"
)

// slot is a frame on its way.
type slot struct {
	first uint64 // the virtio-net header, as virtio.NetHdr.Words
	last  uint32
	data  []byte           // the copy; its memory is reused
	buf   *zerocopy.Buffer // instead of the copy, when pages are held
}

// link is one direction of a queue pair. The cursors only grow: senders write head, receivers write tail.
type link struct {
	hold bool

	send    sync.Mutex // senders: two queue pairs, when the other side uses fewer
	recv    sync.Mutex // the receiver, and who releases or orphans by hand
	slots   []slot
	head    atomic.Uint64
	tail    atomic.Uint64
	dropped atomic.Uint64

	ready   *sys.EventFD // readable when frames came after arm
	room    *sys.EventFD // blocked for writing when the ring was full
	waiting atomic.Bool  // the receiver is about to look at ready
	full    atomic.Bool  // the sender looks at room

	severed atomic.Bool // nobody will receive any more
	users   atomic.Int32
}

func newLink(o Options) (*link, error) {
	l := &link{hold: o.Hold, slots: make([]slot, o.Slots)}
	var err error
	if l.ready, err = sys.NewEventFD(); err != nil {
		return nil, err
	}
	if l.room, err = sys.NewEventFD(); err != nil {
		_ = l.ready.Close()
		return nil, err
	}
	l.users.Store(2)
	return l, nil
}

// close gives up one end; the last closes the descriptors.
func (l *link) close() {
	if l.users.Add(-1) == 0 {
		_ = l.ready.Close()
		_ = l.room.Close()
	}
}

func (l *link) at(cursor uint64) *slot { return &l.slots[cursor%uint64(len(l.slots))] }

// free is the number of slots that can be filled. The caller is the sender.
func (l *link) free() int { return len(l.slots) - int(l.head.Load()-l.tail.Load()) }

// put takes frames while there is room.
func (l *link) put(bufs []*zerocopy.Buffer) int {
	l.send.Lock()
	defer l.send.Unlock()
	if l.severed.Load() {
		l.dropped.Add(uint64(len(bufs)))
		zerocopy.ReleaseAll(bufs, zerocopy.Dropped)
		return len(bufs)
	}
	n := l.fill(bufs)
	if n < len(bufs) && l.block() {
		n += l.fill(bufs[n:])
	}
	return n
}

// fill puts frames into the slots that are free.
func (l *link) fill(bufs []*zerocopy.Buffer) int {
	n := min(l.free(), len(bufs))
	if n == 0 {
		return 0
	}
	head := l.head.Load()
	for i, b := range bufs[:n] {
		s := l.at(head + uint64(i))
		s.first, s.last = b.HeaderWords()
		if l.hold {
			s.buf = b
		} else {
			s.copy(b)
		}
	}
	l.head.Store(head + uint64(n))
	if !l.hold {
		zerocopy.ReleaseAll(bufs[:n], zerocopy.Copied)
	}
	if l.severed.Load() {
		l.discard(len(l.slots), zerocopy.Dropped) // the receiver left while we were at it
	}
	if l.waiting.Load() && l.waiting.CompareAndSwap(true, false) {
		l.ready.Signal()
	}
	return n
}

func (s *slot) copy(b *zerocopy.Buffer) {
	n := b.Len()
	if cap(s.data) < n {
		s.data = make([]byte, n)
	}
	s.data = s.data[:n]
	b.CopyTo(s.data, 0)
}

// frags appends the frame's fragments to to.
func (s *slot) frags(to [][]byte) [][]byte {
	if s.buf == nil {
		return append(to, s.data)
	}
	for _, seg := range s.buf.Segs() {
		to = append(to, seg.Mem)
	}
	return to
}

// block makes room unwritable, and reports whether there is room by now after all.
func (l *link) block() bool {
	l.room.Block()
	l.full.Store(true)
	return l.free() > 0
}

// freed says that slots were freed. The caller holds recv.
func (l *link) freed() {
	if l.full.Load() && l.full.CompareAndSwap(true, false) {
		l.room.Drain()
	}
}

// get moves frames into the guest's buffers.
func (l *link) get(p *zerocopy.Posted, max int, scratch *[][]byte) (n int, idle bool, tooBig int) {
	if l.tail.Load() == l.head.Load() {
		return 0, true, 0 // what a receiver that polls finds mostly
	}
	l.recv.Lock()
	defer l.recv.Unlock()
	defer l.freed()
	for n < max {
		tail := l.tail.Load()
		if tail == l.head.Load() {
			return n, true, tooBig
		}
		s := l.at(tail)
		*scratch = s.frags((*scratch)[:0])
		switch p.WriteWords(s.first, s.last, *scratch) {
		case zerocopy.NoRoom:
			return n, false, tooBig
		case zerocopy.TooBig:
			tooBig++
			fallthrough
		default:
			n++ // a frame that is lost is progress too
		}
		l.pop(s, tail, zerocopy.ZeroCopied)
	}
	return n, false, tooBig
}

// pop frees the slot at tail.
func (l *link) pop(s *slot, tail uint64, o zerocopy.Outcome) {
	b := s.buf
	s.buf = nil
	l.tail.Store(tail + 1)
	if b != nil {
		b.Release(o)
	}
}

// unwound drops the frame at tail, if its pages are the sender's: it may be these that have faulted, and would again.
func (l *link) unwound() {
	if l.hold && l.discard(1, zerocopy.Dropped) > 0 {
		l.dropped.Add(1)
	}
}

// arm has ready tell of frames, of those that are there already too. Until then no sender makes a system call for it.
func (l *link) arm() {
	if l.waiting.Load() {
		return
	}
	l.ready.Drain()
	l.waiting.Store(true)
	if l.tail.Load() != l.head.Load() && l.waiting.CompareAndSwap(true, false) {
		l.ready.Signal()
	}
}

func (l *link) held() int {
	if !l.hold {
		return 0
	}
	return int(l.head.Load() - l.tail.Load())
}

// discard frees the first n slots, if there are as many.
func (l *link) discard(n int, o zerocopy.Outcome) (discarded int) {
	l.recv.Lock()
	defer l.recv.Unlock()
	for tail := l.tail.Load(); discarded < n && tail != l.head.Load(); tail++ {
		l.pop(l.at(tail), tail, o)
		discarded++
	}
	if discarded > 0 {
		l.freed()
	}
	return discarded
}

// cut tells the sender that nobody receives any more.
func (l *link) cut() {
	l.severed.Store(true)
	l.discard(len(l.slots), zerocopy.Dropped)
}
