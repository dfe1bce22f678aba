package zerocopy

import (
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// numBuffers is where num_buffers lies in the last word of a header, oneBuffer that field of a frame in one buffer.
const (
	oneBuffer  = 1 << 16
	numBuffers = 0xffff << 16
)

// WriteNext is WriteWords for nearly every frame: it is in one piece, needs nothing done in software, and fits into buffers of one segment. It reports false, and
// has done nothing, where that is not so, or where the guest has posted too little.
func (p *Posted) WriteNext(first uint64, last uint32, frame []byte) bool {
	switch {
	case p.lent > 0 || len(p.pending) > 0:
		return false
	case !virtio.NetHdrAsks(first):
		first, last = 0, 0
	case !p.accept.TakesWords(first):
		return false
	}
	last &^= numBuffers
	return p.writeNext(first, last, frame) || p.mergeNext(first, last, frame)
}

// writeNext is write for nearly every frame: it fits into the one segment of the guest's next buffer. The header comes as virtio.NetHdr.Words, in registers: a
// load of what was just stored in smaller pieces waits until those are in the cache, and so behind all stores to the guest's memory.
func (p *Posted) writeNext(first uint64, last uint32, frame []byte) bool {
	if p.first == p.last && !p.popAhead() {
		return false
	}
	c := p.front()
	total := p.hdrLen + len(frame)
	if len(c.Segs) != 1 || len(c.Segs[0].Mem) < total || p.flattened > p.first {
		return false
	}
	dst := c.Segs[0].Mem[:total]
	virtio.PutNetHdr(dst[:p.hdrLen], first, last|oneBuffer)
	shm.Copy(dst[p.hdrLen:], frame)
	p.ring.View().Dirty(c.Segs[0].Addr, uint64(total))
	p.ring.Put(c.Head, uint32(total))
	p.first++
	p.room -= int(c.WriteLen)
	p.Stats.Frames++
	p.Stats.Bytes += uint64(len(frame))
	p.typical = total
	p.prefetch()
	return true
}

// lookAhead is how many chains are popped at once.
const lookAhead = 16

// inFlight is how many of the chains that are held have had their memory asked for. It was last in the driver's hands, so each costs a trip to another
// processor's cache, and these trips are made at the same time. More than a few at once are worse than none, where the processors are far apart: the stores
// to the first of them wait behind the requests for the last.
const inFlight = 4

// maxPrefetch bounds how much of a buffer is asked for, in bytes: behind that, the processor has seen where this leads.
const maxPrefetch = 128

// prefetch asks for the memory of the chain that has now come into flight.
func (p *Posted) prefetch() {
	if i := p.first + inFlight - 1; i < p.last {
		p.chains[i&p.mask].Prefetch(min(p.typical, maxPrefetch))
	}
}

// popAhead holds a run of chains, and asks for the memory that is about to be written. Nothing is held.
func (p *Posted) popAhead() bool {
	if !p.pop() {
		return false
	}
	p.front().Prefetch(min(p.typical, maxPrefetch))
	p.popRun()
	p.ring.PrefetchUsed(p.held())
	return true
}

// popRun holds a run of chains more, and asks for the memory of those that come next. It returns how many there were.
func (p *Posted) popRun() (n int) {
	at := int(p.last & p.mask)
	room := min(lookAhead-1, len(p.chains)-at, min(len(p.chains), maxMerge)-p.held())
	run := p.chains[at : at+room]
	run = run[:p.ring.PopRun(run)]
	for i := range run {
		c := &run[i]
		if c.Readable != 0 || int(c.WriteLen) <= p.hdrLen {
			p.ring.Unpop(len(run) - i) // its turn comes when nothing is held
			return i
		}
		p.last++
		p.room += int(c.WriteLen)
		if p.held() <= inFlight {
			c.Prefetch(min(p.typical, maxPrefetch))
		}
	}
	return len(run)
}

// mergeNext is write for nearly every frame that is longer than a buffer: it goes over several, each of one segment.
func (p *Posted) mergeNext(first uint64, last uint32, frame []byte) bool {
	total := p.hdrLen + len(frame)
	n := p.spanAhead(total)
	if n == 0 {
		return false
	}
	p.typical = total
	dst := p.front().Segs[0].Mem
	virtio.PutNetHdr(dst[:p.hdrLen], first, last|uint32(n)<<16)
	written, left := p.hdrLen, frame
	for dst = dst[written:]; ; dst = p.front().Segs[0].Mem {
		m := min(len(dst), len(left))
		shm.Copy(dst, left[:m])
		left = left[m:]
		written += m
		c := p.front()
		p.ring.View().Dirty(c.Segs[0].Addr, uint64(written))
		p.ring.Put(c.Head, uint32(written))
		p.first++
		p.room -= int(c.WriteLen)
		p.prefetch()
		if len(left) == 0 {
			break
		}
		written = 0
	}
	p.Stats.Frames++
	p.Stats.Bytes += uint64(len(frame))
	return true
}

// spanAhead is the number of chains that total bytes fill, all of one segment; chains that are not held yet are popped. It is 0 when that is not
// so: too few are there, or of another shape.
func (p *Posted) spanAhead(total int) (n int) {
	if !p.mergeable || p.flattened > p.first {
		return 0
	}
	for ; total > 0; n++ {
		if n == p.held() && (n >= maxMerge || p.popRun() == 0) {
			return 0
		}
		c := &p.chains[(p.first+uint64(n))&p.mask]
		if len(c.Segs) != 1 {
			return 0
		}
		total -= int(c.WriteLen)
	}
	return n
}

// popGood takes the next chain if it is good; a bad one's turn comes when nothing is held.
func (p *Posted) popGood() bool {
	c := &p.chains[p.last&p.mask]
	switch p.ring.Pop(c) {
	case vring.Popped:
		if c.Readable == 0 && int(c.WriteLen) > p.hdrLen {
			p.last++
			p.room += int(c.WriteLen)
			return true
		}
		fallthrough
	case vring.Malformed:
		p.ring.Unpop(1)
		shrinkChain(c)
	case vring.Broken:
		p.err = p.ring.Err()
	}
	return false
}
