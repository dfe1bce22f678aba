package netdevtest

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// Peer is the far end of a device that is joined to another, as a guest there: what it receives was sent by the one, and what it
// sends comes to the other.
type Peer struct {
	q netdev.Queue
	g *Guest
	p *zerocopy.Posted
}

// peerFeatures take every offload, so that frames show as they travel.
const peerFeatures = mergeable | virtio.FNetGuestCsum | virtio.FNetGuestTSO4 | virtio.FNetGuestTSO6 | virtio.FNetGuestECN |
	virtio.FNetGuestUFO | virtio.FNetGuestUSO4 | virtio.FNetGuestUSO6

// NewPeer makes a guest behind queue pair 0 of d.
func NewPeer(t testing.TB, d netdev.Device) *Peer {
	t.Helper()
	g := NewGuest(t, 128, peerFeatures)
	return &Peer{q: d.Queue(0), g: g, p: zerocopy.NewPosted(g.Ring, peerFeatures)}
}

// recv is Recv. A frame whose pages are gone, and which the device holds until here, ends it as it would end its sender's session.
func (p *Peer) recv() (n int, idle bool, err error) {
	fault := shm.Guard(func() { n, idle, err = p.q.Recv(p.p, 1) })
	if u, ok := p.q.(netdev.Unwinder); ok && fault != nil {
		u.RecvUnwound()
	}
	return n, idle, err
}

// Capture is for Harness.Capture.
func (p *Peer) Capture() (virtio.NetHdr, []byte) {
	p.g.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if hdr, b := p.g.Take(); b != nil {
			hdr.NumBuffers = 0
			return hdr, b
		}
		if p.g.Driver.Free() == p.g.Driver.Size() {
			p.g.Post(8, virtio.NetHdrSize+virtio.MaxFrame)
		}
		n, idle, err := p.recv()
		if err != nil {
			p.g.Fatalf("the peer's Recv: %v", err)
		}
		if n == 0 && idle {
			fds := []unix.PollFd{{Fd: int32(p.q.RecvFD()), Events: unix.POLLIN}}
			if _, err := unix.Poll(fds, int(patience.Milliseconds())); err != nil && err != unix.EINTR {
				p.g.Fatalf("poll of the peer's RecvFD: %v", err)
			}
		}
	}
	p.g.Fatalf("no frame came to the peer within %v", patience)
	return virtio.NetHdr{}, nil
}

// Inject is for Harness.Inject.
func (p *Peer) Inject(frame []byte) {
	p.g.Helper()
	if p.q.Send([]*zerocopy.Buffer{zerocopy.NewBuffer(virtio.NetHdr{}, frame)}) != 1 {
		p.g.Fatal("the peer cannot send")
	}
}
