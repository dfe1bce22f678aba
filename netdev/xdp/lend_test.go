package xdp_test

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/virtio"
)

const (
	reg   = 1 << 40 // guest address of a region that a test gives out itself
	guard = 0xee    // byte around buffers
)

// shaper is a receiveq whose buffers a test shapes.
type shaper struct {
	*machine
	q    *vhosttest.Queue
	mem  []byte
	next int
	bufs map[uint16][]vhosttest.Piece
}

func newShaper(t *testing.T, device string, size uint64) *shaper {
	t.Helper()
	m := newIdleMachine(t, device, 1500, vhosttest.Options{})
	r := vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: reg, Size: size})
	m.Mem.Add(r)
	m.ShareMemory()
	s := &shaper{machine: m, q: m.Receiveq(0), mem: r.Mem, bufs: map[uint16][]vhosttest.Piece{}}
	for i := range s.mem {
		s.mem[i] = guard
	}
	for _, q := range m.Queues {
		q.Start()
	}
	return s
}

// post makes a buffer of pieces of these lengths available, guard bytes around each.
func (s *shaper) post(lens ...int) bool {
	s.Helper()
	var pieces []vhosttest.Piece
	for _, n := range lens {
		if s.next+n+16 > len(s.mem) {
			s.next = 0
		}
		s.next += 1 + n%7
		pieces = append(pieces, vhosttest.Piece{GPA: reg + guestmem.GPA(s.next), Len: uint32(n)})
		s.next += n
	}
	id, err := s.q.Driver.Add(nil, pieces)
	if err != nil {
		return false
	}
	s.bufs[id] = pieces
	return true
}

// reap takes a buffer that was used, and puts guard bytes back.
func (s *shaper) reap() (b []byte, ok bool) {
	s.Helper()
	id, n, ok := s.q.Driver.Reap()
	if !ok {
		must(s, s.q.Driver.Err())
		return nil, false
	}
	for _, p := range s.bufs[id] {
		m := s.mem[p.GPA-reg:][:p.Len]
		k := min(n, p.Len)
		b = append(b, m[:k]...)
		for i := range k {
			m[i] = guard
		}
		n -= k
	}
	return b, true
}

// frame takes a frame as a driver does. Buffers that come back unused are passed over.
func (s *shaper) frame() (b []byte, ok bool) {
	s.Helper()
	for len(b) == 0 {
		if b, ok = s.reap(); !ok {
			return nil, false
		}
	}
	n := int(binary.LittleEndian.Uint16(b[10:]))
	b = b[virtio.NetHdrSize:]
	for range n - 1 {
		more, ok := s.reap()
		if !ok {
			s.Fatalf("num_buffers is %d, and there are less", n)
		}
		b = append(b, more...)
	}
	return b, true
}

// untouched checks that no byte is changed but those of buffers that were used, which reap has put back.
func (s *shaper) untouched() {
	s.Helper()
	for i, b := range s.mem {
		if b != guard {
			s.Fatalf("byte %d of %d of guest memory is %#x: nothing was to be written there", i, len(s.mem), b)
		}
	}
}

// TestInPlaceTouchesNothingElse: frames of all lengths land where they belong, and no byte before, behind or between is written; one that is longer
// than the guest's MTU allows is dropped and counted.
func TestInPlaceTouchesNothingElse(t *testing.T) {
	for _, mode := range []string{"native", "generic"} {
		t.Run(mode, func(t *testing.T) {
			s := newShaper(t, "xdp:v0,no-balloon=on,mtu=1000,mode="+mode, 1<<20)
			exact := virtio.NetHdrSize + 1000 + 18
			long := 0
			for i := range 400 {
				// One that has just the room, one with the header apart, one that is a byte short in its first piece.
				for _, lens := range [][]int{{exact}, {virtio.NetHdrSize, exact - virtio.NetHdrSize}, {exact - 1, 1}, {3000}} {
					s.post(lens...)
				}
				s.q.Flush()
				n := 14 + rand.IntN(1005)
				if i%5 == 0 {
					s.far.Send(netdevtest.Frame(1019+rand.IntN(495), 9))
					long++
				}
				want := netdevtest.Frame(n, uint32(i))
				s.far.Send(want)
				var got []byte
				vhosttest.Eventually(t, "the frame", func() (ok bool) { got, ok = s.frame(); return ok })
				if !bytes.Equal(got, want) {
					t.Fatalf("frame %d: %d bytes, want others, %d", i, len(got), n)
				}
				if i%40 == 0 {
					s.untouched()
				}
			}
			s.untouched()
			if st := s.dev.Stats(); st.TooLong != uint64(long) || st.InPlace == 0 || st.Unruly != 0 {
				t.Errorf("%+v, %d frames were too long", st, long)
			}
		})
	}
}

