package zerocopy

import (
	"bytes"
	"slices"
	"testing"

	"github.com/vhostd/vhostd/virtio"
)

const packedFeatures = features | virtio.FRingPacked

// A packed ring of any size: frames of one and of several descriptors, released in any order, come back in the order they were sent, and
// those that no device took are sent again.
func TestWindowOfPackedRing(t *testing.T) {
	for _, size := range []int{1, 2, 3, 5, 7, 8, 61} {
		g := newGuest(t, size, packedFeatures)
		w := g.window()
		for round := range 40 {
			g.next = ramBase + 1<<17 // the buffers of earlier rounds are free
			var sent []uint16
			for i := 0; ; i++ {
				parts := []int{64}
				if (round+i)%3 == 0 {
					parts = []int{12, 20, 32}
				}
				if g.driver.Free() < len(parts) {
					break
				}
				sent = append(sent, g.sendParts(frame(52, byte(i)), parts...))
			}
			bufs := pop(t, w)
			w.Undo(len(bufs) / 2)
			if again := pop(t, w); len(again) != len(bufs)/2 {
				t.Fatalf("size %d: %d frames after Undo of %d", size, len(again), len(bufs)/2)
			}
			if len(bufs) != len(sent) || w.Pending() != len(sent) {
				t.Fatalf("size %d: %d frames of %d, %d pending", size, len(bufs), len(sent), w.Pending())
			}
			for i := range bufs { // from the middle outwards, so to speak
				b := bufs[(i*2+round)%len(bufs)]
				if len(bufs)%2 == 0 {
					b = bufs[len(bufs)-1-i]
				}
				wantContent(t, b, frame(52, byte(slices.Index(bufs, b))))
				b.Release(ZeroCopied)
				w.Reap()
			}
			if got := g.returned(); !slices.Equal(got, sent) {
				t.Fatalf("size %d: ids %v came back, want %v", size, got, sent)
			}
		}
		w.Close()
	}
}

func TestPostedOnPackedRing(t *testing.T) {
	for _, size := range []int{3, 5, 7, 8} {
		g := &posts{guest: newGuest(t, size, packedFeatures), mem: map[uint16][][]byte{}}
		p := NewPosted(g.ring, packedFeatures)
		for round := range 30 {
			g.next = ramBase + 1<<17
			for g.driver.Free() > 0 {
				g.add(100)
			}
			if r := p.Write(virtio.NetHdr{}, [][]byte{frame(size*100, 1)}); r != TooBig {
				t.Fatalf("size %d: a frame larger than the whole ring: %v", size, r)
			}
			want := frame(size*100-virtio.NetHdrSize-round%150, byte(round)) // all of the ring's buffers, or all but one or two
			if r := p.Write(virtio.NetHdr{}, [][]byte{want}); r != Written {
				t.Fatalf("size %d: %v", size, r)
			}
			if _, got, _ := g.received(virtio.NetHdrSize); !bytes.Equal(got, want) {
				t.Fatalf("size %d: received %d bytes, want %d", size, len(got), len(want))
			}
		}
		p.GiveBack()
	}
}
