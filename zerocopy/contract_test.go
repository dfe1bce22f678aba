package zerocopy

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
)

// The contract of zero-copy transmission, line by line.

// 1: a Ubuf is a callback, its owner's argument, and the slot of the buffer in its transmitq's Window.
func TestContract01Ubuf(t *testing.T) {
	g := newGuest(t, 8, features)
	w := g.window()
	for range 3 {
		g.send(virtio.NetHdr{}, frame(60, 1))
	}
	for i, b := range pop(t, w) {
		if u := b.Ubuf(); u == nil || u.Desc != uint32(i) {
			t.Errorf("frame %d has ubuf %+v", i, u)
		}
	}
	var r record
	b := NewUbufBuffer(r.ubuf(42), virtio.NetHdr{}, frame(60, 1))
	b.Release(ZeroCopied)
	if !slices.Equal(r.descs, []uint32{42}) {
		t.Errorf("callback got desc %v", r.descs)
	}
}

// 2: Zerocopy tells whether a Buffer carries a Ubuf.
func TestContract02Zerocopy(t *testing.T) {
	g := newGuest(t, 8, features)
	g.send(virtio.NetHdr{}, frame(60, 1))
	b := pop(t, g.window())[0]
	if !b.Zerocopy() {
		t.Error("a frame in guest pages says that it carries no ubuf")
	}
	if NewBuffer(virtio.NetHdr{}, frame(60, 1)).Zerocopy() {
		t.Error("a frame in private memory says that it carries a ubuf")
	}
	if err := b.Orphan(HeapAllocator); err != nil || b.Zerocopy() || b.Ubuf() != nil {
		t.Errorf("after Orphan (%v) the frame carries %v", err, b.Ubuf())
	}
}

// 3: the callback runs when the last reference goes, once, with what happened to the pages: one copy makes it a copy.
func TestContract03Release(t *testing.T) {
	for _, c := range []struct {
		name     string
		releases []Outcome
		want     Outcome
	}{
		{"one", []Outcome{ZeroCopied}, ZeroCopied},
		{"copied", []Outcome{CopiedAnyway}, CopiedAnyway},
		{"several", []Outcome{ZeroCopied, ZeroCopied, ZeroCopied}, ZeroCopied},
		{"first copied", []Outcome{CopiedAnyway, ZeroCopied}, CopiedAnyway},
		{"last copied", []Outcome{ZeroCopied, Copied}, Copied},
	} {
		t.Run(c.name, func(t *testing.T) {
			var r record
			b := NewUbufBuffer(r.ubuf(0), virtio.NetHdr{}, frame(60, 1))
			for range c.releases[1:] {
				b.Retain()
			}
			for i, o := range c.releases {
				if len(r.outcomes) != 0 {
					t.Fatalf("the callback ran after %d of %d releases", i, len(c.releases))
				}
				b.Release(o)
			}
			if !slices.Equal(r.outcomes, []Outcome{c.want}) {
				t.Errorf("outcomes %v, want one %v", r.outcomes, c.want)
			}
			defer func() {
				if recover() == nil {
					t.Error("a release too many went unnoticed")
				}
			}()
			b.Release(ZeroCopied)
		})
	}
}

// 3, from many goroutines: exactly one callback, after everybody.
func TestContract03ReleaseConcurrent(t *testing.T) {
	for range 200 {
		var r record
		b := NewUbufBuffer(r.ubuf(0), virtio.NetHdr{}, frame(60, 1))
		const n = 8
		for range n - 1 {
			b.Retain()
		}
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				o := ZeroCopied
				if i == 3 {
					o = Copied
				}
				b.Release(o)
			})
		}
		wg.Wait()
		if !slices.Equal(r.outcomes, []Outcome{Copied}) {
			t.Fatalf("outcomes %v", r.outcomes)
		}
	}
}

