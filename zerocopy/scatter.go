package zerocopy

import (
	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// scatter writes a stream of bytes over the segments of the chains that are held.
type scatter struct {
	p        *Posted
	at       uint64 // cursor of the chain
	seg, off int
}

func (w *scatter) header(hdr *virtio.NetHdr) {
	var b [virtio.NetHdrSize]byte
	hdr.Encode(b[:w.p.hdrLen])
	w.write(b[:w.p.hdrLen])
}

// next returns the guest memory at the writing position.
func (w *scatter) next() *vring.Seg {
	c := &w.p.chains[w.at&w.p.mask]
	for w.off == len(c.Segs[w.seg].Mem) {
		w.off = 0
		if w.seg++; w.seg == len(c.Segs) {
			w.seg = 0
			w.at++
			c = &w.p.chains[w.at&w.p.mask]
		}
	}
	return &c.Segs[w.seg]
}

func (w *scatter) write(b []byte) {
	for len(b) > 0 {
		s := w.next()
		n := min(len(s.Mem)-w.off, len(b))
		shm.Copy(s.Mem[w.off:], b[:n])
		w.p.ring.View().Dirty(s.Addr+guestmem.GPA(w.off), uint64(n))
		w.off += n
		b = b[n:]
	}
}

func (w *scatter) skip(n int) {
	for n > 0 {
		s := w.next()
		m := min(n, len(s.Mem)-w.off)
		w.off += m
		n -= m
	}
}
