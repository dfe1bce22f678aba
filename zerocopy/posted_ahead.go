package zerocopy

import (
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// numBuffers is where num_buffers lies in the last word of a header, oneBuffer that field of a frame in one buffer.
const (
	oneBuffer  = 1 << 16
	numBuffers = 0xffff << 16
)

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
	copy(dst[p.hdrLen:], frame)
	p.ring.View().Dirty(c.Segs[0].Addr, uint64(total))
	p.ring.Put(c.Head, uint32(total))
	p.first++
	p.room -= int(c.WriteLen)
	p.Stats.Frames++
	p.Stats.Bytes += uint64(len(frame))
	p.typical = total
	return true
}

// lookAhead is how many chains are popped at once. Their memory was last in the driver's hands, so each costs a trip to another processor's cache: these
// trips are made at the same time.
const lookAhead = 32

// maxPrefetch bounds how much of a buffer is asked for, in bytes: behind that, the processor has seen where this leads.
const maxPrefetch = 256

// popAhead holds as many chains as are known to be there, and asks for the memory that is about to be written. Nothing is held.
func (p *Posted) popAhead() bool {
	if !p.pop() {
		return false
	}
	n := p.ring.PopRun(p.chains[p.last:min(p.last+lookAhead-1, uint64(len(p.chains)))]) // pop began anew: what is held lies at the start
	for ; n > 0; n-- {
		c := &p.chains[p.last]
		if c.Readable != 0 || int(c.WriteLen) <= p.hdrLen {
			p.ring.Unpop(n) // its turn comes when nothing is held
			break
		}
		p.last++
		p.room += int(c.WriteLen)
	}
	for i := p.first; i != p.last; i++ {
		p.chains[i&p.mask].Prefetch(min(p.typical, maxPrefetch))
	}
	p.ring.PrefetchUsed(p.held())
	return true
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
	case vring.Broken:
		p.err = p.ring.Err()
	}
	return false
}
