package netdevtest

import (
	"bytes"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/soft"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
	"github.com/vhostd/vhostd/zerocopy"
)

// goneBase is where a region of guest memory lies that is not there any more.
const goneBase = guestmem.GPA(0x8000_0000)

// gone makes a region whose memory file has been truncated: whoever touches it gets SIGBUS, and the kernel EFAULT.
func (s *suite) gone() *guestmem.Region {
	s.Helper()
	const size = 1 << 16
	fd, err := unix.MemfdCreate("netdevtest", unix.MFD_CLOEXEC)
	if err != nil {
		s.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, size); err != nil {
		s.Fatal(err)
	}
	r, err := guestmem.NewRegion(fd, 0, goneBase, 0x7e00_0000_0000, size)
	if err != nil {
		s.Fatal(err)
	}
	if err := unix.Ftruncate(fd, 0); err != nil {
		s.Fatal(err)
	}
	var b [1]byte
	if shm.Guard(func() { copy(b[:], r.Bytes()) }) == nil {
		s.Fatal("the memory is still there")
	}
	return r
}

// sendFaults has Send meet frames whose pages are gone, in all places, between others, as a session does whose front-end truncates its memory. Then the
// next session's frames are sent, and of the last one's nothing but whole frames, once each.
func (s *suite) sendFaults() {
	r := s.gone()
	s.Cleanup(r.Discard)
	pages := r.Bytes()
	f := Frame(1000, 1)
	csum, good := inet{payload: 900}.build(2)
	large := inet{gso: virtio.GSOTCPv4, size: 500, payload: 9000}
	gso, largeFrame := large.build(3)
	for i, bad := range []struct {
		hdr   virtio.NetHdr
		frags [][]byte
	}{
		{frags: [][]byte{pages[:1000]}},
		{frags: [][]byte{f[:200], pages[:800]}},
		{frags: [][]byte{f[:14], pages[:60]}},
		{frags: append(split(Frame(1200, 2), 1), pages[:100])}, // in more pieces than any system call takes
		{hdr: csum, frags: [][]byte{good[:100], pages[:len(good)-100]}},
		{hdr: gso, frags: [][]byte{largeFrame[:2000], pages[:len(largeFrame)-2000]}},
		{hdr: gso, frags: [][]byte{pages[:len(largeFrame)]}},
	} {
		s.sendAround(uint32(i), s.ledger.doomed(bad.hdr, bad.frags...))
	}
}

// sendAround sends two frames, one that faults or is dropped, and another two, and then one of the next session.
func (s *suite) sendAround(round uint32, bad *zerocopy.Buffer) {
	s.Helper()
	var bufs []*zerocopy.Buffer
	var may [][]byte
	for i := range uint32(4) {
		f := Frame(300, 100*round+i)
		may = append(may, f)
		bufs = append(bufs, s.ledger.doomed(virtio.NetHdr{}, f))
	}
	q := soft.Wrap(s.Device).Queue(0)
	fault := shm.Guard(func() {
		all := slices.Insert(bufs, 2, bad)
		for range 100 {
			if all = all[q.Send(all):]; len(all) == 0 {
				break
			}
			q.Reap()
		}
	})
	if u, ok := q.(netdev.Unwinder); ok && fault != nil {
		u.SendUnwound()
	}
	s.Logf("round %d: %v", round, fault)
	next := Frame(310, round)
	s.send(s.queue, s.ledger.buffer(virtio.NetHdr{}, next))
	if s.Capture == nil {
		return
	}
	for {
		hdr, got := s.Capture()
		if bytes.Equal(got, next) {
			return
		}
		i := slices.IndexFunc(may, func(f []byte) bool { return bytes.Equal(f, got) })
		if i < 0 {
			if s.isSegment(hdr, got) {
				continue // cut from the good part of a large frame
			}
			s.Fatalf("round %d, fault %v: a frame of %d bytes came that nobody sent: %.64x", round, fault, len(got), got)
		}
		may = slices.Delete(may, i, i+1)
	}
}

// isSegment tells whether a frame is a whole one of TCP, as large frames are cut into.
func (s *suite) isSegment(hdr virtio.NetHdr, f []byte) bool {
	i := inet{}
	if len(f) < i.headers() || f[12] != 8 || f[13] != 0 {
		return false
	}
	segs, err := complete(hdr, f)
	return err == nil && len(segs) == 1 && i.good(segs[0])
}

// recvFaults has Recv meet posted buffers that are gone. Then the next session receives what comes, whole and in order.
func (s *suite) recvFaults() {
	s.needInject()
	for round := range uint32(4) {
		r := s.gone()
		g := NewGuest(s, 64, mergeable, r)
		p := zerocopy.NewPosted(g.Ring, mergeable)
		// Two good buffers: the fault comes after some frames, or within one that is merged over several.
		g.Post(2, 40+400*int(round%2))
		for i := range 10 {
			if _, err := g.Driver.Add(nil, []vring.Buf{{GPA: goneBase + guestmem.GPA(4096*i), Len: 2048}}); err != nil {
				s.Fatal(err)
			}
		}
		g.Driver.Publish()
		for i := range uint32(5) {
			s.Inject(Frame(300, 100*round+i))
		}
		s.recvUntilFault(p)
		if b, ok := s.queue.(netdev.Borrower); ok {
			b.Recall(nil)
		}
		s.recvAfter(round)
	}
}

// recvUntilFault receives until the fault comes, or nothing does for a while: what came was lost in the kernel, which does not fault.
func (s *suite) recvUntilFault(p *zerocopy.Posted) {
	fault := shm.Guard(func() {
		for idles := 0; idles < 20; {
			n, idle, err := s.queue.Recv(p, 64)
			if err != nil {
				s.Fatalf("Recv: %v", err)
			}
			if idle || n == 0 {
				idles++
				time.Sleep(time.Millisecond)
			}
		}
	})
	s.Logf("Recv: %v", fault)
	if u, ok := s.queue.(netdev.Unwinder); ok && fault != nil {
		u.RecvUnwound()
	}
}

// recvAfter is the next session: it may receive the frames that the last one has not got, in order, and must receive its own.
func (s *suite) recvAfter(round uint32) {
	g := NewGuest(s, 64, mergeable)
	p := zerocopy.NewPosted(g.Ring, mergeable)
	g.Post(60, 2048)
	next := -1
	for i := range uint32(3) {
		want := Frame(310, 100*round+i)
		s.Inject(want)
		for {
			_, got := s.recv(g, p)
			if bytes.Equal(got, want) {
				break
			}
			at := slices.IndexFunc([]uint32{0, 1, 2, 3, 4}, func(j uint32) bool { return bytes.Equal(got, Frame(300, 100*round+j)) })
			if at <= next {
				s.Fatalf("round %d: frame %d of the last session comes after %d (%d bytes: %.64x)", round, at, next, len(got), got)
			}
			next = at
		}
	}
}
