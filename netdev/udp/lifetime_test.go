package udp_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/udp"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// station is a guest whose frames the kernel holds. All its buffers are in a region of memory of their own.
type station struct {
	*lab
	dev  *udp.Device
	far  *far
	be   *backend.Backend
	g    *vhosttest.Guest
	q    *vhosttest.Queue
	room *vhosttest.Region
	used uint64   // bytes of room
	out  []uint16 // heads of the chains that are out, in order

	chains int      // that the kernel holds, and so the session's end has to give up; -1: some
	want   [][]byte // datagrams that arrive when it lets go; nil: segments
	done   chan struct{}
}

const (
	roomAt   = 1 << 40
	roomSize = 16 << 20
)

func newStation(t *testing.T, l *lab, engine string) *station {
	s := &station{lab: &lab{l.For(t)}, far: &far{TB: t}}
	s.Run("ip -n " + s.There + " link set v0 arp off")
	s.inOrder()
	s.resolve()
	s.In(s.There, func() (err error) {
		s.far.conn, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(thereIP), Port: 7000})
		return err
	})
	t.Cleanup(func() { s.far.conn.Close() })
	raw, err := s.far.conn.SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20) }))
	must(t, err)
	o, err := udp.ParseOptions(fmt.Sprintf("dgram:local=%s:7000,remote=%s:7000,zerocopy-min=4096", hereIP, thereIP) + engine)
	must(t, err)
	o.Drain = 100 * time.Millisecond
	s.In(s.Here, func() error { s.dev, err = udp.Open(o); return err })
	t.Cleanup(func() { must(t, s.dev.Close()) })
	s.be, err = backend.New(backend.Options{Device: s.dev, DrainTimeout: 50 * time.Millisecond})
	must(t, err)
	s.g = vhosttest.Start(t, s.be, vhosttest.Options{})
	s.q = s.g.Transmitq(0)
	s.room = vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: roomAt, Size: roomSize})
	t.Cleanup(s.room.Close)
	must(t, s.g.FE.AddMemReg(s.room.MemoryRegion, s.room.FD))
	s.g.Mem.Add(s.room)
	return s
}

// send adds a frame, unless the ring is full.
func (s *station) send(hdr virtio.NetHdr, frame []byte) bool {
	s.Helper()
	n := virtio.NetHdrSize + len(frame)
	mem := s.room.Mem[s.used : s.used+uint64(n)]
	hdr.Encode(mem[:virtio.NetHdrSize])
	copy(mem[virtio.NetHdrSize:], frame)
	id, err := s.q.Driver.Add([]vhosttest.Piece{{GPA: guestmem.GPA(roomAt + s.used), Len: uint32(n)}}, nil)
	if errors.Is(err, vring.ErrFull) {
		return false
	}
	must(s, err)
	s.out, s.used = append(s.out, id), s.used+uint64(n+7)&^7
	s.q.Flush()
	return true
}

func (s *station) reap() int {
	s.Helper()
	ids := reapInOrder(s, s.q, s.out)
	s.out = s.out[len(ids):]
	return len(ids)
}

// reapInOrder takes back what was returned, and checks that it is the first of out.
func reapInOrder(t testing.TB, q *vhosttest.Queue, out []uint16) (ids []uint16) {
	t.Helper()
	for {
		id, _, ok := q.Driver.Reap()
		if !ok {
			must(t, q.Driver.Err())
			return ids
		}
		if len(ids) == len(out) || out[len(ids)] != id {
			t.Fatalf("chain %d is back, %v are out", id, out[len(ids):])
		}
		ids = append(ids, id)
	}
}

func (s *station) inFlight(n int) {
	s.Helper()
	vhosttest.Eventually(s, fmt.Sprintf("%d frames in the kernel", n), func() bool { return s.dev.Stats().InFlight == n })
}

// resolve and unresolve let frames leave, or wait for the peer's address.
func (s *station) resolve() {
	s.Helper()
	s.Run("ip -n " + s.Here + " neighbour replace " + thereIP + " lladdr 02:00:00:00:00:02 dev v0")
}

func (s *station) unresolve() {
	s.Helper()
	s.Run("ip netns exec " + s.Here + " sysctl -qw net.ipv4.neigh.v0.mcast_solicit=1000")
	s.Run("ip -n " + s.Here + " neighbour del " + thereIP + " dev v0")
}

// pass has the interface hold whatever comes next.
func (s *station) pass() {
	s.Helper()
	s.hold("v0")
	for i := range 2 {
		s.send(virtio.NetHdr{}, netdevtest.Frame(big, uint32(i)))
		s.far.recv()
		vhosttest.Eventually(s, "the chain", func() bool { return s.reap() == 1 })
	}
}

// held sends frames of the lengths and waits for as many in the kernel.
func (s *station) held(chains int, lengths ...int) {
	s.Helper()
	for i, n := range lengths {
		f := netdevtest.Frame(n, uint32(100+i))
		s.want = append(s.want, f)
		s.send(virtio.NetHdr{}, f)
	}
	s.chains = chains
	s.inFlight(chains)
}

