package udp

import (
	"math"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/zerocopy"
)

const (
	// maxFrags is how many pages a datagram refers to at most (the kernel's MAX_SKB_FRAGS, in its usual configuration).
	maxFrags = 17
	// maxPieces is how many pieces of memory go to the kernel at once, with the tunnel header.
	maxPieces = sys.MaxIovecs - 1
	// skbExtra is what the kernel counts for a datagram beside its bytes, at most.
	skbExtra = 2048
)

// sender sends frames. It belongs to the transmitq's worker, but for the counters.
type sender struct {
	min     int    // bytes from which a frame goes without a copy
	tunnel  []byte // before every frame
	remotes []sys.Sockaddr
	table   *table // nil: nothing is learnt
	socks   []outSocket
	flights *flights // nil: all frames are copied

	registered    *registered // nil: no memory is
	minRegistered int         // bytes from which a frame of registered memory goes without a copy

	head   [headLen]byte
	known  [1]sys.Sockaddr
	now    time.Time // of the batch
	full   int       // descriptor of the socket that had no room
	pages  pageSends
	copied []*zerocopy.Buffer // queued in the sockets
	reason []zerocopy.Outcome // by frame of copied
	sent   []bool             // by frame of copied: to one peer at least
	mark   func(frame int, errno unix.Errno)
	linear []byte // for frames of more than maxPieces

	dropped, flooded atomic.Uint64
}

// Send implements netdev.Queue.
func (q *queue) Send(bufs []*zerocopy.Buffer) int {
	s := &q.send
	if s.table != nil {
		s.now = time.Now()
	}
	n := 0
	for n < len(bufs) && s.admit(bufs[n]) {
		n++
	}
	s.flush()
	return n
}

// plan is how a frame is to leave.
type plan struct {
	outcome zerocopy.Outcome // ZeroCopied, or why it is copied
	chunk   int              // of registered memory that its pages lie in, or -1
	frags   int              // pages that its datagram refers to
	pull    int              // bytes of the frame that join the tunnel header in private memory
}

// admit queues a frame. It reports false when the frame's socket has no room.
func (s *sender) admit(b *zerocopy.Buffer) bool {
	head := s.headers(b)
	peers := s.route(head)
	sock := &s.socks[flowHash(head)%uint32(len(s.socks))]
	p := s.choose(b, len(peers))
	need := (2*b.Len() + skbExtra) * len(peers)
	if p.outcome == zerocopy.ZeroCopied {
		need = max(need, p.frags*sys.PageSize+skbExtra)
	}
	if !s.room(sock, need) {
		s.full = sock.fd
		return false
	}
	if p.outcome == zerocopy.ZeroCopied {
		var slot int
		if slot, p.outcome = s.flights.take(b); p.outcome == zerocopy.ZeroCopied {
			s.sendCopies()
			s.send(b, slot, sock, &peers[0], p)
			return true
		}
	}
	s.copy(b, sock, peers, p.outcome)
	return true
}

// send queues a frame to leave without a copy.
func (s *sender) send(b *zerocopy.Buffer, slot int, sock *outSocket, peer *sys.Sockaddr, p plan) {
	r := s.registered
	if p.chunk >= 0 && p.pull > 0 && r.page(p.chunk, slot) == nil {
		p.chunk = -1
	}
	if p.chunk < 0 {
		r = nil
	}
	s.pages.begin(sock.fd, slot, p.chunk, peer)
	s.pages.lens, s.pages.frags = append(s.pages.lens, len(s.tunnel)+b.Len()), append(s.pages.frags, p.frags)
	s.pages.msgs.Add(s.before(b, slot, p))
	skip := p.pull
	for _, seg := range b.Segs() {
		n := min(skip, len(seg.Mem))
		skip -= n
		mem := seg.Mem[n:]
		if r != nil && len(mem) > 0 {
			mem = r.again(p.chunk, mem)
		}
		s.pages.msgs.Add(mem)
	}
}

// headers copies the first bytes of a frame, once: what is decided on. Those of its first segment do if its headers lie there, as they do where the
// guest keeps them apart from a large payload: that is in no cache, and to touch it costs more than all else that is done here.
func (s *sender) headers(b *zerocopy.Buffer) []byte {
	head := s.head[:copy(s.head[:], b.Segs()[0].Mem)]
	if len(head) < flowLen(head) {
		head = s.head[:b.CopyTo(s.head[:], 0)]
	}
	return head
}

