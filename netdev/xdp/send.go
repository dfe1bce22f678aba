package xdp

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys/xsk"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

const (
	minFrame = 14 // bytes: an Ethernet header
	// minHead is how many bytes of a frame the kernel finds in one piece, if the frame has as many: it takes the Ethernet header for granted there.
	minHead = 64
	// inFlight is no outcome yet.
	inFlight = zerocopy.NumOutcomes
	// csumSize is the size of a checksum in bytes.
	csumSize = 2
)

// sending is the sending half of a binding.
type sending struct {
	flights []flight // by slot
	free    []int    // slots
	pieces  int      // that the kernel has not reported as sent
	next    uint32   // Tx entries added, modulo 1<<32
	down    bool     // the last kick was refused because the interface is down
	gone    bool     // so was one because there is no interface any more: there are neither kicks nor reports from then on
	scratch [xsk.MaxPieces]xsk.Desc
}

// flight is a frame on the way.
type flight struct {
	buf  *zerocopy.Buffer // nil: the frame was copied, its buffer is released
	left int              // pieces that are not reported as sent; 0: the slot is free
	end  uint32           // sending.next after its last piece
}

func (b *binding) prepareSend() {
	b.send.flights = make([]flight, b.slots)
	for i := b.slots - 1; i >= 0; i-- {
		b.send.free = append(b.send.free, i)
	}
}

// room reports whether a frame of n pieces can be added.
func (b *binding) room(n int) bool {
	s := &b.send
	return len(s.free) > 0 && s.pieces+n <= ringSize && b.sock.Tx.Free(n) >= n
}

// add describes a frame to the kernel, which cannot see it yet, and says what became of its buffer: it may be inFlight. It reports false when
// there is no room.
func (b *binding) add(buf *zerocopy.Buffer) (o zerocopy.Outcome, ok bool) {
	n := buf.Len()
	if n < minFrame || n > b.frame {
		return zerocopy.Dropped, true
	}
	head := 0
	hdr := virtio.NetHdr{}
	if b.meta > 0 {
		if hdr = buf.Header(); hdr.Flags&virtio.NetHdrNeedsCsum != 0 {
			if head = int(hdr.CsumStart) + int(hdr.CsumOffset) + csumSize; head > n || head > b.piece() {
				return zerocopy.Dropped, true
			}
		}
	}
	if len(b.send.free) == 0 {
		return 0, false
	}
	slot := b.send.free[len(b.send.free)-1]
	pieces := 0
	o = zerocopy.Copied
	if b.guest {
		o = inFlight
		if pieces = b.describe(buf, slot, head); pieces == 0 {
			o = zerocopy.CopiedFallback
		}
	}
	if pieces == 0 {
		pieces = (n + b.piece() - 1) / b.piece()
	}
	if !b.room(pieces) {
		return 0, false
	}
	if o != inFlight {
		b.copyIn(buf, slot)
	}
	b.launch(buf, slot, pieces, o == inFlight, hdr)
	return o, true
}

// describe finds the pieces of a frame in guest memory, behind a first one of head bytes in private memory, or more where the frame's first piece is too
// short to be the kernel's, or not the guest's. It returns 0 for a frame that cannot be described.
func (b *binding) describe(buf *zerocopy.Buffer, slot, head int) (n int) {
	segs := buf.Segs()
	if least := min(minHead, buf.Len()); len(segs[0].Mem) < least {
		head = max(head, least)
	}
	if _, ok := b.arena.Offset(segs[0].Mem); !ok { // headers that were made for a segment
		head = max(head, len(segs[0].Mem))
	}
	if head > b.piece() {
		return 0
	}
	d := &b.send.scratch
	if head > 0 {
		at := b.slot(slot) + b.meta
		buf.CopyTo(b.mem[at:at+head], 0)
		d[0] = xsk.Desc{Addr: b.sendAddr(uint64(at), slot), Len: uint32(head)}
		n = 1
	}
	for i := range segs {
		m := segs[i].Mem
		skip := min(head, len(m))
		head -= skip
		if m = m[skip:]; len(m) == 0 {
			continue
		}
		off, ok := b.arena.Offset(m)
		if !ok {
			return 0
		}
		for left := uint64(len(m)); left > 0; n++ {
			if n == b.way.pieces {
				return 0
			}
			m := min(left, b.longest(off))
			d[n] = xsk.Desc{Addr: b.sendAddr(off, slot), Len: uint32(m)}
			off, left = off+m, left-m
		}
	}
	return n
}