// open lets everything go that a queueing discipline holds.
func (s *station) open() {
	s.Helper()
	s.release("v0")
	s.In(s.Here, func() error { // a datagram, since the clock of tbf does not notice the change
		c, err := net.Dial("udp4", thereIP+":9")
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte{0})
		return err
	})
}

// state is a way for the kernel to hold frames, and what makes it let go.
type state struct {
	name       string
	hold, open func(s *station)
}

var states = []state{
	{"queueing discipline", func(s *station) { s.pass(); s.held(3, big, big, big) }, (*station).open},
	{"neighbour", func(s *station) { s.unresolve(); s.held(3, big, big, big) }, (*station).resolve},
	{"copied between", func(s *station) {
		s.pass()
		s.held(3, big, 100, big, 200, 300, big)
		vhosttest.Eventually(s, "all frames sent", func() bool { return s.be.Stats().Queues[1].Pending == 6 })
	}, (*station).open},
	{"segments", (*station).segments, (*station).open},
	// The kernel lets go just when something happens.
	{"letting go", func(s *station) {
		s.pass()
		s.held(3, big, big, big)
		s.chains, s.want = -1, [][]byte{}
		s.done = make(chan struct{})
		go func() { defer close(s.done); _ = s.Try("tc -n " + s.Here + " qdisc delete dev v0 root") }()
	}, func(s *station) { <-s.done }},
}

// segmentSize is the payload of a segment in bytes.
const segmentSize = 8000

// segments fills the socket with frames that are cut: some segments have left, some are in the kernel, and some wait for room.
func (s *station) segments() {
	s.Helper()
	s.pass()
	for i := range uint64(160) {
		if hdr, f := tcp(i); !s.send(hdr, f) {
			break
		}
	}
	s.chains = -1
	vhosttest.Eventually(s, fmt.Sprintf("the worker waits for room, with some of %d frames", len(s.out)), func() bool {
		had := s.be.Stats().Queues[1]
		time.Sleep(20 * time.Millisecond)
		st := s.be.Stats().Queues[1]
		return st.Waits == had.Waits && st.Pending == had.Pending && 0 < st.Pending && st.Pending < len(s.out) && s.dev.Stats().InFlight > 0
	})
}

// tcp is IPv4 frame number seq, whose payload says where it belongs.
func tcp(seq uint64) (virtio.NetHdr, []byte) {
	const payload = 7 * segmentSize
	b := make([]byte, 54+payload)
	copy(b, "\x02\x00\x00\x00\x00\x02\x02\x00\x00\x00\x00\x01")
	total := len(b) - 14
	copy(b[12:], []byte{8, 0, 0x45, 0, byte(total >> 8), byte(total)})
	b[22], b[23] = 64, 6
	copy(b[26:], []byte{198, 18, 0, 1, 198, 18, 0, 2})
	b[46], b[47] = 5<<4, 0x10
	for i := 0; i < payload; i += 8 {
		binary.BigEndian.PutUint64(b[54+i:], seq<<32+uint64(i))
	}
	return virtio.NetHdr{
		Flags: virtio.NetHdrNeedsCsum, GSOType: virtio.GSOTCPv4, GSOSize: segmentSize, CsumStart: 34, CsumOffset: 16,
	}, b
}

// last is a frame that tells the end.
var last = netdevtest.Frame(60, 9999)

// arrive checks what arrives up to last.
func (s *station) arrive() {
	s.Helper()
	next := uint64(0)
	for i := 0; ; i++ {
		got := s.far.recv()
		if bytes.Equal(got, last) {
			if i < len(s.want) {
				s.Fatalf("%d frames arrived, want %d", i, len(s.want))
			}
			return
		}
		if s.want != nil {
			if i >= len(s.want) || !bytes.Equal(got, s.want[i]) {
				s.Fatalf("frame %d of %d: %d others arrived, %x...", i, len(s.want), len(got), got[:30])
			}
			continue
		}
		for at := 54; at < len(got); at += 8 {
			switch w := binary.BigEndian.Uint64(got[at:]); {
			case at == 54 && w < next:
				s.Fatalf("a segment at %#x arrived behind %#x", w, next)
			case at != 54 && w != next:
				s.Fatalf("a segment has %#x, want %#x", w, next)
			default:
				next = w + 8
			}
		}
	}
}

// event is what may happen while the kernel holds frames.
type event struct {
	name    string
	happens func(s *station)
	stops   bool // the chains are returned at once
	unmaps  bool // the frames' memory is the guest's no more
}

