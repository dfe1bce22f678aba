package zerocopy

import (
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
)

// segment is a frame in private memory.
type segment struct {
	hdr  virtio.NetHdr
	data []byte
}

// lower cuts the frame, or completes its checksum, and writes what comes of it. What does not fit now is kept for the next turn, so that
// a frame is taken whole or not at all.
func (p *Posted) lower(hdr virtio.NetHdr, frags [][]byte, takes offload.Set) WriteResult {
	if p.held() == 0 && !p.pop() {
		return p.count(NoRoom)
	}
	if err := p.seg.Start(hdr, frags, takes); err != nil {
		return p.count(TooBig)
	}
	for {
		h, n, payload, ok := p.seg.Next(p.head[:])
		if !ok {
			return Written
		}
		p.parts = append(append(p.parts[:0], p.head[:n]), payload...)
		if len(p.pending) == 0 {
			switch p.write(&h, p.parts) {
			case Written:
				continue
			case TooBig:
				p.Stats.TooBig++
				continue
			}
			p.Stats.NoRoom++
		}
		p.keep(h)
	}
}

// keep copies the frame in p.parts to the end of pending.
func (p *Posted) keep(hdr virtio.NetHdr) {
	n := len(p.pending)
	if n == cap(p.pending) {
		p.pending = append(p.pending, segment{})[:n]
	}
	s := &p.pending[:n+1][n]
	s.hdr, s.data = hdr, s.data[:0]
	for _, f := range p.parts {
		s.data = append(s.data, f...)
	}
	p.pending = p.pending[:n+1] // last: the sender's memory may fault, and half a frame is none
}

// Flush begins a turn: it writes what is left of a frame that was cut. It reports false when the guest has not posted enough.
func (p *Posted) Flush() bool {
	p.refused = 0
	return p.flush()
}

func (p *Posted) flush() bool {
	for ; p.flushed < len(p.pending); p.flushed++ {
		s := &p.pending[p.flushed]
		p.parts = append(p.parts[:0], s.data)
		switch p.write(&s.hdr, p.parts) {
		case NoRoom:
			return false
		case TooBig:
			p.Stats.TooBig++
		}
	}
	p.pending, p.flushed = p.pending[:0], 0 // its memory is kept for the next frame
	return true
}

// Waiting is the number of frames that wait for room in private memory: the rest of one that was cut.
func (p *Posted) Waiting() int { return len(p.pending) - p.flushed }

// Rest is what waited for room when a receiveq stopped, in private memory. The zero Rest is nothing.
type Rest struct {
	segments []segment
	hdrLen   int
	accept   offload.Set
}

// Len is the number of frames.
func (r Rest) Len() int { return len(r.segments) }

// Close returns what waits for room, of a queue that has stopped.
func (p *Posted) Close() (r Rest) {
	r = Rest{p.pending[p.flushed:], p.hdrLen, p.accept}
	p.pending, p.flushed = nil, 0
	return r
}

// Inherit begins with what waited when the queue stopped, so that stopping and starting a guest cuts no frame short. What was made for a driver that accepted
// other offloads is lost, and counted.
func (p *Posted) Inherit(r Rest) {
	if r.hdrLen != p.hdrLen || r.accept != p.accept {
		p.Stats.TooBig += uint64(len(r.segments))
		return
	}
	p.pending = r.segments
}