// 4: recycling a Buffer that carries a Ubuf is refused.
func TestContract04Recycling(t *testing.T) {
	var r record
	b := NewUbufBuffer(r.ubuf(0), virtio.NetHdr{}, frame(60, 1))
	if err := b.Recycle(virtio.NetHdr{}, frame(80, 2)); !errors.Is(err, ErrUbuf) {
		t.Errorf("recycling gave %v", err)
	}
	wantContent(t, b, frame(60, 1))
	b.Release(Copied)
	if err := b.Recycle(virtio.NetHdr{GSOSize: 7}, frame(80, 2)); err != nil {
		t.Errorf("recycling after the release: %v", err)
	}
	wantContent(t, b, frame(80, 2))
	if b.Header().GSOSize != 7 || len(r.outcomes) != 1 {
		t.Errorf("header %+v, outcomes %v", b.Header(), r.outcomes)
	}
}

// 5: Orphan copies, points the Buffer at the copy, and then gives the pages back.
func TestContract05Orphan(t *testing.T) {
	g := newGuest(t, 8, features)
	w := g.window()
	data := frame(300, 9)
	id, mem := g.send(virtio.NetHdr{GSOSize: 5}, data)
	b := pop(t, w)[0]
	if err := b.Orphan(HeapAllocator); err != nil {
		t.Fatal(err)
	}
	w.Reap()
	if ids := g.returned(); !slices.Equal(ids, []uint16{id}) {
		t.Errorf("returned %v, want %d", ids, id)
	}
	clear(mem) // the guest reuses its page
	wantContent(t, b, data)
	if b.Header().GSOSize != 5 {
		t.Error("the header was left behind in the guest's page")
	}
	// The Buffer outlives its slot, which goes on with another.
	g.send(virtio.NetHdr{}, frame(60, 77))
	other := pop(t, w)[0]
	if other == b {
		t.Fatal("the orphaned buffer is in use again while somebody holds it")
	}
	wantContent(t, b, data)
	if w.Reap(); w.Stats.Frames[Copied] != 1 {
		t.Errorf("frames by outcome %v", w.Stats.Frames)
	}
}

// 5: when there is no memory for the copy, nothing has changed.
func TestContract05OrphanWithoutMemory(t *testing.T) {
	g := newGuest(t, 8, features)
	w := g.window()
	g.send(virtio.NetHdr{}, frame(300, 9))
	b := pop(t, w)[0]
	none := errors.New("none")
	before := b.Segs()[0].Mem
	err := b.Orphan(func(int) ([]byte, error) { return nil, none })
	if !errors.Is(err, none) {
		t.Errorf("error %v", err)
	}
	if !b.Zerocopy() || &b.Segs()[0].Mem[0] != &before[0] || w.Reap() != 0 {
		t.Error("a failed Orphan changed the buffer")
	}
	b.Release(ZeroCopied)
	if w.Reap() != 1 || w.Stats.Frames[ZeroCopied] != 1 {
		t.Error("after a failed Orphan the buffer cannot be released")
	}
}

// 5: with more than one reference somebody else would lose the pages.
func TestContract05OrphanShared(t *testing.T) {
	var r record
	b := NewUbufBuffer(r.ubuf(0), virtio.NetHdr{}, frame(60, 1))
	b.Retain()
	if err := b.Orphan(HeapAllocator); err == nil || len(r.outcomes) != 0 {
		t.Errorf("orphaning a shared buffer: %v, outcomes %v", err, r.outcomes)
	}
}

