package l2switch

import (
	"encoding/binary"
	"time"

	"github.com/vhostd/vhostd/zerocopy"
)

// forward sends a batch on its way, and takes all of it.
func (q *queue) forward(bufs []*zerocopy.Buffer) int {
	s := q.port.sw
	v, r, now := s.view.Load(), q.port.rules.Load(), s.clock()
	if !v.has(q.port) {
		q.port.drop(DropVLAN, len(bufs)) // it is in none any more
		zerocopy.ReleaseAll(bufs, zerocopy.Dropped)
		return len(bufs)
	}
	batch := q.work.batch[:len(bufs)]
	q.work.open = !r.guarded && r.trunk == nil
	q.read(batch, bufs, r)
	q.decide(batch, v, r, now)
	for i := 0; i < len(batch); {
		n := 1
		for i+n < len(batch) && batch[i].goesWith(&batch[i+n]) {
			n++
		}
		q.deliver(v, r, now, batch[i:i+n], bufs[i:i+n])
		i += n
	}
	return len(bufs)
}

// goesWith tells whether two frames take the same way.
func (f *frame) goesWith(o *frame) bool { return f.to == o.to && f.lost == o.lost && f.vid == o.vid }

// read reads the headers of a batch. All of them are touched before the first is decided on: their memory was last in the sending guest's hands, and
// comes from there for many at a time.
func (q *queue) read(batch []frame, bufs []*zerocopy.Buffer, r *rules) {
	w := q.work
	if r.guarded && w.deep == nil {
		w.deep = new([batchSize][deepHead]byte)
	}
	var bytes int
	for i, b := range bufs {
		f := &batch[i]
		f.buf, f.length = b, b.Len()
		f.first, f.last = b.HeaderWords()
		bytes += f.length
		plain := &w.plain[i]
		if m := b.Segs()[0].Mem; !r.guarded && len(m) >= plainHead {
			first, second, third := binary.BigEndian.Uint64(m), binary.BigEndian.Uint64(m[8:]), binary.BigEndian.Uint16(m[16:])
			f.parseWords(first, second, third)
			binary.BigEndian.PutUint64(plain[:], first)
			binary.BigEndian.PutUint64(plain[8:], second)
			binary.BigEndian.PutUint16(plain[16:], third)
			f.head, f.lost = plain[:], false
			continue
		}
		head := plain[:]
		if r.guarded {
			head = w.deep[i][:]
		}
		f.head = head[:b.CopyTo(head, 0)]
		f.parse((*[plainHead]byte)(head))
	}
	q.frames.Add(uint64(len(bufs)))
	q.bytes.Add(uint64(bytes))
}

// decide finds out where the frames of a batch go. What the last frame's addresses led to holds for the next with the same ones.
func (q *queue) decide(batch []frame, v *view, r *rules, now time.Duration) {
	var src, dst uint64 // stations known to be good, and looked up
	var to *Port
	sec := stamp(now)
	alike := !r.guarded && !r.fromGuest.on // a frame with the last one's addresses is no other
	var last *frame
	for i := range batch {
		f := &batch[i]
		if last != nil && f.src == last.src && f.dst == last.dst && f.isLike(last, r.maxLen) {
			f.to = last.to
			continue
		}
		f.to, last = nil, nil
		if why, ok := f.enter(r); !ok {
			q.lose(f, why)
			continue
		}
		if r.fromGuest.on && !r.fromGuest.pass(f.length, now) {
			q.lose(f, DropLimit)
			continue
		}
		if s := station(f.vid, f.src); s != src {
			if !q.learn(v, r, s, sec) {
				q.lose(f, DropMAC)
				continue
			}
			src = s
		}
		if s := station(f.vid, f.dst); s != dst {
			to, dst = q.find(v, s, sec), s
		}
		f.to = to
		if why, ok := f.mayGo(q.port, r, now); !ok {
			q.lose(f, why)
		} else if alike && to != nil {
			last = f
		}
	}
}

