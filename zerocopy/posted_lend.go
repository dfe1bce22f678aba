package zerocopy

import (
	"fmt"

	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// Lend pops the next chain, after those that are lent already, to be filled by somebody who goes on when the device's Recv has returned (the
// kernel). Chains are used in the order in which they were lent: with UseLent or WriteLent, one frame each. While any is lent, neither Write nor
// Space may be called. All are taken back by TakeBack before the ring stops or its memory changes.
//
// n is the length in bytes of the longest frame that will be written. data is where it goes, n bytes, after the virtio-net header's room, or nil when the
// chain does not have that in one piece: such a chain can be used with WriteLent alone. It reports false when no chain can be lent: there
// is none, or the next is one that must wait for those before it. It may be too small for a frame of n bytes, so that frames have to be merged over it
// and others, or so long that many like it would take too much memory: those are written when nothing is lent.
func (p *Posted) Lend(n int) (data []byte, ok bool) {
	if len(p.pending) > 0 || p.lent == p.held() && !p.popToLend() {
		return nil, false
	}
	c := &p.chains[(p.first+uint64(p.lent))&p.mask]
	if int(c.WriteLen) < p.hdrLen+n || len(c.Segs) > keepSegs {
		return nil, false
	}
	p.lent++
	return place(c, p.hdrLen, n), true
}

// place finds n bytes in one piece from offset off of a chain.
func place(c *vring.Chain, off, n int) []byte {
	for i := range c.Segs {
		m := c.Segs[i].Mem
		if off >= len(m) {
			off -= len(m)
			continue
		}
		if off+n > len(m) {
			return nil
		}
		return m[off : off+n : off+n]
	}
	return nil
}

// popToLend is pop for when chains may be lent: a malformed one is returned only after them, so it stays in the ring until they are.
func (p *Posted) popToLend() bool {
	if p.lent == 0 {
		return p.pop()
	}
	return p.held() < len(p.chains) && p.popGood()
}

// Lent is the number of chains that are lent.
func (p *Posted) Lent() int { return p.lent }

// UseLent returns the chain that was lent first with a frame of n bytes, which lies where Lend said. It has no offloads.
func (p *Posted) UseLent(n int) {
	p.endLoan()
	total := p.hdrLen + n
	w := scatter{p: p, at: p.first}
	w.header(&virtio.NetHdr{NumBuffers: 1})
	if p.ring.View().Logging() {
		p.logWrite(total)
	}
	p.use(total)
	p.Stats.Frames++
	p.Stats.Bytes += uint64(n)
}

// WriteLent returns the chain that was lent first with a copy of a frame of at most Lend's n bytes, in any number of pieces. It has no offloads.
func (p *Posted) WriteLent(frags [][]byte) {
	p.endLoan()
	w := scatter{p: p, at: p.first}
	w.header(&virtio.NetHdr{NumBuffers: 1})
	n := 0
	for _, f := range frags {
		w.write(f)
		n += len(f)
	}
	p.use(p.hdrLen + n)
	p.Stats.Frames++
	p.Stats.Bytes += uint64(n)
}

// ReturnLent returns the chain that was lent first with no frame in it, whatever was written there.
func (p *Posted) ReturnLent() {
	p.endLoan()
	p.use(0)
}

func (p *Posted) endLoan() {
	if p.lent == 0 {
		panic("bug: a chain is used as lent that is not")
	}
	p.lent--
}

// TakeBack ends all loans: nobody writes into the chains any more. They are held as if they had not been lent.
func (p *Posted) TakeBack() { p.lent = 0 }

// refuseLent: a device that went on with chains that it has lent would break the order of used elements.
func (p *Posted) refuseLent() {
	panic(fmt.Sprintf("bug: %d posted chains are lent", p.lent))
}