var events = []event{
	{"SET_MEM_TABLE", func(s *station) { s.g.ShareMemory() }, false, false},
	{"SET_MEM_TABLE without the memory", func(s *station) { s.g.Mem.Remove(s.room); s.g.ShareMemory() }, false, true},
	{"ADD_MEM_REG", func(s *station) {
		r := vhosttest.NewRegion(s, vhosttest.RegionSpec{GPA: 2 * roomAt, Size: 1 << 20})
		defer r.Close()
		must(s, s.g.FE.AddMemReg(r.MemoryRegion, r.FD))
	}, false, false},
	{"REM_MEM_REG", func(s *station) { must(s, s.g.FE.RemMemReg(s.room.MemoryRegion)) }, false, true},
	{"SET_VRING_ENABLE 0", func(s *station) { s.q.Enable(false) }, false, false},
	{"RESET_OWNER", func(s *station) { must(s, s.g.FE.ResetOwner()) }, false, false},
	{"GET_VRING_BASE", func(s *station) { s.q.Stop() }, true, false},
	{"RESET_DEVICE", func(s *station) { must(s, s.g.FE.ResetDevice()) }, true, false},
	{"SET_STATUS 0", func(s *station) { must(s, s.g.FE.SetStatus(0)) }, true, false},
	{"disconnect", (*station).hangup, true, true},
}

func (s *station) hangup() {
	s.Helper()
	s.g.Hangup()
	vhosttest.Eventually(s, "the end of the session", func() bool { return !s.be.Stats().Connected })
}

// TestLifetime has everything happen that ends a ring or moves memory, while the kernel holds frames in every way that it can.
func TestLifetime(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine string) {
		for _, st := range states {
			if testing.Short() && st.name != "segments" {
				continue // the one in which most happens has to do
			}
			t.Run(st.name, func(t *testing.T) {
				l := newLab(t, 65535)
				for _, e := range events {
					t.Run(e.name, func(t *testing.T) {
						vhosttest.NoLeaks(t)
						s := newStation(t, l, engine)
						t.Cleanup(func() { _ = s.Try("tc -n " + s.Here + " qdisc delete dev v0 root") })
						st.hold(s)
						s.goesThrough(e, st)
					})
				}
			})
		}
	})
}

func (s *station) goesThrough(e event, st state) {
	s.Helper()
	out := len(s.out)
	e.happens(s)
	racing := s.done != nil
	if s.dev.Stats().InFlight == 0 && !racing {
		s.Fatal("the answer waited for the kernel")
	}
	switch n := s.reap(); {
	case e.stops && n < out && s.want != nil, !e.stops && n > 0 && !racing && !e.unmaps && s.want != nil:
		s.Errorf("%d of %d chains are back", n, out)
	}
	given := s.be.Stats().Queues[1].GivenUp
	if (given > 0) != e.stops && !racing || e.stops && s.chains >= 0 && given != uint64(s.chains) {
		s.Errorf("%d chains were given up, the kernel holds %d", given, s.chains)
	}
	if n := s.room.Mappings(s); n == 0 && !racing {
		s.Error("memory was unmapped under frames in the kernel")
	}
	if e.stops {
		// The next guest is served while the kernel holds what it has of the last one.
		next := s.next()
		if n := s.room.Mappings(s); n == 0 && !racing {
			s.Error("memory was unmapped under frames in the kernel when another guest came")
		}
		st.open(s)
		s.finish(next)
		return
	}
	st.open(s)
	vhosttest.Eventually(s, "the chains", func() bool { s.reap(); return len(s.out) == 0 })
	if e.unmaps {
		vhosttest.Eventually(s, "memory unmapped", func() bool { return s.room.Mappings(s) == 0 })
	}
	s.finish(s.next())
}

// next is another guest, which sends last.
func (s *station) next() *vhosttest.Guest {
	s.Helper()
	g := s.g.Successor(vhosttest.Options{})
	must(s, g.Send(0, virtio.NetHdr{}, last, nil))
	return g
}

// finish checks that all comes to its end.
func (s *station) finish(next *vhosttest.Guest) {
	s.Helper()
	must(s, next.Transmitq(0).Settle())
	s.arrive()
	s.inFlight(0)
	vhosttest.Eventually(s, "memory unmapped", func() bool { return s.room.Mappings(s) == 0 })
}

// TestCloseUnderGuest: the device is closed with frames in the kernel whose guest has gone.
func TestCloseUnderGuest(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine string) {
		for _, st := range states {
			t.Run(st.name, func(t *testing.T) {
				l := newLab(t, 65535)
				vhosttest.NoLeaks(t)
				s := newStation(t, l, engine)
				st.hold(s)
				s.hangup()
				err := s.dev.Close()
				var held *udp.HeldError
				if s.done == nil && (!errors.As(err, &held) || s.chains >= 0 && held.Frames != s.chains || s.room.Mappings(s) != 1) {
					t.Errorf("Close: %v, %d mappings", err, s.room.Mappings(s))
				}
				st.open(s)
				s.inFlight(0)
				vhosttest.Eventually(t, "memory unmapped", func() bool { return s.room.Mappings(s) == 0 })
			})
		}
	})
}
