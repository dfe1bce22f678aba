package zerocopy

import (
	"errors"
	"sync/atomic"

	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// Outcome tells the owner of guest pages what became of them.
type Outcome uint8

// All outcomes but ZeroCopied mean that the pages were read, or given up, before they were released.
const (
	Copied         Outcome = iota // the device copies every frame
	CopiedSmall                   // below the size from which zero-copy pays
	CopiedCap                     // too many frames were in flight
	CopiedFallback                // the device could not take the pages of this frame
	CopiedAnyway                  // sent as zero-copy, but the kernel reported that it copied
	Dropped                       // not sent
	ZeroCopied                    // the device sent the guest's pages themselves
	NumOutcomes
)

var outcomeNames = [NumOutcomes]string{
	"copied", "copied_small", "copied_cap", "copied_fallback", "copied_anyway", "dropped", "zerocopied",
}

// String is the outcome's name as counters show it.
func (o Outcome) String() string { return outcomeNames[o] }

// Ubuf is the userspace-buffer information that rides on a Buffer whose fragments are guest pages.
type Ubuf struct {
	// Callback runs once, when the last reference to the pages has gone. It may run on any goroutine. u is good until the Buffer
	// carries another frame.
	Callback func(u *Ubuf, o Outcome)
	// Arg is the callback owner's.
	Arg any
	// Desc is the slot of the buffer in its transmitq's Window.
	Desc uint32
}

// Errors of Buffer's methods.
var (
	// ErrUbuf refuses to recycle a Buffer that still carries a Ubuf.
	ErrUbuf = errors.New("buffer carries a ubuf")
	// ErrHeader: the frame's chain ended before its virtio-net header did.
	ErrHeader = errors.New("chain is too short for the virtio-net header")
)

// Buffer is a frame on its way from the guest: fragments of memory, the guest's own pages as long as it carries a Ubuf.
//
// A Buffer is handed from owner to owner and is not safe for concurrent use, Retain and Release apart. Fragments are valid from
// the moment a device gets the Buffer until it calls Release for the last time; the Buffer itself is not to be touched after that.
type Buffer struct {
	segs   []vring.Seg
	hdrSrc []byte // the virtio-net header in guest memory, nil once it was fetched
	first  uint64 // the header, as virtio.NetHdr.Words
	last   uint32
	length uint32  // bytes of all segs
	refs   int32   // by sync/atomic, except where one owner is provably alone
	window *Window // whose slot ubuf.Desc is, when the Ubuf is a Window's: saves the indirect call
	ubuf   Ubuf
	worst  atomic.Uint32 // 1 + the outcome of a reference that was not ZeroCopied: so is the whole; 0 for none
	bufs   [][]byte      // scratch of Frags
	told   Ubuf          // the last one, while its Callback runs
}

// NewBuffer returns a Buffer of private memory: no Ubuf, one reference. The frame has no virtio-net header in it; hdr is its header.
func NewBuffer(hdr virtio.NetHdr, frags ...[]byte) *Buffer {
	b := &Buffer{}
	b.first, b.last = hdr.Words()
	b.setFrags(frags)
	b.refs = 1
	return b
}

// NewUbufBuffer is NewBuffer for fragments that belong to somebody who wants them back: u.Callback runs at the last Release.
func NewUbufBuffer(u Ubuf, hdr virtio.NetHdr, frags ...[]byte) *Buffer {
	b := NewBuffer(hdr, frags...)
	b.ubuf = u
	return b
}

func (b *Buffer) setFrags(frags [][]byte) {
	b.segs, b.length = b.segs[:0], 0
	for _, f := range frags {
		if len(f) > 0 {
			b.segs = append(b.segs, vring.Seg{Mem: f})
			b.length += uint32(len(f))
		}
	}
}

// Len is the length of the frame in bytes, without the virtio-net header.
func (b *Buffer) Len() int { return int(b.length) }

// Segs are the frame's fragments. The guest may rewrite them at any moment: whatever is decided on is read once, into private memory.
func (b *Buffer) Segs() []vring.Seg { return b.segs }

// Frags are the frame's fragments as plain slices, good until the next call.
func (b *Buffer) Frags() [][]byte {
	b.bufs = b.bufs[:0]
	for i := range b.segs {
		b.bufs = append(b.bufs, b.segs[i].Mem)
	}
	return b.bufs
}

// Header returns the virtio-net header of the frame, fetched from guest memory at the first call and never again.
func (b *Buffer) Header() virtio.NetHdr {
	return virtio.NetHdrOf(b.HeaderWords())
}

// HeaderWords is Header as virtio.NetHdr.Words: in registers. A header that is stored field by field and then loaded as a whole waits until the fields are in
// the cache, and so behind all stores to guests' memory before.
func (b *Buffer) HeaderWords() (first uint64, last uint32) {
	if b.hdrSrc != nil {
		first, last := virtio.NetHdrWords(b.hdrSrc)
		b.first, b.last, b.hdrSrc = virtio.NetHdrSent(first), last, nil
	}
	return b.first, b.last
}

// CopyTo copies up to len(p) bytes of the frame from offset off into p, and returns how many.
func (b *Buffer) CopyTo(p []byte, off int) int {
	n := 0
	for i := range b.segs {
		m := b.segs[i].Mem
		if off >= len(m) {
			off -= len(m)
			continue
		}
		n += copy(p[n:], m[off:])
		off = 0
		if n == len(p) {
			break
		}
	}
	return n
}

// Zerocopy reports whether the Buffer carries a Ubuf, which means that its fragments are somebody else's pages.
func (b *Buffer) Zerocopy() bool { return b.window != nil || b.ubuf.Callback != nil }

// Ubuf returns the Buffer's Ubuf, or nil.
func (b *Buffer) Ubuf() *Ubuf {
	if !b.Zerocopy() {
		return nil
	}
	return &b.ubuf
}

// Retain adds a reference to the pages, to be given up with Release.
func (b *Buffer) Retain() {
	if atomic.AddInt32(&b.refs, 1) <= 1 {
		panic("bug: retaining a buffer that was released")
	}
}

// Release gives up a reference, with what became of the pages under it. The last one runs the Ubuf's Callback: with ZeroCopied only
// if every reference said so.
func (b *Buffer) Release(o Outcome) {
	if atomic.LoadInt32(&b.refs) != 1 {
		// Whoever sees 1 is alone: nobody else is left to retain or release. Others have to count.
		if o != ZeroCopied {
			b.worst.CompareAndSwap(0, uint32(o)+1)
		}
		switch n := atomic.AddInt32(&b.refs, -1); {
		case n > 0:
			return
		case n < 0:
			panic("bug: a buffer was released twice")
		}
	}
	b.refs = 0
	if !b.Zerocopy() {
		return
	}
	if worst := b.worst.Load(); worst != 0 {
		o = Outcome(worst - 1)
	}
	b.returned(o)
}

// ReleaseAll releases every buffer of bufs as Release does. A device that is done with frames when its Send returns calls it from
// Send, and only there: it takes the short way to a Window that the calling worker owns.
func ReleaseAll(bufs []*Buffer, o Outcome) {
	for _, b := range bufs {
		w := b.window
		if w == nil || atomic.LoadInt32(&b.refs) != 1 || b.worst.Load() != 0 {
			b.Release(o)
			continue
		}
		b.refs, b.window = 0, nil
		w.completeLocal(b.ubuf.Desc, o)
	}
}

// returned takes the Ubuf off b and tells its owner. b may carry another frame once that has begun.
func (b *Buffer) returned(o Outcome) {
	if w := b.window; w != nil {
		b.window = nil
		w.complete(b.ubuf.Desc, o)
		return
	}
	b.told, b.ubuf = b.ubuf, Ubuf{}
	b.told.Callback(&b.told, o)
}

// Recycle prepares a Buffer of private memory for another frame. It refuses one that carries a Ubuf: its pages are not ours to reuse.
func (b *Buffer) Recycle(hdr virtio.NetHdr, frags ...[]byte) error {
	if b.Zerocopy() {
		return ErrUbuf
	}
	b.first, b.last = hdr.Words()
	b.setFrags(frags)
	b.refs = 1
	b.worst.Store(0)
	return nil
}

// RecycleUbuf is Recycle for fragments that belong to somebody who wants them back: u.Callback runs at the last Release.
func (b *Buffer) RecycleUbuf(u Ubuf, hdr virtio.NetHdr, frags ...[]byte) error {
	if err := b.Recycle(hdr, frags...); err != nil {
		return err
	}
	b.ubuf = u
	return nil
}

// Held tells a Callback whether somebody goes on with the Buffer: it was orphaned, not released, and is not to be recycled.
func (b *Buffer) Held() bool { return atomic.LoadInt32(&b.refs) > 0 }

// Allocator provides the private memory for Orphan: n bytes, or an error when there are none to be had.
type Allocator func(n int) ([]byte, error)

// HeapAllocator takes the memory from Go's heap.
func HeapAllocator(n int) ([]byte, error) { return make([]byte, n), nil }
