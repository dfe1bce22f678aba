package netdevtest

import (
	"bytes"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// recv has the guest receive one frame, waiting for it.
func (s *suite) recv(g *Guest, p *zerocopy.Posted) (virtio.NetHdr, []byte) {
	s.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if hdr, b := g.Take(); b != nil {
			return hdr, b
		}
		n, idle, err := s.queue.Recv(p, 1)
		switch {
		case err != nil:
			s.Fatalf("Recv: %v", err)
		case n > 1:
			s.Fatalf("Recv moved %d frames, 1 was asked for", n)
		case n == 0 && !idle:
			s.Fatal("Recv: no frame, and not idle, although the guest has posted enough")
		case idle:
			s.await(s.queue.RecvFD(), unix.POLLIN, "RecvFD")
		}
	}
	s.Fatalf("no frame came within %v", patience)
	return virtio.NetHdr{}, nil
}

// wants receives one frame, which must be want, and returns its header. Frames are not shorter than 60 bytes on some wires.
func (s *suite) wants(g *Guest, p *zerocopy.Posted, want []byte) virtio.NetHdr {
	s.Helper()
	hdr, got := s.recv(g, p)
	if !bytes.Equal(got, want) {
		s.Fatalf("received %d bytes, want others, %d\n got %.64x\nwant %.64x", len(got), len(want), got, want)
	}
	return hdr
}

const mergeable = virtio.FVersion1 | virtio.FNetMrgRxbuf

func (s *suite) recvLengths() {
	s.needInject()
	for _, f := range []virtio.Features{0, virtio.FVersion1, mergeable} {
		g := NewGuest(s, 64, f)
		p := zerocopy.NewPosted(g.Ring, f)
		for i, n := range s.lengths() {
			g.Post(1, 12, 1000, s.MaxFrame)
			want := Frame(n, uint32(i))
			s.Inject(want)
			if hdr := s.wants(g, p, want); f != 0 && hdr.NumBuffers != 1 {
				s.Errorf("num_buffers %d in a frame of %d bytes", hdr.NumBuffers, n)
			}
		}
	}
}

// recvMerges receives frames over many small buffers, several at once and in order.
func (s *suite) recvMerges() {
	s.needInject()
	g := NewGuest(s, 256, mergeable)
	p := zerocopy.NewPosted(g.Ring, mergeable)
	sizes := []int{60, 100, 116, 117, 128, 129, 500, min(s.MaxFrame, 1514)}
	for round := range uint32(8) {
		g.Post(80, 128)
		for i, n := range sizes {
			s.Inject(Frame(n, round+uint32(i)))
		}
		for i, n := range sizes {
			if hdr, want := s.wants(g, p, Frame(n, round+uint32(i))), (12+n+127)/128; int(hdr.NumBuffers) != want {
				s.Fatalf("num_buffers %d, want %d for %d bytes", hdr.NumBuffers, want, n)
			}
		}
		p.GiveBack()
		s.reclaim(g)
	}
}

// reclaim uses up what is posted, so that the next round starts with fresh buffers.
func (s *suite) reclaim(g *Guest) {
	for g.Driver.Out() > 0 {
		p := zerocopy.NewPosted(g.Ring, mergeable)
		for p.Write(virtio.NetHdr{}, [][]byte{Frame(14, 0)}) == zerocopy.Written {
		}
		g.Ring.Publish()
		for g.chain() != nil {
		}
	}
}

func (s *suite) recvWaitsForFrame() {
	g := NewGuest(s, 64, mergeable)
	p := zerocopy.NewPosted(g.Ring, mergeable)
	g.Post(10, 2048)
	for range 3 {
		n, idle, err := s.queue.Recv(p, 64)
		if n != 0 && s.Inject != nil || err != nil || !idle && n == 0 {
			s.Fatalf("Recv without a frame: %d frames, idle %v, %v", n, idle, err)
		}
	}
	if s.Inject == nil {
		return
	}
	for i := range uint32(3) {
		s.Inject(Frame(60, i))
		s.await(s.queue.RecvFD(), unix.POLLIN, "RecvFD")
		s.wants(g, p, Frame(60, i))
	}
}

