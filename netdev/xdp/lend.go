package xdp

import (
	"github.com/vhostd/vhostd/zerocopy"
)

// takeInPlace is take for frames that the kernel has written into the guest's buffers already.
func (b *binding) takeInPlace(p *zerocopy.Posted, limit int) (n int, idle, disorder bool) {
	b.reckon(p, false)
	for {
		var m, used int
		m, used, idle, disorder = b.pickUp(p, limit-n)
		n += m
		if used > 0 {
			b.sock.Rx.Release(used)
			b.reckon(p, false)
		}
		if n == limit || idle || disorder {
			return n, idle, disorder
		}
		// The guest had posted too little. What it has posted since is lent now, and nobody would tell of it again.
		if b.reckon(p, true); b.recv.tied == 0 {
			return n, false, false
		}
	}
}

// pickUp gives the guest up to limit frames, from used entries of the Rx ring. Each entry belongs to the first of places. It reports disorder when that is
// not so: nothing more can be said then of who has which buffer.
func (b *binding) pickUp(p *zerocopy.Posted, limit int) (n, used int, idle, disorder bool) {
	rx := &b.sock.Rx
	for n < limit {
		if used == rx.Len() && used == rx.More() || used >= ringSize/2 {
			return n, used, true, false
		}
		d := rx.At(used)
		base, at := received(d.Addr)
		if b.waiting() == 0 || b.recv.places[b.recv.first].addr != base {
			return n, used, false, true
		}
		alone := d.Options&contd == 0 && int(d.Len) <= b.frame
		switch b.give(p, b.mem[at:at+uint64(d.Len)], alone) {
		case zerocopy.NoRoom:
			return n, used, false, false
		case zerocopy.Written:
			n++
		case zerocopy.TooBig:
			b.recv.tooBig++
		}
		used++
	}
	return n, used, false, false
}

// waiting is how many places the kernel has.
func (b *binding) waiting() int { return len(b.recv.places) - b.recv.first }

// give hands the frame at the first place to the guest. One that is not alone at its place cannot be: the XDP program lets none through.
func (b *binding) give(p *zerocopy.Posted, frame []byte, alone bool) zerocopy.WriteResult {
	r := &b.recv
	pl := r.places[r.first]
	res := zerocopy.Written
	r.frags = append(r.frags[:0], frame)
	switch {
	case r.tied > 0 && !alone:
		p.ReturnLent()
		res = zerocopy.TooBig
	case r.tied > 0 && pl.chunk:
		p.WriteLent(r.frags)
	case r.tied > 0:
		p.UseLent(len(frame))
		r.landed++
	case !alone:
		res = zerocopy.TooBig
	default:
		res = p.WriteWords(0, 0, r.frags)
	}
	if res == zerocopy.NoRoom {
		return res
	}
	if r.tied > 0 {
		r.tied--
	}
	if pl.chunk {
		r.idle = append(r.idle, pl.addr)
	}
	r.first++
	return res
}

// reckon borrows what the guest has posted, and gives the kernel places: as many as there are when the guest has stalled, because nobody looks here until
// it goes on.
func (b *binding) reckon(p *zerocopy.Posted, stalled bool) {
	r := &b.recv
	if r.first > ringSize {
		r.places = append(r.places[:0], r.places[r.first:]...)
		r.first = 0
	}
	before := len(r.places)
	for {
		if r.tied == b.waiting() && (b.waiting() == ringSize || len(r.idle) == 0) {
			break // a place needs an entry of the Fill ring, and maybe a chunk
		}
		data, ok := p.Lend(b.frame)
		if !ok {
			break
		}
		if r.tied == b.waiting() {
			b.addPlace(data)
		}
		r.tied++
	}
	want := topUp
	if stalled {
		want = ringSize
	}
	if free := b.waiting() - b.sock.Rx.More(); free < lowWater || stalled {
		for ; free < want && len(r.idle) > 0 && b.waiting() < ringSize; free++ {
			b.addPlace(nil)
		}
	}
	if len(r.places) > before {
		b.sock.Fill.Publish()
		b.wakeFill()
	}
}

// addPlace gives the kernel the place of a frame in the guest's memory, or a chunk.
func (b *binding) addPlace(data []byte) {
	r := &b.recv
	pl := place{}
	ok := false
	if data != nil {
		pl.addr, ok = b.fillAddr(data)
	}
	if !ok {
		pl = place{addr: r.idle[len(r.idle)-1], chunk: true}
		r.idle = r.idle[:len(r.idle)-1]
	}
	b.sock.Fill.Add(pl.addr)
	r.places = append(r.places, pl)
}

// handOver gives the guest the frames that have come, when no more will.
func (b *binding) handOver(p *zerocopy.Posted) {
	for {
		n, used, _, _ := b.pickUp(p, ringSize)
		b.sock.Rx.Release(used)
		if n == 0 {
			return
		}
	}
}