// 6: a clone never carries a Ubuf.
func TestContract06CloneAndCopyHeader(t *testing.T) {
	for name, clone := range map[string]func(*Buffer) (*Buffer, error){
		"Clone":      func(b *Buffer) (*Buffer, error) { return b.Clone(HeapAllocator) },
		"CopyHeader": func(b *Buffer) (*Buffer, error) { return b.CopyHeader(54, HeapAllocator) },
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, 8, features)
			w := g.window()
			data := frame(200, 3)
			_, mem := g.send(virtio.NetHdr{GSOSize: 4}, data)
			b := pop(t, w)[0]
			c, err := clone(b)
			if err != nil {
				t.Fatal(err)
			}
			clear(mem)
			if b.Zerocopy() || c.Zerocopy() {
				t.Error("a clone, or what it was made of, carries a ubuf")
			}
			if w.Reap() != 1 {
				t.Error("the guest's pages did not come back")
			}
			wantContent(t, b, data)
			wantContent(t, c, data)
			if c.Header() != b.Header() || c.Header().GSOSize != 4 {
				t.Errorf("header %+v", c.Header())
			}
			none := errors.New("none")
			g.send(virtio.NetHdr{}, data)
			b = pop(t, w)[0]
			if _, err := b.Clone(func(int) ([]byte, error) { return nil, none }); !errors.Is(err, none) || !b.Zerocopy() {
				t.Errorf("cloning without memory: %v", err)
			}
			b.Release(Copied)
		})
	}
	var r record
	b := NewUbufBuffer(r.ubuf(0), virtio.NetHdr{}, frame(20, 1), frame(20, 2))
	c, err := b.CopyHeader(14, HeapAllocator)
	if err != nil {
		t.Fatal(err)
	}
	c.Frags()[0][0] = 0xee // a rewritten header is the copy's alone
	if content(b)[0] == 0xee {
		t.Error("writing the copied header changed the original")
	}
}

// 7: memory under a Buffer stays pinned, whatever happens to the memory table.
func TestContract07Pinning(t *testing.T) {
	g := newGuest(t, 8, features)
	w := g.window()
	data := frame(100, 1)
	g.send(virtio.NetHdr{}, data)
	held := pop(t, w)[0]
	old, next := g.table, newTable(t)
	g.ring.SetView(guestmem.NewView(next, nil)) // SET_MEM_TABLE
	w.SetTable(next)
	next.Unpin()
	old.Unpin() // the session's own pin
	if old.Pins() != 1 {
		t.Fatalf("the old table has %d pins under a frame in flight", old.Pins())
	}
	wantContent(t, held, data)
	held.Release(ZeroCopied)
	if w.Reap() != 1 || old.Pins() != 0 {
		t.Errorf("the old table has %d pins after the last release", old.Pins())
	}
	if next.Pins() != 1 {
		t.Errorf("the new table has %d pins", next.Pins())
	}
}

// 7, at the end: a device that holds a buffer longer than the ring lives keeps the memory, not the ring.
func TestContract07PinningBeyondClose(t *testing.T) {
	g := newGuest(t, 8, features)
	w := g.window()
	g.send(virtio.NetHdr{}, frame(100, 1))
	g.send(virtio.NetHdr{}, frame(100, 2))
	held := pop(t, w)
	older, newer := g.table, newTable(t)
	g.ring.SetView(guestmem.NewView(newer, nil))
	w.SetTable(newer)
	newer.Unpin()
	older.Unpin()
	if n := w.Close(); n != 2 {
		t.Errorf("%d frames given up, want 2", n)
	}
	if len(g.returned()) != 2 {
		t.Error("chains were not returned at Close")
	}
	held[1].Release(ZeroCopied)
	if older.Pins() != 1 || newer.Pins() != 1 {
		t.Errorf("pins %d and %d with a frame still out", older.Pins(), newer.Pins())
	}
	held[0].Release(ZeroCopied)
	if older.Pins() != 0 || newer.Pins() != 0 {
		t.Errorf("pins %d and %d after the last release", older.Pins(), newer.Pins())
	}
}

