package l2switch

import (
	"time"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/zerocopy"
)

// run is frames on their way to one port. It is a netdev.Deliverer.
type run struct {
	q      *queue
	to     *Port
	rules  *rules // of to
	lane   *lane
	frames []frame
	bufs   []*zerocopy.Buffer // of frames, to be released here; nil when they go elsewhere too
	now    time.Duration
	done   int // frames that were written or lost
	paid   int // frames that the receiving port's limit has been asked about
	lost   int // frames of done
	state  netdev.DoorState
	busy   bool // the frame at done is being written: left behind by a fault in its pages

	asIs    bool // frames in one piece go as they are in the sender's pages
	private int  // pieces of the frame at done that are not the sender's pages
	skip    int  // bytes of the sender's pages that these stand for
}

// pass delivers frames to a port: into the guest's buffers on this thread if nobody else is at them, and else into the lane. With bufs it
// releases them, or has them released.
func (q *queue) pass(to *Port, frames []frame, bufs []*zerocopy.Buffer, now time.Duration) {
	w := &q.work.run
	*w = run{q: q, to: to, rules: to.rules.Load(), lane: to.lane(q), frames: frames, bufs: bufs, now: now}
	w.asIs = q.work.open && w.rules.trunk == nil
	switch l := w.lane; {
	case l.shut.Load():
		w.state = netdev.DoorShut
	case to.up != nil:
		to.up.deliver(w)
		w.checkShut()
		return
	default:
		w.state = l.try(w)
	}
	if w.state == netdev.DoorShut {
		w.refuse()
		return
	}
	if w.busy {
		w.lose(DropFault)
	}
	w.release(0, w.done)
	if w.done < len(frames) {
		from := w.done
		w.wait()
		w.releaseLost(from)
		if w.checkShut() {
			return
		}
		to.sw.sweep.arm()
		q.rouse(w.lane, w.state)
	}
}

// checkShut drops what was put into the lane of a receiver that has left meanwhile.
func (w *run) checkShut() bool {
	shut := w.lane.shut.Load()
	if shut {
		w.to.drop(DropNoReceiver, w.lane.discard())
	}
	return shut
}

// try has d deliver into the guest's buffers, if there is a way and nobody is in it.
func (l *lane) try(d netdev.Deliverer) netdev.DoorState {
	if door := l.door.Load(); door != nil {
		return (*door).Try(d)
	}
	return netdev.DoorBusy
}

// refuse drops what is left of the run, and what waits, for a guest that does not receive.
func (w *run) refuse() {
	w.to.drop(DropNoReceiver, w.lane.discard())
	done := w.done
	for w.done < len(w.frames) {
		w.lose(DropNoReceiver)
	}
	w.release(0, done)
	w.release(done, w.done)
}

// Deliver implements netdev.Deliverer: what has waited for longer goes first.
func (w *run) Deliver(p *zerocopy.Posted) {
	l := w.lane
	l.take.Lock()
	defer l.take.Unlock()
	if !l.drain(p) {
		return
	}
	frames, bytes := w.asTheyAre(p)
	for w.done < len(w.frames) {
		first, last, ok := w.next()
		if !ok {
			continue
		}
		w.busy = true
		r := p.WriteWords(first, last, w.q.work.frags)
		w.busy = false
		if r == zerocopy.NoRoom {
			break
		}
		w.done++
		if r == zerocopy.TooBig {
			l.tooBig.Add(1)
			continue
		}
		frames++
		bytes += w.frames[w.done-1].length
	}
	l.frames.Add(uint64(frames))
	l.bytes.Add(uint64(bytes))
}

// asTheyAre delivers frames for as long as they go as they are: nearly all between access ports without limits. It returns how many there were, and their bytes.
func (w *run) asTheyAre(p *zerocopy.Posted) (frames, bytes int) {
	r := w.rules
	if !w.asIs || r.toGuest.on || w.frames[0].vid != r.pvid { // the others have the same
		return 0, 0
	}
	for w.done < len(w.frames) {
		f := &w.frames[w.done]
		segs := f.buf.Segs()
		if len(segs) != 1 || f.tag != 0 || f.length > r.maxLen {
			break
		}
		w.busy = true
		written := p.WriteNext(f.first, f.last, segs[0].Mem)
		w.busy = false
		if !written {
			break
		}
		w.done++
		frames++
		bytes += f.length
	}
	return frames, bytes
}