// longest is how many bytes one piece at off can have. A card finds each page elsewhere.
func (b *binding) longest(off uint64) uint64 {
	n := uint64(b.piece())
	if b.way.zerocopy() {
		n = min(n, xsk.MaxChunk-off%xsk.MaxChunk)
	}
	return n
}

// copyIn copies a frame into its slot, and describes it.
func (b *binding) copyIn(buf *zerocopy.Buffer, slot int) {
	for i, done := 0, 0; done < buf.Len(); i++ {
		at := b.slot(slot) + i*b.chunk + b.meta
		n := buf.CopyTo(b.mem[at:at+min(b.piece(), buf.Len()-done)], done)
		b.send.scratch[i] = xsk.Desc{Addr: b.sendAddr(uint64(at), slot), Len: uint32(n)}
		done += n
	}
}

// launch adds the pieces in scratch to the Tx ring.
func (b *binding) launch(buf *zerocopy.Buffer, slot, n int, held bool, hdr virtio.NetHdr) {
	s := &b.send
	s.free = s.free[:len(s.free)-1]
	d := s.scratch[:n]
	if hdr.Flags&virtio.NetHdrNeedsCsum != 0 {
		m := b.mem[b.slot(slot):][:metaSize]
		binary.NativeEndian.PutUint64(m, unix.XDP_TXMD_FLAGS_CHECKSUM)
		binary.NativeEndian.PutUint16(m[8:], hdr.CsumStart)
		binary.NativeEndian.PutUint16(m[10:], hdr.CsumOffset)
		d[0].Options |= unix.XDP_TX_METADATA
	}
	for i := range d {
		if i < n-1 {
			d[i].Options |= unix.XDP_PKT_CONTD
		}
		b.sock.Tx.Add(d[i])
	}
	s.pieces += n
	s.next += uint32(n)
	f := flight{left: n, end: s.next}
	if held {
		f.buf = buf
	}
	s.flights[slot] = f
}

// reap takes the kernel's reports of what was sent.
func (b *binding) reap() {
	if b.send.gone {
		return // a frame that abandon has released may be reported still
	}
	done := &b.sock.Done
	n := done.More()
	for i := range n {
		slot := b.slotOf(done.At(i))
		f := &b.send.flights[slot]
		b.send.pieces--
		if f.left--; f.left == 0 {
			b.end(slot, b.sentAs())
		}
	}
	if n > 0 {
		done.Release(n)
	}
}

// sentAs is what becomes of guest pages that the kernel was given.
func (b *binding) sentAs() zerocopy.Outcome {
	if b.way.zerocopy() {
		return zerocopy.ZeroCopied
	}
	return zerocopy.CopiedAnyway
}

// end frees a slot.
func (b *binding) end(slot int, o zerocopy.Outcome) {
	f := &b.send.flights[slot]
	buf := f.buf
	f.buf, f.left = nil, 0
	b.send.free = append(b.send.free, slot)
	if buf != nil {
		buf.Release(o)
	}
}

// kick has the kernel send what waits in the Tx ring, as far as it will now.
func (b *binding) kick() {
	tx := &b.sock.Tx
	for !b.send.gone && tx.Waiting() > 0 && tx.NeedsWakeup() {
		before := tx.Taken()
		errno := b.sock.Kick()
		b.send.down = errno == unix.ENETDOWN
		// A driver that is being reset may say the same for a while.
		if b.send.gone = errno == unix.ENXIO && b.err() != nil; b.send.gone {
			return
		}
		if b.way.zerocopy() || errno != 0 && tx.Taken() == before {
			return // it is at it, or is busy: tried again later
		}
	}
}

// abandon releases what was on the way when the socket was closed, or its interface went away: the kernel, which had taken the Tx entries before
// taken, has read those pages, or will not. It returns how many frames were lost.
func (b *binding) abandon(taken uint32) (lost int) {
	for slot := range b.send.flights {
		f := &b.send.flights[slot]
		if f.left == 0 {
			continue
		}
		o := zerocopy.Dropped
		if !b.way.zerocopy() && int32(taken-f.end) >= 0 {
			o = b.sentAs()
		} else {
			lost++
		}
		b.end(slot, o)
	}
	b.send.pieces = 0
	return lost
}
