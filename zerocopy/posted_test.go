package zerocopy

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// posts is a receiveq whose buffers' memory is known by id.
type posts struct {
	*guest
	mem map[uint16][][]byte
}

func newPosts(t testing.TB, size int) *posts {
	return &posts{guest: newGuest(t, size, features), mem: map[uint16][][]byte{}}
}

func (p *posts) add(lens ...int) {
	id, mem := p.post(lens...)
	p.mem[id] = mem
}

// received takes the next frame as a driver does: num_buffers buffers, headers off.
func (p *posts) received(hdrLen int) (hdr virtio.NetHdr, data []byte, ok bool) {
	p.t.Helper()
	p.ring.Publish()
	left := 1
	for first := true; left > 0; left-- {
		id, n, got := p.driver.Reap()
		if !got {
			if !first {
				p.t.Fatal("num_buffers promises more buffers than were used")
			}
			return hdr, nil, false
		}
		b := bytes.Join(p.mem[id], nil)[:n]
		if first {
			hdr = virtio.DecodeNetHdr(b[:hdrLen])
			b = b[hdrLen:]
			if hdrLen == virtio.NetHdrSize {
				left = int(hdr.NumBuffers)
			}
			first = false
		}
		data = append(data, b...)
	}
	return hdr, data, true
}

func TestPostedWrite(t *testing.T) {
	plain := virtio.FVersion1
	for _, c := range []struct {
		name    string
		f       virtio.Features
		buffers [][]int
		size    int
		want    WriteResult
		used    uint16 // num_buffers
	}{
		{"one buffer", features, [][]int{{2048}}, 1514, Written, 1},
		{"fits exactly", features, [][]int{{112}}, 100, Written, 1},
		{"one byte too small merges", features, [][]int{{111}, {50}}, 100, Written, 2},
		{"scattered header", plain, [][]int{{1, 1, 3, 7, 5, 500}}, 400, Written, 1},
		{"header apart", plain, [][]int{{12, 2000}}, 1514, Written, 1},
		{"merged over five", features, [][]int{{100}, {100}, {100}, {100}, {100}}, 480, Written, 5},
		{"merged over scattered", features, [][]int{{6, 7}, {13, 1}, {200}}, 100, Written, 3},
		{"nothing posted", features, nil, 100, NoRoom, 0},
		{"not enough posted", features, [][]int{{100}, {100}}, 480, NoRoom, 0},
		{"too small without merging", plain, [][]int{{100}, {2000}}, 480, TooBig, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newPosts(t, 64)
			for _, lens := range c.buffers {
				g.add(lens...)
			}
			p := NewPosted(g.ring, c.f)
			data := frame(c.size, 3)
			got := p.Write(virtio.NetHdr{GSOSize: 9}, [][]byte{data[:10], data[10:]})
			if got != c.want {
				t.Fatalf("result %v, want %v", got, c.want)
			}
			hdr, b, ok := g.received(p.HdrLen())
			if ok != (c.want == Written) {
				t.Fatalf("frame received: %v", ok)
			}
			// Of a header without flags no other field means anything: the sender's are not shown.
			if ok && (!bytes.Equal(b, data) || hdr != virtio.NetHdr{NumBuffers: c.used}) {
				t.Errorf("%d bytes with header %+v", len(b), hdr)
			}
			if s := p.Stats; ok && (s.Frames != 1 || s.Bytes != uint64(c.size)) {
				t.Errorf("stats %+v", s)
			}
			// What was not used goes back, and is there again.
			p.GiveBack()
			if n := g.ring.Available(); n != len(c.buffers)-int(c.used) {
				t.Errorf("%d chains available after GiveBack, want %d", n, len(c.buffers)-int(c.used))
			}
		})
	}
}

// A legacy header has no num_buffers.
func TestPostedWriteLegacy(t *testing.T) {
	g := newPosts(t, 8)
	g.add(10, 100)
	p := NewPosted(g.ring, 0)
	if p.HdrLen() != virtio.NetHdrSizeLegacy || p.Write(virtio.NetHdr{}, [][]byte{frame(60, 1)}) != Written {
		t.Fatal("not written")
	}
	if _, b, _ := g.received(10); !bytes.Equal(b, frame(60, 1)) {
		t.Errorf("received %d bytes", len(b))
	}
}

// A frame larger than everything that the ring can hold at once is lost, not waited for.
func TestPostedTooBigForRing(t *testing.T) {
	g := newPosts(t, 4)
	for range 4 {
		g.add(100)
	}
	p := NewPosted(g.ring, features)
	if r := p.Write(virtio.NetHdr{}, [][]byte{frame(500, 1)}); r != TooBig || p.Stats.TooBig != 1 {
		t.Errorf("result %v, stats %+v", r, p.Stats)
	}
	if r := p.Write(virtio.NetHdr{}, [][]byte{frame(300, 1)}); r != Written {
		t.Errorf("the next frame: %v", r)
	}
}