// TestOddBuffers: a guest that posts buffers of every shape, good ones, tiny ones, scattered ones and such as are none, gets its frames in order and
// whole, copied or in place. A model of what it must get needs no more than that.
func TestOddBuffers(t *testing.T) {
	s := newShaper(t, "xdp:v0,no-balloon=on", 4<<20)
	rng := rand.New(rand.NewPCG(7, 11))
	shapes := [][]int{{1530}, {1530}, {12, 1518}, {1600}, {4096}, {11, 1, 1518}, {700, 900}, {300}, {64}, {13}, {1529}, {12}, {5}, {1, 1, 1, 9, 1600}}
	posted, sent, seen := 0, 0, 0
	post := func(n int) {
		for range n {
			shape := shapes[rng.IntN(len(shapes))]
			if posted/1000%2 == 0 { // good ones for a while
				shape = shapes[rng.IntN(5)]
			}
			if !s.post(shape...) {
				break
			}
			posted++
		}
		s.q.Flush()
	}
	size := func(i int) int { return 14 + i*97%1501 }
	post(100)
	for seen < 4000 {
		for n := rng.IntN(60); n > 0 && sent < seen+60; n-- { // so many have a place at any time
			s.far.Send(netdevtest.Frame(size(sent), uint32(sent)))
			sent++
		}
		for n := rng.IntN(80); n > 0; n-- {
			got, ok := s.frame()
			if !ok {
				break
			}
			if want := netdevtest.Frame(size(seen), uint32(seen)); !bytes.Equal(got, want) {
				t.Fatalf("frame %d: %d bytes, want others, %d: %+v, %+v, sent %d", seen, len(got), len(want), s.dev.Stats(), s.be.Stats().Queues[0], sent)
			}
			seen++
		}
		post(rng.IntN(50))
		if rng.IntN(20) == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	st, q := s.dev.Stats(), s.be.Stats().Queues[0]
	t.Logf("%d buffers for %d frames, %+v, %d malformed", posted, seen, st, q.Malformed)
	if st.InPlace == 0 || st.InPlace == uint64(seen) || st.Unruly != 0 || q.Malformed == 0 || q.RecvDropped != 0 {
		t.Errorf("%+v, %+v", st, q)
	}
}

// TestReadableBuffersWhileLent: a chain that is not to be written goes back unused, in its turn.
func TestReadableBuffersWhileLent(t *testing.T) {
	s := newShaper(t, "xdp:v0,no-balloon=on", 1<<20)
	for range 3 {
		s.post(1600)
	}
	bad := vhosttest.Piece{GPA: reg + 1<<19, Len: 1600}
	id, err := s.q.Driver.Add([]vhosttest.Piece{bad}, nil)
	must(t, err)
	s.bufs[id] = nil
	s.post(1600)
	s.q.Flush()
	for i := range 4 {
		s.far.Send(netdevtest.Frame(100+i, uint32(i)))
	}
	for i := range 5 {
		var got []byte
		vhosttest.Eventually(t, "a buffer", func() (ok bool) { got, ok = s.reap(); return ok })
		if want := []int{112, 113, 114, 0, 115}[i]; len(got) != want {
			t.Fatalf("buffer %d came back with %d bytes, want %d", i, len(got), want)
		}
	}
	s.untouched()
}

// TestNothingIsWrittenAfterStop: once GET_VRING_BASE or a disabled ring was answered, no byte of the buffers that the guest has posted changes, whatever comes
// on the wire; and the ring goes on where it was.
func TestNothingIsWrittenAfterStop(t *testing.T) {
	for name, way := range map[string]struct{ off, on func(q *vhosttest.Queue) }{
		"GET_VRING_BASE": {(*vhosttest.Queue).Stop, (*vhosttest.Queue).Start},
		"disabled": {
			func(q *vhosttest.Queue) { q.Enable(false) },
			func(q *vhosttest.Queue) { q.Enable(true) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, "xdp:v0,no-balloon=on", 1500, vhosttest.Options{})
			q := m.Receiveq(0)
			for round := range 4 {
				m.toGuest(300, sizes(1500))
				landed := m.dev.Stats().InPlace
				for i := range 50 { // some land before, some maybe not
					m.far.Send(netdevtest.Frame(1514, uint32(i)))
				}
				sockets := m.dev.Stats().Sockets
				way.off(q)
				var before [][]byte
				for _, r := range m.Mem.Regions {
					before = append(before, bytes.Clone(r.Mem))
				}
				for i := range 600 {
					m.far.Send(netdevtest.Frame(1514, uint32(1000+i)))
				}
				for i, r := range m.Mem.Regions {
					if !bytes.Equal(r.Mem, before[i]) {
						t.Fatalf("round %d: region %d has changed after the ring had stopped", round, i)
					}
				}
				vhosttest.Eventually(t, "another socket", func() bool { return m.dev.Stats().Sockets > sockets })
				way.on(q)
				m.quiesce()
				if st := m.dev.Stats(); landed == 0 || st.Unruly != 0 {
					t.Fatalf("%+v", st)
				}
			}
			m.toHost(20, sizes(1500), nil)
			m.toGuest(100, sizes(1500))
			if q.Driver.Out() != q.Driver.Size() {
				t.Errorf("%d of %d buffers are out", q.Driver.Out(), q.Driver.Size())
			}
		})
	}
}

// TestMemoryGoesWhileLent: a memory file that shrinks under lent buffers ends the session, and nothing else; the next guest is served.
func TestMemoryGoesWhileLent(t *testing.T) {
	m := newMachine(t, "xdp:v0,no-balloon=on", 1500, vhosttest.Options{})
	m.toGuest(100, sizes(1500))
	for _, r := range m.Mem.Regions {
		must(t, r.Truncate(0))
	}
	for i := range 300 {
		m.far.Send(netdevtest.Frame(100, uint32(i)))
	}
	vhosttest.Eventually(t, "the end of the session", func() bool { return !m.be.Stats().Connected })
	m.Guest = m.Successor(vhosttest.Options{})
	m.quiesce()
	m.toHost(20, sizes(1500), nil)
	m.toGuest(100, sizes(1500))
}