// isLike tells whether a frame with the same addresses as another, which may go to one port and is let through without a look behind its Ethernet header, goes there too.
func (f *frame) isLike(o *frame, maxLen int) bool {
	if f.tag != o.tag || f.inner != o.inner || f.lost || f.length-f.tag > maxLen {
		return false
	}
	if f.tag == 0 {
		f.vid = o.vid // the port's own
		return true
	}
	return f.vid == o.vid
}

// lose drops a frame. It is released with the others of its run.
func (q *queue) lose(f *frame, why Reason) {
	f.lost, f.to = true, nil
	q.port.drop(why, 1)
}

// enter checks a frame from the guest as far as that takes nothing but the port's rules.
func (f *frame) enter(r *rules) (why Reason, ok bool) {
	switch {
	case f.lost, f.src&groupBit != 0, f.src == 0:
		return DropMalformed, false
	case f.dst>>4 == 0x0180c200000:
		return DropReserved, false
	case !f.admit(r):
		return DropVLAN, false
	case !f.fits(r.maxLen):
		return DropMTU, false
	case !r.owns(f.src):
		return DropMAC, false
	case r.guarded:
		return f.judge(r)
	}
	return 0, true
}

// learn notes where a frame came from. It reports false for an address that is another port's own, or in a VLAN that has just been taken from the port.
func (q *queue) learn(v *view, r *rules, src uint64, now uint32) bool {
	p := q.port
	t := p.sw.table
	port, heard, ok := t.lookup(src, now)
	switch {
	case ok && port == p.index && heard == now:
		return true
	case ok && port == p.index:
		t.touch(src, p.index, now)
		return true
	}
	if !v.mayHave(p, src) {
		return false
	}
	t.learn(src, p.index, now, &p.learned, r.cfg.MaxAddresses, p.sw.share)
	// The ports may have changed since v was read, and whoever changed them have looked through the table before this was in it.
	if c := p.sw.view.Load(); c != v && !c.mayHave(p, src) {
		t.unlearn(src, p.index, &p.learned)
		return false
	}
	return true
}

// find looks up where a frame goes; nil is to all.
func (q *queue) find(v *view, dst uint64, now uint32) *Port {
	if dst&groupBit != 0 {
		return nil
	}
	if port, _, ok := q.port.sw.table.lookup(dst, now); ok && port < len(v.ports) {
		return v.ports[port]
	}
	if o := v.owners[dst&macMask]; o != nil && o.rules.Load().carries(uint16(dst>>48)) {
		return o
	}
	return nil
}

// mayGo checks what depends on where the frame goes.
func (f *frame) mayGo(from *Port, r *rules, now time.Duration) (why Reason, ok bool) {
	if f.to == from {
		return DropSamePort, false
	}
	if f.to != nil {
		return DropIsolated, !r.cfg.Isolated || !f.to.rules.Load().cfg.Isolated
	}
	kind, why := stormUnknown, DropStormUnknown
	switch {
	case f.dst == broadcast:
		kind, why = stormBroadcast, DropStormBroadcast
	case f.dst&groupBit != 0:
		kind, why = stormMulticast, DropStormMulticast
	}
	return why, r.storm[kind].take(1, now)
}

// deliver sends frames that take the same way, and releases them.
func (q *queue) deliver(v *view, r *rules, now time.Duration, frames []frame, bufs []*zerocopy.Buffer) {
	switch to := frames[0].to; {
	case frames[0].lost:
		zerocopy.ReleaseAll(bufs, zerocopy.Dropped)
	case to != nil:
		q.pass(to, frames, bufs, now)
	default:
		q.port.flooded.Add(uint64(len(bufs)))
		for _, to := range v.ports {
			if to == nil || to == q.port {
				continue
			}
			if tr := to.rules.Load(); tr.carries(frames[0].vid) && !(r.cfg.Isolated && tr.cfg.Isolated) {
				q.pass(to, frames, nil, now)
			}
		}
		zerocopy.ReleaseAll(bufs, zerocopy.Copied)
	}
}