// Chains that cannot receive are returned unused and in order; what is good behind them is used.
func TestPostedMalformed(t *testing.T) {
	g := newPosts(t, 16)
	g.add(100)
	readable := g.sendParts(nil, 60)
	tiny, _ := g.post(12)
	g.add(2000)
	p := NewPosted(g.ring, features)
	if r := p.Write(virtio.NetHdr{}, [][]byte{frame(1000, 1)}); r != Written {
		t.Fatalf("result %v", r)
	}
	ids := g.returned()
	if len(ids) != 4 || ids[1] != readable || ids[2] != tiny || p.Stats.Malformed != 2 {
		t.Errorf("returned %v, malformed %d", ids, p.Stats.Malformed)
	}
}

// TestPostedMalformedFlood: a frame that meets a ring of chains that cannot receive is not what returns all of them, with good ones between them or not. It waits, the ring
// tells of more, and its turn comes.
func TestPostedMalformedFlood(t *testing.T) {
	for name, good := range map[string]bool{"bad": false, "good and bad": true} {
		t.Run(name, func(t *testing.T) {
			const bad, most = 100, 8
			g := newPosts(t, 256)
			for range bad {
				if good {
					g.add(100)
				}
				g.post(12)
			}
			g.add(2000)
			p := NewPosted(g.ring, features)
			turns := 0
			for before := uint64(0); ; turns++ {
				p.Flush()
				r := p.Write(virtio.NetHdr{}, [][]byte{frame(1000, 1)})
				if n := p.Stats.Malformed - before; n > most {
					t.Fatalf("%d malformed chains were returned in one turn, want %d at most", n, most)
				}
				if before = p.Stats.Malformed; r == Written {
					break
				}
				p.ring.Publish()
				if r != NoRoom || !p.ring.EnableKick() {
					t.Fatalf("result %v after %d malformed chains, and the ring tells of none", r, before)
				}
			}
			if p.Stats.Malformed != bad || turns < bad/most {
				t.Errorf("%d malformed chains in %d turns", p.Stats.Malformed, turns)
			}
		})
	}
}

func TestPostedSpaceAndCommit(t *testing.T) {
	for _, n := range []int{72, 1000, 3500, 14000} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			g := newPosts(t, 128)
			for range 30 {
				g.add(5, 7, 1500)
			}
			p := NewPosted(g.ring, features)
			for round := range 2 {
				segs, total := p.Space(15000)
				if total < 15000 {
					t.Fatalf("space %d", total)
				}
				data := frame(n, byte(round))
				src := append(make([]byte, virtio.NetHdrSize), data...)
				for _, s := range segs {
					src = src[copy(s, src):]
				}
				p.Commit(virtio.NetHdrSize + n)
				if _, b, ok := g.received(virtio.NetHdrSize); !ok || !bytes.Equal(b, data) {
					t.Fatalf("round %d: received %d bytes, want %d", round, len(b), n)
				}
			}
			// Direct writing and copying may alternate.
			if r := p.Write(virtio.NetHdr{}, [][]byte{frame(90, 5)}); r != Written {
				t.Fatal(r)
			}
			if _, b, _ := g.received(virtio.NetHdrSize); !bytes.Equal(b, frame(90, 5)) {
				t.Error("frame copied after a direct one is wrong")
			}
			segs, _ := p.Space(100)
			copy(segs[2], frame(60, 6))
			p.Commit(virtio.NetHdrSize + 60)
			if _, b, _ := g.received(virtio.NetHdrSize); !bytes.Equal(b, frame(60, 6)) {
				t.Error("direct frame after a copied one is wrong")
			}
		})
	}
}

// Without room Space says so; without merging it is the next buffer alone.
func TestPostedSpaceLimits(t *testing.T) {
	g := newPosts(t, 8)
	p := NewPosted(g.ring, features)
	if segs, n := p.Space(100); len(segs) != 0 || n != 0 {
		t.Errorf("space of %d bytes in an empty ring", n)
	}
	g.add(50)
	if _, n := p.Space(100); n != 50 {
		t.Errorf("space %d, want 50", n)
	}
	g = newPosts(t, 8)
	g.add(12, 100)
	g.add(12, 1000)
	p = NewPosted(g.ring, virtio.FVersion1)
	if segs, n := p.Space(500); n != 112 || len(segs) != 2 {
		t.Errorf("space %d in %d segments without merging", n, len(segs))
	}
}

func TestWindowUndo(t *testing.T) {
	g := newGuest(t, 16, features)
	w := g.window()
	g.send(virtio.NetHdr{}, frame(60, 0))
	g.send(virtio.NetHdr{}, frame(60, 1))
	g.sendParts(nil, 12) // malformed, between two that the device does not take
	g.send(virtio.NetHdr{}, frame(60, 2))
	b := pop(t, w)
	b[0].Release(Copied)
	w.Undo(2)
	if w.Reap() != 1 || w.Pending() != 0 || g.ring.Available() != 3 {
		t.Errorf("pending %d, available %d", w.Pending(), g.ring.Available())
	}
	b = pop(t, w)
	if len(b) != 2 {
		t.Fatalf("%d frames after Undo, want 2", len(b))
	}
	wantContent(t, b[0], frame(60, 1))
	wantContent(t, b[1], frame(60, 2))
	// What was waited for and is undone is not waited for any more, whatever slot it takes later.
	w.Reap()
	time.Sleep(time.Millisecond)
	w.Undo(2)
	if wait := w.LongestWait(); wait != 0 {
		t.Errorf("the longest wait is %v, of a frame that was undone", wait)
	}
}

