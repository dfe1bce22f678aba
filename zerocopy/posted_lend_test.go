package zerocopy

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/vhostd/vhostd/virtio"
)

const lendMax = 1518

// lend borrows the next chain, whose frame must be in one piece.
func lend(t *testing.T, p *Posted) []byte {
	t.Helper()
	data, ok := p.Lend(lendMax)
	if !ok || len(data) != lendMax {
		t.Fatalf("lent: %v, %d bytes", ok, len(data))
	}
	return data
}

// TestPostedLend: chains are lent in order, used in order, in place or by a copy, and what comes back to the ring is popped again.
func TestPostedLend(t *testing.T) {
	g := newPosts(t, 16)
	p := NewPosted(g.ring, features)
	if _, ok := p.Lend(lendMax); ok {
		t.Fatal("something was lent of an empty ring")
	}
	frames := [][]byte{frame(60, 1), frame(1518, 2), frame(700, 3)}
	g.add(2048)
	g.add(6, 6, 700, 900) // header and frame in pieces: to be copied
	g.add(12, 1518)
	g.add(12 + 1518)
	copy(lend(t, p), frames[0])
	if data, ok := p.Lend(lendMax); !ok || data != nil {
		t.Fatalf("a scattered chain: lent %v, %d bytes in one piece", ok, len(data))
	}
	copy(lend(t, p), frames[2])
	lend(t, p)
	if _, ok := p.Lend(lendMax); ok || p.Lent() != 4 {
		t.Fatalf("%d are lent of 4", p.Lent())
	}
	p.UseLent(len(frames[0]))
	p.WriteLent([][]byte{frames[1][:3], frames[1][3:]})
	p.UseLent(len(frames[2]))
	for i, want := range frames {
		hdr, got, ok := g.received(p.HdrLen())
		if !ok || !bytes.Equal(got, want) || hdr.NumBuffers != 1 || hdr.Flags|hdr.GSOType != 0 {
			t.Fatalf("frame %d: %d bytes, %v, header %+v", i, len(got), ok, hdr)
		}
	}
	p.TakeBack()
	p.GiveBack()
	g.write(p, frame(100, 4))
	if p.Stats.Frames != 4 || p.Stats.Bytes != 60+1518+700+100 {
		t.Errorf("%+v", p.Stats)
	}
}

// write has the guest receive a frame by copy.
func (g *posts) write(p *Posted, f []byte) {
	g.t.Helper()
	if r := p.Write(virtio.NetHdr{}, [][]byte{f}); r != Written {
		g.t.Fatalf("written: %v", r)
	}
	if _, got, ok := g.received(p.HdrLen()); !ok || !bytes.Equal(got, f) {
		g.t.Fatalf("%d bytes, %v", len(got), ok)
	}
}

// TestPostedLendTooSmall: a chain that frames are merged over is not lent, and neither are those behind it before it has been used.
func TestPostedLendTooSmall(t *testing.T) {
	g := newPosts(t, 16)
	p := NewPosted(g.ring, features)
	g.add(2048)
	g.add(100)
	g.add(2048)
	lend(t, p)
	for range 2 {
		if _, ok := p.Lend(lendMax); ok {
			t.Fatal("a chain of 100 bytes was lent")
		}
	}
	p.UseLent(20)
	g.received(p.HdrLen())
	g.write(p, frame(500, 1)) // over both
	g.add(2048)
	lend(t, p)
	p.UseLent(20)
	if p.Lent() != 0 {
		t.Errorf("%d are lent", p.Lent())
	}
}

// TestPostedLendMalformed: what is no buffer goes back unused after those that are lent, not before.
func TestPostedLendMalformed(t *testing.T) {
	g := newPosts(t, 16)
	p := NewPosted(g.ring, features)
	g.add(2048)
	g.add(5) // no room for a header
	g.add(2048)
	lend(t, p)
	if _, ok := p.Lend(lendMax); ok {
		t.Fatal("lent across a malformed chain")
	}
	g.ring.Publish()
	if _, _, ok := g.driver.Reap(); ok {
		t.Fatal("a chain came back before the one that is lent")
	}
	p.ReturnLent()
	lend(t, p)
	p.UseLent(100)
	g.ring.Publish()
	for i, want := range []uint32{0, 0, 112} {
		if _, n, ok := g.driver.Reap(); !ok || n != want {
			t.Fatalf("chain %d: %d bytes, %v, want %d", i, n, ok, want)
		}
	}
	if p.Stats.Malformed != 1 || p.Stats.Frames != 1 {
		t.Errorf("%+v", p.Stats)
	}
}

// TestPostedLendIsExclusive: what would use a chain before those that are lent is a bug of the device.
func TestPostedLendIsExclusive(t *testing.T) {
	for name, f := range map[string]func(p *Posted){
		"Write":    func(p *Posted) { p.Write(virtio.NetHdr{}, [][]byte{frame(60, 1)}) },
		"Space":    func(p *Posted) { p.Space(100) },
		"GiveBack": func(p *Posted) { p.GiveBack() },
		"UseLent":  func(p *Posted) { p.UseLent(60); p.UseLent(60) },
	} {
		t.Run(name, func(t *testing.T) {
			g := newPosts(t, 16)
			g.add(2048)
			p := NewPosted(g.ring, features)
			lend(t, p)
			defer func() {
				if r := recover(); !bytes.HasPrefix(fmt.Append(nil, r), []byte("bug: ")) {
					t.Errorf("recovered %v", r)
				}
			}()
			f(p)
		})
	}
}
