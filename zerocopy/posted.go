package zerocopy

import (
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// WriteResult says what became of a frame for the guest.
type WriteResult uint8

const (
	// Written: the frame is in the guest's buffers, or will be before the next one.
	Written WriteResult = iota
	// NoRoom: the guest has posted too little at the moment. The frame is still the caller's, to be tried again.
	NoRoom
	// TooBig: the guest's buffers can never take it, or it cannot be brought into a form that the guest accepts. It is lost, and counted.
	TooBig
)

// maxMerge bounds the chains that one frame is merged over (field num_buffers): 64 KiB in buffers of 64 bytes.
const maxMerge = 1024

// PostedStats are the counters of a receiveq. They are the worker's to write.
type PostedStats struct {
	Frames, Bytes uint64 // into the guest's buffers; bytes without the virtio-net headers
	TooBig        uint64 // frames lost because no buffers of the guest's could take them
	Malformed     uint64 // chains returned unused: readable, or too short for a header
	NoRoom        uint64 // times that a frame had to wait for the guest
}

// Posted is the buffers that the guest posted on a receiveq, on the way to being filled. Chains are used in the order in which they were
// posted. It belongs to the queue's worker, who lends it to the device in Recv.
//
// A device either hands over a frame (Write), or lets the kernel write into the buffers themselves (Space, then Commit).
type Posted struct {
	ring        *vring.Device
	chains      []vring.Chain // ring of the chains that are held: popped and not used yet
	mask        uint64
	first, last uint64 // cursors into chains
	room        int    // bytes in the chains that are held
	hdrLen      int
	mergeable   bool
	accept      offload.Set
	err         error
	typical     int // bytes of the last frame, with its header
	lent        int // chains from first on that are lent; see Lend
	refused     int // chains since Flush was called last
	Stats       PostedStats

	flat      [][]byte // segments of the chains [first, flattened), from flatStart
	flatStart int
	flattened uint64

	seg     offload.Segmenter
	head    [offload.MaxHeaders]byte
	parts   [][]byte
	pending []segment // of a frame that was cut, from flushed on waiting for room
	flushed int
}

// NewPosted returns the Posted of ring for a driver that negotiated f.
func NewPosted(ring *vring.Device, f virtio.Features) *Posted {
	n := vring.Slots(ring.Size())
	p := &Posted{
		ring: ring, chains: make([]vring.Chain, n), mask: uint64(n - 1),
		hdrLen: virtio.NetHdrLen(f), mergeable: f.Has(virtio.FNetMrgRxbuf), accept: offload.ToGuest(f),
	}
	const inline = 2 // a header's segment and the data's
	segs := make([]vring.Seg, n*inline)
	for i := range p.chains {
		p.chains[i].Segs = segs[i*inline : i*inline : (i+1)*inline]
	}
	return p
}

// HdrLen is the length in bytes of the virtio-net header in front of every frame.
func (p *Posted) HdrLen() int { return p.hdrLen }

// Mergeable tells whether a frame may span several of the guest's buffers.
func (p *Posted) Mergeable() bool { return p.mergeable }

// Err is why the ring is broken, or nil.
func (p *Posted) Err() error { return p.err }

// held is the number of chains that are popped and not used.
func (p *Posted) held() int { return int(p.last - p.first) }

func (p *Posted) front() *vring.Chain { return &p.chains[p.first&p.mask] }

// maxRefused is how many malformed chains are returned in one turn. Each may be as long as the queue, all over the same descriptors: a ring full of them would keep
// the thread that has a frame, which is another guest's with a netdev.Door, for seconds.
const maxRefused = 8

// pop takes another chain from the ring. After maxRefused it is as if there were none: more wait for the next turn, which EnableKick tells of.
func (p *Posted) pop() bool {
	if p.held() == 0 {
		p.first, p.last, p.flattened = 0, 0, 0
		p.flat, p.flatStart = p.flat[:0], 0
	}
	for p.held() < len(p.chains) && p.refused < maxRefused {
		c := &p.chains[p.last&p.mask]
		switch p.ring.Pop(c) {
		case vring.Empty:
			return false
		case vring.Broken:
			p.err = p.ring.Err()
			return false
		case vring.Popped:
			if c.Readable == 0 && int(c.WriteLen) > p.hdrLen {
				p.last++
				p.room += int(c.WriteLen)
				return true
			}
		}
		p.refuse(c)
	}
	return false
}

// refuse returns a malformed chain unused, and before it those that are held, because used elements keep the order.
func (p *Posted) refuse(bad *vring.Chain) {
	for ; p.first != p.last; p.first++ {
		c := p.front()
		p.ring.Put(c.Head, 0)
		shrinkChain(c)
	}
	p.room, p.first, p.last, p.flattened = 0, 0, 0, 0
	p.flat, p.flatStart = p.flat[:0], 0
	p.ring.Put(bad.Head, 0)
	shrinkChain(bad)
	p.Stats.Malformed++
	p.refused++
}

// Write copies a frame into the guest's buffers. frags are the frame without virtio-net header, in any number of pieces; hdr describes it,
// NumBuffers is filled in here. What the guest's driver does not accept of checksum offload and segmentation is done here, in software.
func (p *Posted) Write(hdr virtio.NetHdr, frags [][]byte) WriteResult {
	if hdr.Flags|hdr.GSOType == 0 {
		return p.WriteWords(0, 0, frags)
	}
	first, last := hdr.Words()
	return p.WriteWords(first, last, frags)
}

// WriteWords is Write with the header as virtio.NetHdr.Words, for whoever has it so.
func (p *Posted) WriteWords(first uint64, last uint32, frags [][]byte) WriteResult {
	if p.lent > 0 {
		p.refuseLent()
	}
	if len(p.pending) > 0 && !p.flush() {
		return NoRoom
	}
	if !virtio.NetHdrAsks(first) {
		first, last = 0, 0 // no other field means anything (virtio-v1.2 §5.1.6)
	} else if !p.accept.TakesWords(first) {
		return p.lower(virtio.NetHdrOf(first, last), frags, p.accept)
	}
	if len(frags) == 1 {
		if last &^= numBuffers; p.writeNext(first, last, frags[0]) || p.mergeNext(first, last, frags[0]) {
			return Written
		}
	}
	hdr := virtio.NetHdrOf(first, last)
	r := p.write(&hdr, frags)
	if r == TooBig && hdr.GSOType != virtio.GSONone {
		return p.lower(hdr, frags, p.accept&offload.Csum)
	}
	return p.count(r)
}

func (p *Posted) count(r WriteResult) WriteResult {
	switch r {
	case NoRoom:
		p.Stats.NoRoom++
	case TooBig:
		p.Stats.TooBig++
	}
	return r
}

func (p *Posted) write(hdr *virtio.NetHdr, frags [][]byte) WriteResult {
	total := p.hdrLen
	for _, f := range frags {
		total += len(f)
	}
	if r := p.ensure(total); r != Written {
		return r
	}
	c := p.front()
	if int(c.WriteLen) < total {
		p.merge(hdr, frags, total)
		return Written
	}
	hdr.NumBuffers = 1
	if dst := c.Segs[0].Mem; len(dst) >= total {
		hdr.Encode(dst[:p.hdrLen])
		n := p.hdrLen
		for _, f := range frags {
			shm.Copy(dst[n:total], f)
			n += len(f)
		}
		p.ring.View().Dirty(c.Segs[0].Addr, uint64(total))
	} else {
		w := scatter{p: p, at: p.first}
		w.header(hdr)
		for _, f := range frags {
			w.write(f)
		}
	}
	p.use(total)
	p.Stats.Frames++
	p.Stats.Bytes += uint64(total - p.hdrLen)
	return Written
}

// ensure holds chains enough for total bytes.
func (p *Posted) ensure(total int) WriteResult {
	if p.held() == 0 && !p.pop() {
		return NoRoom
	}
	if int(p.front().WriteLen) >= total {
		return Written
	}
	if !p.mergeable {
		return TooBig
	}
	for p.room < total {
		if p.held() >= maxMerge { // more are held where more were lent
			return TooBig
		}
		if p.pop() {
			continue
		}
		if p.err == nil && p.full() {
			return TooBig
		}
		return NoRoom
	}
	return Written
}

// full tells that the guest cannot post more: what is held has so many of the ring's descriptors that the rest does not make another chain, not even
// like the shortest of them.
func (p *Posted) full() bool {
	left, shortest := p.ring.Size(), p.ring.Size()
	for i := p.first; i != p.last; i++ {
		n := int(p.chains[i&p.mask].Descs)
		left, shortest = left-n, min(shortest, n)
	}
	return left < shortest
}

// merge writes a frame over several chains (virtio-v1.2 §5.1.6.4, VIRTIO_NET_F_MRG_RXBUF).
func (p *Posted) merge(hdr *virtio.NetHdr, frags [][]byte, total int) {
	hdr.NumBuffers = uint16(p.span(total))
	w := scatter{p: p, at: p.first}
	w.header(hdr)
	for _, f := range frags {
		w.write(f)
	}
	p.useAll(total)
	p.Stats.Frames++
	p.Stats.Bytes += uint64(total - p.hdrLen)
}

// span is the number of chains that total bytes fill, of those that are held.
func (p *Posted) span(total int) int {
	n := 0
	for i := p.first; total > 0; i++ {
		total -= int(p.chains[i&p.mask].WriteLen)
		n++
	}
	return n
}

// use puts the first chain on the used ring, with n bytes written.
func (p *Posted) use(n int) {
	c := p.front()
	p.ring.Put(c.Head, uint32(n))
	p.room -= int(c.WriteLen)
	if p.flattened > p.first {
		p.flatStart += len(c.Segs)
	} else {
		p.flattened = p.first + 1
	}
	shrinkChain(c)
	p.first++
}

// shrinkChain gives up the memory that a long chain took; see keepSegs.
func shrinkChain(c *vring.Chain) {
	if cap(c.Segs) > keepSegs {
		c.Segs = nil
	}
}

// useAll puts the chains that total bytes fill on the used ring.
func (p *Posted) useAll(total int) {
	for total > 0 {
		n := min(total, int(p.front().WriteLen))
		total -= n
		p.use(n)
	}
}

// Space returns the guest's posted buffers, in order, for a frame of up to min bytes with its virtio-net header in front, and their length.
// It is less than min when the guest has posted less, or, without MRG_RXBUF, when its next buffer is smaller; 0 when nothing can be
// received now. The segments are good until the next call of any method.
func (p *Posted) Space(min int) (segs [][]byte, total int) {
	if p.lent > 0 {
		p.refuseLent()
	}
	if len(p.pending) > 0 && !p.flush() {
		return nil, 0
	}
	if p.ensure(min) == NoRoom && p.held() == 0 {
		return nil, 0
	}
	if !p.mergeable {
		p.flatten(p.first + 1)
		c := p.front()
		return p.flat[p.flatStart : p.flatStart+len(c.Segs)], int(c.WriteLen)
	}
	p.flatten(p.last)
	return p.flat[p.flatStart:], p.room
}

// flatten extends flat to the chains before the cursor end.
func (p *Posted) flatten(end uint64) {
	if p.flattened < p.first || p.flatStart == len(p.flat) {
		p.flattened = max(p.flattened, p.first)
		p.flat, p.flatStart = p.flat[:0], 0
	}
	if p.flatStart > 4*len(p.chains) {
		p.flat, p.flatStart = append(p.flat[:0], p.flat[p.flatStart:]...), 0
	}
	for ; p.flattened < end; p.flattened++ {
		c := &p.chains[p.flattened&p.mask]
		for i := range c.Segs {
			p.flat = append(p.flat, c.Segs[i].Mem)
		}
	}
}

// Commit says that a frame of n bytes, its virtio-net header included, was written into Space; num_buffers is filled in here. n is at
// most what Space returned.
func (p *Posted) Commit(n int) {
	if n <= p.hdrLen {
		return // no frame: the buffers stay posted
	}
	if n > p.room {
		panic("bug: a frame was committed that is larger than its space")
	}
	if p.hdrLen == virtio.NetHdrSize {
		p.setNumBuffers(uint16(p.span(n)))
	}
	if p.ring.View().Logging() {
		p.logWrite(n)
	}
	p.useAll(n)
	p.Stats.Frames++
	p.Stats.Bytes += uint64(n - p.hdrLen)
}

// numBuffersOff is the offset of num_buffers in struct virtio_net_hdr.
const numBuffersOff = 10

func (p *Posted) setNumBuffers(n uint16) {
	if m := p.front().Segs[0].Mem; len(m) >= virtio.NetHdrSize {
		m[numBuffersOff], m[numBuffersOff+1] = byte(n), byte(n>>8)
		return
	}
	w := scatter{p: p, at: p.first}
	w.skip(numBuffersOff)
	w.write([]byte{byte(n), byte(n >> 8)})
}

func (p *Posted) logWrite(n int) {
	for i := p.first; n > 0; i++ {
		for _, s := range p.chains[i&p.mask].Segs {
			m := min(n, len(s.Mem))
			p.ring.View().Dirty(s.Addr, uint64(m))
			if n -= m; n == 0 {
				return
			}
		}
	}
}

// GiveBack returns the chains that are held to the ring, as if they had never been popped. It comes before the queue stops or its memory changes; what
// waits for room waits on, in private memory.
func (p *Posted) GiveBack() {
	if p.lent > 0 {
		p.refuseLent()
	}
	p.ring.Unpop(p.held())
	p.first, p.last, p.flattened, p.room = 0, 0, 0, 0
	p.flat, p.flatStart = p.flat[:0], 0
}
