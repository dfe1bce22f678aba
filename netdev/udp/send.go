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

// admit queues a frame. It reports false when the frame's socket has no room.
func (s *sender) admit(b *zerocopy.Buffer) bool {
	head := s.head[:b.CopyTo(s.head[:], 0)]
	peers := s.route(head)
	sock := &s.socks[flowHash(head)%uint32(len(s.socks))]
	o := s.choose(b, len(peers))
	need := (2*b.Len() + skbExtra) * len(peers)
	pull := 0
	if o == zerocopy.ZeroCopied {
		var frags int
		if frags, pull = s.fit(b); frags > maxFrags {
			o = zerocopy.CopiedFallback
		}
		need = max(need, frags*sys.PageSize+skbExtra)
	}
	if !s.room(sock, need) {
		s.full = sock.fd
		return false
	}
	if o == zerocopy.ZeroCopied {
		var slot int
		if slot, o = s.flights.take(b); o == zerocopy.ZeroCopied {
			s.sendCopies()
			s.pages.add(sock.fd, slot, s.datagram(b, slot, pull), &peers[0], b, pull)
			return true
		}
	}
	s.copy(b, sock, peers, o)
	return true
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
func (s *sender) choose(b *zerocopy.Buffer, peers int) zerocopy.Outcome {
	switch {
	case s.flights == nil:
		return zerocopy.Copied
	case b.Len() < s.min:
		return zerocopy.CopiedSmall
	case peers > 1:
		return zerocopy.CopiedFallback
	}
	return zerocopy.ZeroCopied
}

// fit counts the pages that a frame's datagram refers to. Where they are too many, up to a page of the frame's first bytes joins the tunnel header in
// private memory: pull says how many bytes.
func (s *sender) fit(b *zerocopy.Buffer) (frags, pull int) {
	segs := b.Segs()
	for i := range segs {
		frags += (sys.PageOffset(segs[i].Mem) + len(segs[i].Mem) + sys.PageSize - 1) / sys.PageSize
	}
	frags++ // the tunnel header's, or what is pulled
	for i := 0; i < len(segs) && frags > maxFrags; i++ {
		for rest := segs[i].Mem; len(rest) > 0 && frags > maxFrags; frags-- {
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

// datagram is what comes before the pages: the tunnel header, and the frame's first bytes where they were pulled.
func (s *sender) datagram(b *zerocopy.Buffer, slot, pull int) []byte {
	if pull == 0 {
		return s.tunnel
	}
	page := s.flights.page(slot)
	n := copy(page, s.tunnel)
	return page[:n+b.CopyTo(page[n:n+pull], 0)]
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

// SendFD implements netdev.Queue: it is writable when the socket that had no room has got half of its buffer back.
func (q *queue) SendFD() int { return q.send.full }

// pageSends are frames that are about to leave without a copy.
type pageSends struct {
	msgs  sys.Msgs
	fds   []int // by datagram
	slots []int // by datagram
}

func (p *pageSends) reset() {
	p.msgs.Reset()
	p.fds, p.slots = p.fds[:0], p.slots[:0]
}

// add queues a frame, without its first skip bytes, behind before.
func (p *pageSends) add(fd, slot int, before []byte, to *sys.Sockaddr, b *zerocopy.Buffer, skip int) {
	p.msgs.Begin(to)
	p.fds, p.slots = append(p.fds, fd), append(p.slots, slot)
	p.msgs.Add(before)
	for _, s := range b.Segs() {
		n := min(skip, len(s.Mem))
		skip -= n
		p.msgs.Add(s.Mem[n:])
	}
}
