package zerocopy

import (
	"fmt"
	"sync/atomic"

	"github.com/vhostd/vhostd/vring"
)

// Orphan frees the guest's pages from b: it copies the fragments into private memory, points b at the copy, and only then gives
// the pages back by running the Callback, with Copied. Afterwards b carries no Ubuf and may be kept for any time. The caller must
// hold the only reference: with several, the others would be left with pages that are no longer theirs.
//
// When there is no memory for the copy nothing has changed: same fragments, same Ubuf, no Callback.
func (b *Buffer) Orphan(alloc Allocator) error {
	if !b.Zerocopy() {
		return nil
	}
	if n := atomic.LoadInt32(&b.refs); n != 1 {
		return fmt.Errorf("orphaning a buffer with %d references", n)
	}
	private, err := alloc(b.Len())
	if err != nil {
		return fmt.Errorf("no memory to orphan a frame of %d bytes: %w", b.Len(), err)
	}
	b.Header() // it lies in the guest's pages too
	private = private[:b.CopyTo(private, 0)]
	// A fresh slice: the old one's memory belongs to the Window's slot.
	b.segs = []vring.Seg{{Mem: private}}
	if w := b.window; w != nil {
		w.slots[b.ubuf.Desc].buf = nil // the slot goes on without b, which is its holder's now
	}
	b.returned(Copied)
	return nil
}

// Clone returns a second Buffer of the same frame, for whoever keeps frames: a capture, a flood to several ports. b is orphaned first, so
// that neither carries a Ubuf; both share the private copy, which nobody writes to.
func (b *Buffer) Clone(alloc Allocator) (*Buffer, error) {
	if err := b.Orphan(alloc); err != nil {
		return nil, err
	}
	return NewBuffer(b.Header(), b.Frags()...), nil
}

// CopyHeader returns a Buffer with the first n bytes of the frame in memory of its own, to be rewritten, and the rest shared with b, which
// is orphaned first (the kernel's pskb_copy). n is capped at the frame's length.
func (b *Buffer) CopyHeader(n int, alloc Allocator) (*Buffer, error) {
	if err := b.Orphan(alloc); err != nil {
		return nil, err
	}
	n = min(n, b.Len())
	head, err := alloc(n)
	if err != nil {
		return nil, fmt.Errorf("no memory for a header of %d bytes: %w", n, err)
	}
	head = head[:b.CopyTo(head, 0)]
	frags := [][]byte{head}
	skip := n
	for _, s := range b.segs {
		if skip >= len(s.Mem) {
			skip -= len(s.Mem)
			continue
		}
		frags = append(frags, s.Mem[skip:])
		skip = 0
	}
	return NewBuffer(b.Header(), frags...), nil
}