// recvWaitsForGuest has frames come before the guest posts: the device keeps them, in order.
func (s *suite) recvWaitsForGuest() {
	s.needInject()
	g := NewGuest(s, 64, mergeable)
	p := zerocopy.NewPosted(g.Ring, mergeable)
	if n, _, err := s.queue.Recv(p, 64); n != 0 || err != nil {
		s.Fatalf("Recv: %d frames, %v", n, err)
	}
	for i := range uint32(10) {
		s.Inject(Frame(300, i))
	}
	s.await(s.queue.RecvFD(), unix.POLLIN, "RecvFD")
	for i := range uint32(10) {
		// On a loaded machine it may not have come yet, though all were sent. Once it has, the device does not say that there is none.
		n, idle, err := s.queue.Recv(p, 64)
		for deadline := time.Now().Add(patience); idle && err == nil && time.Now().Before(deadline); n, idle, err = s.queue.Recv(p, 64) {
			s.await(s.queue.RecvFD(), unix.POLLIN, "RecvFD")
		}
		if n != 0 || idle || err != nil {
			s.Fatalf("Recv without buffers, frame %d: %d frames, idle %v, %v", i, n, idle, err)
		}
		if n, idle, err := s.queue.Recv(p, 64); n != 0 || idle || err != nil {
			s.Fatalf("Recv without buffers: %d frames, idle %v, %v", n, idle, err)
		}
		g.Post(1, 100)
		if n, idle, err := s.queue.Recv(p, 64); n != 0 || idle || err != nil {
			s.Fatalf("Recv with too little: %d frames, idle %v, %v", n, idle, err)
		}
		g.Post(1, 212)
		s.wants(g, p, Frame(300, i))
	}
}

func (s *suite) recvAllocates() {
	s.needInject()
	if s.RecvAllocates {
		s.Skip("skipped: this device does not promise to receive without allocating")
	}
	const size, warm, rounds = 16, 2, 4
	g := NewGuest(s, 128, mergeable)
	p := zerocopy.NewPosted(g.Ring, mergeable)
	g.Post(size*rounds, 2048)
	for i := range size * rounds {
		s.Inject(Frame(1000, uint32(i)))
	}
	run := func() {
		for got := 0; got < size; {
			n, idle, err := s.queue.Recv(p, size-got)
			if err != nil {
				s.Fatal(err)
			}
			if got += n; idle && got < size {
				s.await(s.queue.RecvFD(), unix.POLLIN, "RecvFD")
			}
		}
	}
	for range warm {
		run()
	}
	if n := testing.AllocsPerRun(1, run); n != 0 {
		s.Errorf("%v allocations in %d frames", n, size)
	}
	for i := range size * rounds {
		if _, b := g.Take(); !bytes.Equal(b, Frame(1000, uint32(i))) {
			s.Fatalf("frame %d is another", i)
		}
	}
}

// closeReturnsDescriptors opens and closes the device several times.
func (s *suite) closeReturnsDescriptors() {
	s.close()
	if s.Harness.Close != nil {
		s.Harness.Close()
		s.Harness.Close = nil
	}
	descriptors(s.T) // the runtime's own, for its first file
	before := descriptors(s.T)
	for range 3 {
		h := s.reopen(s.T)
		if err := h.Device.Close(); err != nil {
			s.Errorf("Close: %v", err)
		}
		if h.Close != nil {
			h.Close()
		}
	}
	after := descriptors(s.T)
	for end := time.Now().Add(patience); len(after) > len(before) && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		runtime.GC() // one that a library leaves to the collector is no leak
		after = descriptors(s.T)
	}
	if len(after) > len(before) {
		s.Errorf("%d descriptors before, %d after:\n%q\n%q", len(before), len(after), before, after)
	}
}

// descriptors are what this process has open, by what they lead to.
func descriptors(t *testing.T) (all []string) {
	t.Helper()
	const dir = "/proc/self/fd/"
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		to, err := os.Readlink(dir + e.Name())
		if err == nil { // else it was that of the directory itself
			all = append(all, e.Name()+" "+to)
		}
	}
	return all
}

// RecvTooBig checks that a frame which the guest's buffers can never take is lost and counted, and that the next one arrives. inject has a frame come from outside.
func RecvTooBig(t testing.TB, q netdev.Queue, inject func(frame []byte)) {
	t.Helper()
	g := NewGuest(t, 16, virtio.FVersion1)
	g.Post(2, 200)
	p := zerocopy.NewPosted(g.Ring, virtio.FVersion1)
	for n, size := range []int{1000, 100} {
		inject(Frame(size, uint32(n)))
	}
	vhosttest.Eventually(t, "the frame behind", func() bool {
		if _, _, err := q.Recv(p, 1); err != nil {
			t.Fatal(err)
		}
		_, b := g.Take()
		return bytes.Equal(b, Frame(100, 1))
	})
	if n := q.Counters().RecvDropped; n != 1 {
		t.Errorf("RecvDropped is %d, want 1", n)
	}
}
