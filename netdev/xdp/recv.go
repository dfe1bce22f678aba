package xdp

import (
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys/xsk"
	"github.com/vhostd/vhostd/zerocopy"
)

const (
	contd = unix.XDP_PKT_CONTD
	// maxParts bounds the pieces of a frame that is received: what more there are belong to no frame of ours.
	maxParts = 64
)

// Places that the kernel has to receive into, in port.reckon.
const (
	lowWater = 64  // with fewer that are free, chunks are added that stand for no buffer of the guest's
	topUp    = 256 // until so many are
)

// receiving is the receiving half of a binding.
type receiving struct {
	inPlace bool
	idle    []uint64 // addresses of chunks that the kernel does not have; only with inPlace
	places  []place  // that the kernel has, in order; only with inPlace
	first   int      // of places
	tied    int      // places from first on that have a chain
	frags   [][]byte
	landed  uint64 // frames that needed no copy, since they were last counted
	tooBig  uint64 // frames that the guest's buffers can never take, likewise
}

// place is where one frame will be received.
type place struct {
	addr  uint64 // as given to the kernel
	chunk bool   // private memory; with a chain it stands in for that
}

// prepareRecv gives the kernel chunks to receive into. In place it is some only, as the worker, who may be asleep, has to hear of the first frames.
func (b *binding) prepareRecv() {
	r := &b.recv
	r.inPlace = b.headroom > 0
	for i := range ringSize {
		if addr := uint64(i * b.chunk); r.inPlace {
			r.idle = append(r.idle, addr)
		} else {
			b.sock.Fill.Add(addr)
		}
	}
	for r.inPlace && b.waiting() < lowWater {
		b.addPlace(nil)
	}
	b.sock.Fill.Publish()
	b.wakeFill()
}

// wakeFill tells a driver that waits for places that there are some.
func (b *binding) wakeFill() {
	if b.sock.Fill.NeedsWakeup() {
		b.sock.KickFill()
	}
}

// take moves up to limit frames to the guest, by copy.
func (b *binding) take(p *zerocopy.Posted, limit int) (n int, idle bool) {
	rx, used := &b.sock.Rx, 0
	defer func() { b.reuse(used) }() // when guest memory faults too: no chunk goes to the kernel twice
	for n < limit {
		parts, whole := b.gather(used)
		if idle = !whole || used >= ringSize/2; idle { // frames that the guest cannot have do not keep the worker for good
			break
		}
		r := zerocopy.TooBig
		if len(b.recv.frags) > 0 {
			r = p.WriteWords(0, 0, b.recv.frags)
		}
		if r == zerocopy.NoRoom {
			break
		}
		if r == zerocopy.Written {
			n++
		} else {
			b.recv.tooBig++
		}
		for range parts {
			base, _ := received(rx.At(used).Addr)
			b.sock.Fill.Add(base &^ uint64(b.chunk-1))
			used++
		}
	}
	return n, idle
}

// reuse is done with the first used entries of the Rx ring, whose chunks were added to the Fill ring.
func (b *binding) reuse(used int) {
	if used > 0 {
		b.sock.Rx.Release(used)
		b.sock.Fill.Publish()
		b.wakeFill()
	}
}

// gather finds the pieces of the frame that begins at entry i of the Rx ring, and sets frags to them; to none when it has too many. whole is
// false when it is not there, or not all of it.
func (b *binding) gather(i int) (parts int, whole bool) {
	rx := &b.sock.Rx
	b.recv.frags = b.recv.frags[:0]
	have := rx.Len()
	for {
		if i+parts == have {
			if have = rx.More(); i+parts == have {
				return 0, false
			}
		}
		d := rx.At(i + parts)
		parts++
		if parts <= maxParts {
			_, at := received(d.Addr)
			b.recv.frags = append(b.recv.frags, b.mem[at:at+uint64(d.Len)])
		}
		if d.Options&contd == 0 {
			break
		}
	}
	if parts > maxParts {
		b.recv.frags = b.recv.frags[:0]
	}
	return parts, true
}

// lost is how many frames the kernel could not hand over.
func (b *binding) lost() uint64 {
	st, err := b.sock.Statistics()
	if err != nil {
		return 0
	}
	return st.Rx_dropped + st.Rx_ring_full
}

// fillAddr is the address that has the kernel write a frame to data, or false when the chunk around it does not lie in the arena.
func (b *binding) fillAddr(data []byte) (uint64, bool) {
	off, ok := b.arena.Offset(data)
	if !ok {
		return 0, false
	}
	addr := off - uint64(b.before()) // no region lies before the private part
	return addr, addr+xsk.MaxChunk <= uint64(len(b.mem))
}
