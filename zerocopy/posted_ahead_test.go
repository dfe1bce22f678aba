package zerocopy

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/vhostd/vhostd/virtio"
)

// fill posts buffers of random lengths until the ring is full, one in eight of them in two pieces. What the driver has back is used again.
func (p *posts) fill(rnd *rand.Rand) {
	for p.driver.Free() >= 2 {
		if p.next > ramBase+ramSize-4096 {
			p.next = ramBase + ramSize/4 // a ring of at most 64 times 400 bytes lies far behind
		}
		if n := 30 + rnd.IntN(370); rnd.IntN(8) == 0 {
			m := 1 + rnd.IntN(n-1)
			p.add(m, n-m)
		} else {
			p.add(n)
		}
	}
}

// TestPostedAhead: whatever lengths frames and buffers have, and whatever is done between two frames, each arrives whole, in order, with the number
// of its buffers.
func TestPostedAhead(t *testing.T) {
	for name, f := range map[string]virtio.Features{"split": features, "packed": packedFeatures} {
		t.Run(name, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(7, uint64(len(name))))
			g := &posts{guest: newGuest(t, 64, f), mem: map[uint16][][]byte{}}
			p := NewPosted(g.ring, f)
			merged := 0
			for i := range 4000 {
				if i%3 == 0 {
					g.fill(rnd)
				}
				want := frame(14+rnd.IntN([]int{100, 400, 3000}[rnd.IntN(3)]), byte(i))
				if err := sendToGuest(p, rnd, want); err != nil {
					g.ring.Publish()
					g.drain(t, p)
					g.fill(rnd)
					if err := sendToGuest(p, rnd, want); err != nil {
						t.Fatalf("frame %d: %v", i, err)
					}
				}
				hdr, got, ok := g.received(virtio.NetHdrSize)
				if !ok || !bytes.Equal(got, want) {
					t.Fatalf("frame %d of %d bytes: received %d bytes, header %+v, %v", i, len(want), len(got), hdr, g.driver.Err())
				}
				if hdr.NumBuffers > 1 {
					merged++
				}
			}
			p.GiveBack()
			for left := g.driver.Out(); left > 0; left-- { // each has room for the shortest frame
				if err := result(p.Write(virtio.NetHdr{}, [][]byte{frame(14, 1)})); err != nil {
					t.Fatalf("%d buffers are lost: %v", left, err)
				}
				p.Stats.Frames--
			}
			if merged < 1000 || p.Stats.Frames != 4000 {
				t.Errorf("%d frames of %d were merged", merged, p.Stats.Frames)
			}
		})
	}
}

// drain checks that nothing is left to receive.
func (p *posts) drain(t *testing.T, posted *Posted) {
	t.Helper()
	if _, b, ok := p.received(posted.HdrLen()); ok {
		t.Fatalf("a frame of %d bytes that nobody wrote", len(b))
	}
}

// sendToGuest hands data over in one of the ways that there are.
func sendToGuest(p *Posted, rnd *rand.Rand, data []byte) error {
	switch rnd.IntN(12) {
	case 0:
		p.GiveBack()
	case 1:
		return throughSpace(p, data)
	case 2:
		n := rnd.IntN(len(data))
		return result(p.Write(virtio.NetHdr{}, [][]byte{data[:n], data[n:]}))
	}
	return result(p.Write(virtio.NetHdr{}, [][]byte{data}))
}

func result(r WriteResult) error {
	if r != Written {
		return fmt.Errorf("result %d", r)
	}
	return nil
}

// throughSpace writes data as the kernel would.
func throughSpace(p *Posted, data []byte) error {
	all := append(make([]byte, virtio.NetHdrSize), data...)
	segs, n := p.Space(len(all))
	if n < len(all) {
		return fmt.Errorf("space for %d bytes, %d are needed", n, len(all))
	}
	left := all
	for _, s := range segs {
		left = left[copy(s, left):]
	}
	p.Commit(len(all))
	return nil
}

// TestPostedAheadHeader: a header with flags arrives as it is, whatever the caller has in num_buffers.
func TestPostedAheadHeader(t *testing.T) {
	g := newPosts(t, 16)
	for range 8 {
		g.add(300)
	}
	p := NewPosted(g.ring, features|virtio.FNetGuestCsum)
	want := virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, HdrLen: 54, CsumStart: 34, CsumOffset: 16, NumBuffers: 77}
	for _, n := range []int{60, 288, 289, 800} {
		if r := p.Write(want, [][]byte{frame(n, 1)}); r != Written {
			t.Fatalf("%d bytes: %v", n, r)
		}
		hdr, b, _ := g.received(virtio.NetHdrSize)
		want := want
		want.NumBuffers = uint16((n + virtio.NetHdrSize + 299) / 300)
		if hdr != want || !bytes.Equal(b, frame(n, 1)) {
			t.Errorf("%d bytes: received %d with header %+v, want %+v", n, len(b), hdr, want)
		}
	}
}

// TestRunAfterLongChains: a chain whose segments were given up because they were many is popped in a run all the same.
func TestRunAfterLongChains(t *testing.T) {
	for name, f := range map[string]virtio.Features{"split": features, "packed": packedFeatures} {
		t.Run(name, func(t *testing.T) {
			long := slices.Repeat([]int{2}, keepSegs+2)
			g := &posts{guest: newGuest(t, 128, f), mem: map[uint16][][]byte{}}
			p := NewPosted(g.ring, f)
			send := newGuest(t, 128, f)
			w := send.window()
			for round := range 60 {
				g.next, send.next = ramBase+ramSize/2, ramBase+ramSize/2
				for i := range 21 {
					if i == round%3*7 {
						g.add(long...)
						send.sendParts(frame(2*len(long)-virtio.NetHdrSize, 1), long...)
						continue
					}
					g.add(100)
					send.send(virtio.NetHdr{}, frame(60, 2))
				}
				for range 21 {
					if err := result(p.Write(virtio.NetHdr{}, [][]byte{frame(60, 3)})); err != nil {
						t.Fatal(err)
					}
					if _, b, ok := g.received(virtio.NetHdrSize); !ok || !bytes.Equal(b, frame(60, 3)) {
						t.Fatalf("received %d bytes", len(b))
					}
				}
				bufs := pop(t, w)
				if len(bufs) != 21 {
					t.Fatalf("%d frames, want 21", len(bufs))
				}
				wantContent(t, bufs[20], frame(60, 2))
				ReleaseAll(bufs, Copied)
				w.Reap()
				send.returned()
			}
			p.GiveBack()
			w.Close()
		})
	}
}

// TestMergeLimit: a frame is merged over maxMerge buffers and no more, in one piece or in several, whatever runs the buffers were popped in.
func TestMergeLimit(t *testing.T) {
	const small = virtio.NetHdrSize + 1
	for _, posted := range []int{maxMerge + 5, maxMerge + 500} {
		for pieces := 1; pieces <= 2; pieces++ {
			for extra, want := range []WriteResult{Written, TooBig} {
				g := newPosts(t, 2*maxMerge)
				for range posted {
					g.add(small)
				}
				p := NewPosted(g.ring, features)
				data := frame(maxMerge*small-virtio.NetHdrSize+extra, 1)
				frags := [][]byte{data, nil}[:pieces]
				if got := p.Write(virtio.NetHdr{}, frags); got != want {
					t.Errorf("%d bytes more than %d of %d buffers hold, in %d pieces: result %v, want %v", extra, maxMerge, posted, pieces, got, want)
				}
				p.GiveBack()
			}
		}
	}
}