// next shapes the frame at done for the receiving port: its pieces are work.frags, its virtio-net header is as virtio.NetHdr.Words. Without ok, it was lost there.
func (w *run) next() (first uint64, last uint32, ok bool) {
	f, r, work := &w.frames[w.done], w.rules, w.q.work
	if r.toGuest.on && w.paid == w.done {
		if !r.toGuest.pass(f.length, w.now) {
			w.lose(DropLimitOut)
			return 0, 0, false
		}
		w.paid++
	}
	if !f.fits(r.maxLen) {
		w.lose(DropMTUOut)
		return 0, 0, false
	}
	if !r.carries(f.vid) {
		w.lose(DropVLANOut)
		return 0, 0, false
	}
	if segs := f.buf.Segs(); w.asIs && len(segs) == 1 && f.tag == 0 {
		// Nothing was promised about this frame that a sender who rewrites it now could break.
		w.private, w.skip, work.frags = 0, 0, append(work.frags[:0], segs[0].Mem)
		return f.first, f.last, true
	}
	hdr, frags, ok := f.shape(r, work.frags[:0], work.shape[:])
	if work.frags = frags; !ok {
		w.lose(DropVLANOut)
		return 0, 0, false
	}
	w.private, w.skip = len(work.frags), len(f.head)
	if len(f.head) < f.length {
		work.frags = rest(work.frags, f.buf, len(f.head))
	}
	first, last = hdr.Words()
	return first, last, true
}

// lose drops the frame at done. Its buffer, if it is the run's, is released with the others.
func (w *run) lose(why Reason) {
	w.to.drop(why, 1)
	if w.bufs != nil {
		w.frames[w.done].lost = true
		w.lost++
	}
	w.done++
	w.paid = w.done
}

// release releases the frames from one to before another, that were delivered or lost.
func (w *run) release(from, to int) {
	switch {
	case w.bufs == nil:
	case w.lost == 0:
		zerocopy.ReleaseAll(w.bufs[from:to], zerocopy.ZeroCopied)
	default:
		for i := from; i < to; i++ {
			o := zerocopy.ZeroCopied
			if w.frames[i].lost {
				o = zerocopy.Dropped
			}
			zerocopy.ReleaseAll(w.bufs[i:i+1], o)
		}
	}
}

// releaseLost releases the frames behind from that did not get into the lane.
func (w *run) releaseLost(from int) {
	for i := from; i < w.done && w.bufs != nil; i++ {
		if w.frames[i].lost {
			zerocopy.ReleaseAll(w.bufs[i:i+1], zerocopy.Dropped)
		}
	}
}

// wait puts what is left of the run into the lane: with the sender's pages if the run owns the frames and the receiver keeps up, as copies if not.
func (w *run) wait() {
	l := w.lane
	l.push.Lock()
	defer l.push.Unlock()
	for w.done < len(w.frames) {
		first, last, ok := w.next()
		if !ok {
			continue
		}
		f := &w.frames[w.done]
		var held *zerocopy.Buffer
		if w.bufs != nil && !l.slow.Load() {
			held = f.buf
		}
		if !l.put(w.q, first, last, w.q.work.frags, w.private, held, w.skip) {
			w.lose(DropBacklog)
			continue
		}
		if w.bufs != nil && held == nil {
			zerocopy.ReleaseAll(w.bufs[w.done:w.done+1], zerocopy.Copied)
		}
		w.done++
	}
	l.sw.sweep.arm()
}

// rouse sees to it that what was put into a lane gets out again. A receiver that has posted too little is left to this thread, which looks again at the
// next Send or Reap, and to its own worker only when this one goes to sleep.
func (q *queue) rouse(l *lane, state netdev.DoorState) {
	if state == netdev.DoorBusy {
		l.rouse(forFrames, forRoom)
		return
	}
	for _, o := range q.owed {
		if o == l {
			return
		}
	}
	q.owed = append(q.owed, l)
}

// drainer delivers what waits in a lane.
type drainer struct{ *lane }

// Deliver implements netdev.Deliverer.
func (d drainer) Deliver(p *zerocopy.Posted) {
	d.take.Lock()
	defer d.take.Unlock()
	d.drain(p)
}

// retry tries the lanes again in which frames of this queue were left.
func (q *queue) retry() {
	keep := q.owed[:0]
	for _, l := range q.owed {
		if l.empty() {
			continue
		}
		switch l.try(&l.drainer) {
		case netdev.DoorBusy:
			l.rouse(forFrames, forRoom)
		case netdev.DoorOpen:
			if !l.empty() {
				keep = append(keep, l)
			}
		}
	}
	clear(q.owed[len(keep):])
	q.owed = keep
}