// Nothing is allocated per frame, in either direction.
func TestNoAllocations(t *testing.T) {
	g := newGuest(t, 8, features)
	w := g.window()
	batch := make([]*Buffer, 8)
	a := g.alloc(2048)
	tx := func() {
		_, _ = g.driver.Add([]vring.Buf{{GPA: a, Len: 1000}}, nil)
		g.driver.Publish()
		n, _ := w.Pop(batch)
		ReleaseAll(batch[:n], Copied)
		w.Reap()
		g.ring.Publish()
		g.driver.Reap()
	}
	if n := testing.AllocsPerRun(1000, tx); n > 0 {
		t.Errorf("transmit: %v allocations per frame", n)
	}
	g = newGuest(t, 8, features)
	p := NewPosted(g.ring, features)
	frags := [][]byte{frame(60, 1)}
	rx := func() {
		_, _ = g.driver.Add(nil, []vring.Buf{{GPA: a, Len: 2000}})
		g.driver.Publish()
		if p.Write(virtio.NetHdr{}, frags) != Written {
			t.Fatal("not written")
		}
		g.ring.Publish()
		g.driver.Reap()
	}
	if n := testing.AllocsPerRun(1000, rx); n > 0 {
		t.Errorf("receive: %v allocations per frame", n)
	}
}

func BenchmarkPosted(b *testing.B) {
	for _, size := range []int{64, 1518} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			g := newGuest(b, 256, features)
			p := NewPosted(g.ring, features)
			frags := [][]byte{frame(size, 1)}
			bufs := []vring.Buf{{GPA: g.alloc(2048), Len: 2048}}
			for i := 0; i < b.N; i += 64 {
				b.StopTimer()
				for range 64 {
					_, _ = g.driver.Add(nil, bufs)
				}
				g.driver.Publish()
				b.StartTimer()
				for range 64 {
					p.Write(virtio.NetHdr{}, frags)
				}
				g.ring.Publish()
				b.StopTimer()
				for range 64 {
					g.driver.Reap()
				}
				b.StartTimer()
			}
		})
	}
}

func BenchmarkWindow(b *testing.B) {
	g := newGuest(b, 256, features)
	w := g.window()
	batch := make([]*Buffer, 64)
	a := g.alloc(2048)
	bufs := []vring.Buf{{GPA: a, Len: 76}}
	for i := 0; i < b.N; i += 64 {
		b.StopTimer()
		for range 64 {
			_, _ = g.driver.Add(bufs, nil)
		}
		g.driver.Publish()
		b.StartTimer()
		n, _ := w.Pop(batch)
		ReleaseAll(batch[:n], Copied)
		w.Reap()
		g.ring.Publish()
		b.StopTimer()
		for range 64 {
			g.driver.Reap()
		}
		b.StartTimer()
	}
}

// The same where every buffer takes several descriptors: then the ring is full of far fewer buffers than it has descriptors. A frame that waited for
// more would wait for ever, and all behind it.
func TestPostedTooBigForRingOfChains(t *testing.T) {
	for f, sizes := range map[virtio.Features][]int{
		features:                      {8},
		features | virtio.FRingPacked: {6, 7, 8}, // with 0, 1 and 2 descriptors to spare
	} {
		for _, size := range sizes {
			t.Run(fmt.Sprintf("packed=%v/%d", f.Has(virtio.FRingPacked), size), func(t *testing.T) {
				g := &posts{guest: newGuest(t, size, f), mem: map[uint16][][]byte{}}
				p := NewPosted(g.ring, f)
				write := func(n int) WriteResult { return p.Write(virtio.NetHdr{}, [][]byte{frame(n, byte(n))}) }
				g.add(12, 30, 58)
				if r := write(150); r != NoRoom || p.Stats.TooBig != 0 {
					t.Fatalf("with room for another buffer: %v, stats %+v", r, p.Stats)
				}
				g.add(1, 90, 9)
				if r := write(180); r != Written {
					t.Fatalf("in two buffers: %v", r)
				}
				if _, b, ok := g.received(virtio.NetHdrSize); !ok || !bytes.Equal(b, frame(180, 180)) {
					t.Fatalf("received %d bytes", len(b))
				}
				for range 2 {
					g.add(12, 30, 58)
				}
				if r := write(500); r != TooBig || p.Stats.TooBig != 1 {
					t.Fatalf("larger than the ring: %v, stats %+v", r, p.Stats)
				}
				if r := write(80); r != Written {
					t.Errorf("the next frame: %v", r)
				}
			})
		}
	}
}