// room reports whether sock has room for n bytes, so that the kernel will not refuse a frame that was queued. The kernel is asked only when what is
// known does not do.
func (s *sender) room(sock *outSocket, n int) bool {
	if sock.take(n) {
		return true
	}
	s.flush()
	sock.refresh()
	return sock.take(n)
}

// route finds the peers that a frame goes to.
func (s *sender) route(head []byte) []sys.Sockaddr {
	dst := mac(head) // no frame is shorter
	if dst[0]&multicastSource == 0 && s.table != nil {
		if peer, ok := s.table.lookup(dst, s.now); ok {
			s.known[0] = peer
			return s.known[:]
		}
	}
	if len(s.remotes) > 1 {
		s.flooded.Add(1)
	}
	return s.remotes
}

// choose says how a frame is to leave as far as that depends on the frame.
func (s *sender) choose(b *zerocopy.Buffer, peers int) plan {
	switch {
	case s.flights == nil:
		return plan{outcome: zerocopy.Copied}
	case b.Len() < s.min && (s.registered == nil || b.Len() < s.minRegistered):
		return plan{outcome: zerocopy.CopiedSmall}
	case peers > 1:
		return plan{outcome: zerocopy.CopiedFallback}
	}
	if s.registered != nil {
		if chunk, before, ok := s.registered.find(b); ok {
			if frags, pull := s.fit(b, before); frags <= maxFrags {
				return plan{zerocopy.ZeroCopied, chunk, frags, pull}
			}
		}
		if b.Len() < s.min {
			return plan{outcome: zerocopy.CopiedSmall}
		}
	}
	frags, pull := s.fit(b, 0)
	if frags > maxFrags {
		return plan{outcome: zerocopy.CopiedFallback}
	}
	return plan{zerocopy.ZeroCopied, -1, frags, pull}
}

// fit counts the pages that a frame's datagram refers to, when its first pull bytes join the tunnel header in private memory. Where they are too
// many, up to a page of bytes in all does: then pull is larger.
func (s *sender) fit(b *zerocopy.Buffer, atLeast int) (frags, pull int) {
	segs := b.Segs()
	frags, pull = 1, atLeast // the tunnel header's, or what is pulled
	skip := atLeast
	for i := range segs {
		n := min(skip, len(segs[i].Mem))
		skip -= n
		frags += pagesOf(segs[i].Mem[n:])
	}
	skip = atLeast
	for i := 0; i < len(segs) && frags > maxFrags; i++ {
		n := min(skip, len(segs[i].Mem))
		skip -= n
		for rest := segs[i].Mem[n:]; len(rest) > 0 && frags > maxFrags; frags-- {
			n := min(len(rest), sys.PageSize-sys.PageOffset(rest))
			if len(s.tunnel)+pull+n > sys.PageSize {
				return math.MaxInt16, 0
			}
			pull += n
			rest = rest[n:]
		}
	}
	return frags, pull
}

// pagesOf is the number of pages that b lies in.
func pagesOf(b []byte) int {
	if len(b) == 0 {
		return 0
	}
	return (sys.PageOffset(b) + len(b) + sys.PageSize - 1) / sys.PageSize
}

// before is what comes before the pages: the tunnel header, and the frame's first bytes where they are pulled.
func (s *sender) before(b *zerocopy.Buffer, slot int, p plan) []byte {
	switch {
	case p.pull == 0 && p.chunk < 0:
		return s.tunnel
	case p.pull == 0:
		return s.registered.header(p.chunk)
	}
	var page []byte
	if p.chunk < 0 {
		page = s.flights.page(slot)
	} else {
		page = s.registered.page(p.chunk, slot)
	}
	n := copy(page, s.tunnel)
	return page[:n+b.CopyTo(page[n:n+p.pull], 0)]
}