// 8: used entries are written in the order of the slots, up to the first that is still out.
func TestContract08WindowOrder(t *testing.T) {
	g := newGuest(t, 8, features)
	w := g.window()
	var ids []uint16
	for i := range 5 {
		id, _ := g.send(virtio.NetHdr{}, frame(60, byte(i)))
		ids = append(ids, id)
	}
	b := pop(t, w)
	for i, step := range []struct{ release, reaped int }{{3, 0}, {1, 0}, {0, 2}, {4, 0}, {2, 3}} {
		o := ZeroCopied
		if i%2 == 1 {
			o = CopiedSmall // copied and zero-copy alike
		}
		b[step.release].Release(o)
		if n := w.Reap(); n != step.reaped {
			t.Errorf("step %d: reaped %d, want %d", i, n, step.reaped)
		}
		if got := g.returned(); !slices.Equal(got, ids[:step.reaped]) {
			t.Errorf("step %d: returned %v, want %v", i, got, ids[:step.reaped])
		}
		ids = ids[step.reaped:]
	}
}

// 9: every chain that is popped is returned exactly once, bad ones in their turn.
func TestContract09ReturnedOnce(t *testing.T) {
	g := newGuest(t, 16, features)
	w := g.window()
	good, _ := g.send(virtio.NetHdr{}, frame(60, 1))
	short := g.sendParts(frame(60, 2), 12) // a header and no frame
	tiny := g.sendParts(frame(60, 3), 5, 7, 13)
	writable, _ := g.post(100)
	last := g.sendParts(frame(60, 4), 12, 60)
	b := pop(t, w)
	if len(b) != 2 {
		t.Fatalf("%d frames, want 2", len(b))
	}
	b[1].Release(Copied)
	if w.Reap() != 0 {
		t.Error("a malformed chain overtook a frame that is out")
	}
	b[0].Release(Copied)
	w.Reap()
	if got, want := g.returned(), []uint16{good, short, tiny, writable, last}; !slices.Equal(got, want) {
		t.Errorf("returned %v, want %v", got, want)
	}
	if w.Stats.Malformed != 3 || g.driver.Out() != 0 {
		t.Errorf("malformed %d, still out %d", w.Stats.Malformed, g.driver.Out())
	}
	if w.Close() != 0 || len(g.returned()) != 0 {
		t.Error("Close returned something again")
	}
}

// 10: a release wakes the worker that sleeps, once, and no other.
func TestContract10Wake(t *testing.T) {
	g := newGuest(t, 8, features)
	wakes := 0
	w := NewWindow(g.ring, features, func() { wakes++ })
	for i := range 4 {
		g.send(virtio.NetHdr{}, frame(60, byte(i)))
	}
	b := pop(t, w)
	b[0].Release(ZeroCopied)
	if wakes != 0 {
		t.Error("an awake worker was woken")
	}
	w.Sleep()
	if w.Reap() != 1 {
		t.Error("what was released before Sleep is not seen after it")
	}
	b[1].Release(ZeroCopied)
	b[2].Release(ZeroCopied)
	if wakes != 1 {
		t.Errorf("%d wakes, want 1", wakes)
	}
	w.Awake()
	b[3].Release(ZeroCopied)
	if wakes != 1 || w.Reap() != 3 {
		t.Errorf("%d wakes", wakes)
	}
}

// 11: outcomes tell why a frame was copied, and one that the kernel copied anyway does not pass for zero-copy.
func TestContract11Outcomes(t *testing.T) {
	g := newGuest(t, 8, features)
	w := g.window()
	for o := range NumOutcomes {
		g.send(virtio.NetHdr{}, frame(60, byte(o)))
	}
	for o, b := range pop(t, w) {
		b.Release(Outcome(o))
	}
	w.Reap()
	for o := range NumOutcomes {
		if w.Stats.Frames[o] != 1 {
			t.Errorf("%v: %d frames, want 1", o, w.Stats.Frames[o])
		}
	}
}

