package xdp

import (
	"github.com/vhostd/vhostd/internal/sys/xsk"
)

// Sizes of a port.
const (
	ringSize  = 2048     // entries of each ring, and chunks to receive into
	maxSlots  = 1024     // frames on the way at once
	minSlots  = 64       // when they are long
	slotBytes = 16 << 20 // that slots take, unless there would be fewer than minSlots
	padding   = xsk.MaxChunk

	metaSize = 24 // bytes of struct xsk_tx_metadata
)

// layout is how an arena is divided, and what the kernel is told of that.
type layout struct {
	frame    int  // bytes of the longest frame
	guest    bool // guest memory lies behind the private part: addresses are those of bytes, not of chunks
	chunk    int  // bytes
	headroom int
	meta     int // bytes for the metadata before each piece that is sent; 0 for none
	slots    int
	span     int // bytes of a slot
}

// newLayout is the layout for frames of up to frame bytes.
func newLayout(frame int, guest, meta, inPlace bool) layout {
	l := layout{frame: frame, guest: guest, chunk: xsk.MinChunk}
	if guest || frame > l.chunk-xsk.Room {
		l.chunk = xsk.MaxChunk
	}
	if meta {
		l.meta = metaSize
	}
	if inPlace && l.single() {
		l.headroom = l.chunk - xsk.Room - frame
	}
	l.span = (frame + l.piece() - 1) / l.piece() * l.chunk
	l.slots = min(max(slotBytes/l.span, minSlots), maxSlots)
	return l
}

// single reports whether every frame fits a chunk.
func (l *layout) single() bool { return l.frame <= l.chunk-xsk.Room }

// piece is the longest piece of a frame that can be sent, in bytes.
func (l *layout) piece() int { return l.chunk - l.meta }

// before is how many bytes lie between an address in the Fill ring and what is received there.
func (l *layout) before() int { return xsk.Room + l.headroom }

// slot is where slot i begins.
func (l *layout) slot(i int) int { return ringSize*l.chunk + i*l.span }

// private is the size in bytes of what comes before guest memory. The padding tells chunks from what is received before the first region.
func (l *layout) private() int { return l.slot(l.slots) + padding }

// sendAddr is the address at off of a piece that belongs to slot i. Only the slot shows when the kernel has sent it: the kernel clears the lowest
// bit of an address, and the same memory may be sent several times at once.
func (l *layout) sendAddr(off uint64, i int) uint64 {
	if !l.guest {
		return off
	}
	return off - uint64(i) | uint64(i)<<xsk.AddrBits // the kernel adds them; no slot lies before ringSize chunks
}

// slotOf is the slot of an address from sendAddr.
func (l *layout) slotOf(addr uint64) int {
	if !l.guest {
		return (int(addr) - l.slot(0)) / l.span
	}
	return int(addr >> xsk.AddrBits)
}

// received splits the address of what was received into that which was given for it, and where it lies.
func received(addr uint64) (base, at uint64) {
	base = addr & (1<<xsk.AddrBits - 1)
	return base, base + addr>>xsk.AddrBits
}