// copy queues a frame to be copied by sendmmsg, once for every peer.
func (s *sender) copy(b *zerocopy.Buffer, sock *outSocket, peers []sys.Sockaddr, o zerocopy.Outcome) {
	s.launch()
	frame := len(s.copied)
	s.copied, s.reason, s.sent = append(s.copied, b), append(s.reason, o), append(s.sent, false)
	segs := b.Segs()
	flat := len(segs) > maxPieces
	if flat {
		s.linear = append(s.linear[:0], make([]byte, b.Len())...)
		b.CopyTo(s.linear, 0)
	}
	for i := range peers {
		sock.copies.Begin(&peers[i])
		sock.owner = append(sock.owner, frame)
		sock.copies.Add(s.tunnel)
		if flat {
			sock.copies.Add(s.linear)
			continue
		}
		for j := range segs {
			sock.copies.Add(segs[j].Mem)
		}
	}
	if flat {
		s.sendCopies() // linear serves the next one
	}
}

func (s *sender) flush() {
	s.launch()
	s.sendCopies()
}

// sendCopies sends what was queued to be copied, and releases it.
func (s *sender) sendCopies() {
	if len(s.copied) == 0 {
		return
	}
	for i := range s.socks {
		s.socks[i].sendCopies(s.mark)
	}
	start := 0
	for i := range s.copied {
		if !s.sent[i] {
			s.reason[i] = zerocopy.Dropped
			s.dropped.Add(1)
		}
		if s.reason[i] != s.reason[start] {
			zerocopy.ReleaseAll(s.copied[start:i], s.reason[start])
			start = i
		}
	}
	zerocopy.ReleaseAll(s.copied[start:], s.reason[start])
	clear(s.copied)
	s.copied, s.reason, s.sent = s.copied[:0], s.reason[:0], s.sent[:0]
}

// marked takes note of a datagram that left. What the kernel refuses now (no route, a filter, no memory) it would refuse again, or too late.
func (s *sender) marked(frame int, errno unix.Errno) {
	if errno == 0 {
		s.sent[frame] = true
	}
}

// launch submits what was queued to leave without a copy.
func (s *sender) launch() {
	if s.pages.msgs.Len() == 0 {
		return
	}
	s.dropped.Add(s.flights.launch(&s.pages))
	s.pages.reset()
}

// Reap implements netdev.Queue.
func (q *queue) Reap() {
	if f := q.send.flights; f != nil && f.out.Load() > 0 {
		q.send.dropped.Add(f.turn())
	}
}

// SendUnwound implements netdev.Unwinder: what is queued has not been handed to the kernel, and is dropped.
func (q *queue) SendUnwound() {
	s := &q.send
	if s.flights != nil {
		s.flights.giveUp(s.pages.slots)
	}
	for _, b := range s.copied {
		b.Release(zerocopy.Dropped)
	}
	s.dropped.Add(uint64(len(s.pages.slots) + len(s.copied)))
	s.pages.reset()
	for i := range s.socks {
		s.socks[i].forget()
	}
	clear(s.copied)
	s.copied, s.reason, s.sent = s.copied[:0], s.reason[:0], s.sent[:0]
}

// RecvUnwound implements netdev.Unwinder: frames that were received lie in private memory.
func (q *queue) RecvUnwound() {}

// CompletionFD implements netdev.Completer.
func (q *queue) CompletionFD() int {
	if f := q.send.flights; f != nil {
		return f.engine.fd()
	}
	return -1
}

// SendFD implements netdev.Queue: it is writable when the socket that had no room has got half of its buffer back.
func (q *queue) SendFD() int { return q.send.full }

// pageSends are frames that are about to leave without a copy.
type pageSends struct {
	msgs   sys.Msgs
	fds    []int // by datagram
	slots  []int // by datagram
	chunks []int // by datagram: the registered buffer that all of it lies in, or -1
	lens   []int // by datagram: bytes
	frags  []int // by datagram: pages that it refers to, at most
}

func (p *pageSends) reset() {
	p.msgs.Reset()
	p.fds, p.slots, p.chunks = p.fds[:0], p.slots[:0], p.chunks[:0]
	p.lens, p.frags = p.lens[:0], p.frags[:0]
}

// begin starts another datagram, without a piece yet.
func (p *pageSends) begin(fd, slot, chunk int, to *sys.Sockaddr) {
	p.msgs.Begin(to)
	p.fds, p.slots, p.chunks = append(p.fds, fd), append(p.slots, slot), append(p.chunks, chunk)
}