// 12: Close answers at once, whatever is in flight, and what it gave up may still be released.
func TestContract12Close(t *testing.T) {
	g := newGuest(t, 8, features)
	w := g.window()
	for i := range 3 {
		g.send(virtio.NetHdr{}, frame(60, byte(i)))
	}
	b := pop(t, w)
	b[1].Release(Copied)
	if n := w.Close(); n != 2 || w.Stats.GivenUp != 2 || w.Stats.Frames[Copied] != 1 {
		t.Errorf("given up %d, stats %+v", n, w.Stats)
	}
	if len(g.returned()) != 3 {
		t.Error("not every chain was returned")
	}
	b[0].Release(ZeroCopied)
	b[2].Release(ZeroCopied)
	if len(g.returned()) != 0 {
		t.Error("a late release touched the ring")
	}
}

// 13: the header is fetched once; what the guest writes later is not seen.
func TestContract13HeaderReadOnce(t *testing.T) {
	for _, lens := range [][]int{{72}, {12, 60}, {5, 67}, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 60}} {
		g := newGuest(t, 16, features)
		w := g.window()
		g.sendParts(frame(60, 1), lens...)
		b := pop(t, w)[0]
		wantContent(t, b, frame(60, 1))
		before := b.Header()
		for i := range g.ram[g.ring.Size()*64:] {
			g.ram[g.ring.Size()*64+i] = 0xff
		}
		if after := b.Header(); after != before {
			t.Errorf("lengths %v: the header changed from %+v to %+v", lens, before, after)
		}
	}
}

// TestFlagsOfDriver: of a header's flags only the one that a driver may set is seen, wherever the header lies (virtio-v1.2 §5.1.6.2.2).
func TestFlagsOfDriver(t *testing.T) {
	for _, lens := range [][]int{{72}, {12, 60}, {5, 67}} {
		for _, flags := range []int{0, 1, 2, 3, 4, 0x80, 0xfe, 0xff} {
			g := newGuest(t, 16, features)
			w := g.window()
			data := frame(60, 1)
			hdr := virtio.NetHdr{Flags: uint8(flags), HdrLen: 1, GSOSize: 2, CsumStart: 34, CsumOffset: 16}
			all := make([]byte, virtio.NetHdrSize)
			hdr.Encode(all)
			g.sendBytes(append(all, data...), lens...)
			b := pop(t, w)[0]
			hdr.Flags &= virtio.NetHdrNeedsCsum
			if got := b.Header(); got != hdr {
				t.Errorf("lengths %v, flags %#x: header %+v, want %+v", lens, flags, got, hdr)
			}
			b.Release(Copied)
			w.Close()
		}
	}
}

// 14: the counters of a queue.
func TestContract14Counters(t *testing.T) {
	g := newGuest(t, 8, features)
	w := g.window()
	for i := range 4 {
		g.send(virtio.NetHdr{}, frame(100, byte(i)))
	}
	b := pop(t, w)
	b[1].Release(ZeroCopied)
	w.Reap() // blocked at slot 0 from here on
	time.Sleep(2 * time.Millisecond)
	b[0].Release(CopiedAnyway)
	w.Reap()
	if s := w.Stats; s.Frames[ZeroCopied] != 1 || s.Frames[CopiedAnyway] != 1 || s.Bytes != 400 || s.MaxPending != 4 {
		t.Errorf("stats %+v", s)
	}
	if w.Pending() != 2 {
		t.Errorf("pending %d, want 2", w.Pending())
	}
	if w.Stats.MaxWait < 2*time.Millisecond {
		t.Errorf("the used ring waited %v for slot 0", w.Stats.MaxWait)
	}
	// A wait counts while it lasts, and when it ends with the Window.
	had := w.LongestWait()
	for deadline := time.Now().Add(20 * time.Second); w.LongestWait() <= had; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the used ring has waited 20 s for slot 2, the longest wait is %v", w.LongestWait())
		}
	}
	had = w.LongestWait()
	w.Close()
	if w.Stats.MaxWait < had || w.LongestWait() != w.Stats.MaxWait {
		t.Errorf("the longest wait is %v after Close, was %v", w.Stats.MaxWait, had)
	}
	for _, b := range b[2:] {
		b.Release(ZeroCopied)
	}
}
