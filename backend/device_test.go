package backend_test

import (
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// inboxSize is how many frames wait on their way to a guest before the sender has to.
const inboxSize = 512

// device is a netdev whose frames go where the test says: to the other device of a link, to the test, or into its hands until it
// lets go of them.
type device struct {
	wires   []*wire
	pairs   atomic.Int32 // of the last SetPairs
	accept  atomic.Uint32
	ignores bool // as in netdev.Capabilities.IgnoresHeader
	mtu     int
}

// parcel is a frame in private memory.
type parcel struct {
	hdr  virtio.NetHdr
	data []byte
}

// wire is one queue pair of a device.
type wire struct {
	mu        sync.Mutex
	peer      *wire // nil: what is sent is kept in sent
	sent      []parcel
	keep      bool // sent buffers are held, unread
	deaf      bool // Send takes nothing
	held      []*zerocopy.Buffer
	orphans   bool // Orphan copies what is held and releases it
	orphaned  int
	reaped    func() // called by Reap, if not nil
	inbox     []parcel
	full      bool // somebody waits for room in inbox
	in        *sys.EventFD
	out, fill int // ends of a pipe that is full while Send can take nothing
}

func newDevice(t testing.TB, pairs int) *device {
	t.Helper()
	d := &device{}
	for range pairs {
		in, err := sys.NewEventFD()
		if err != nil {
			t.Fatal(err)
		}
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		d.wires = append(d.wires, &wire{in: in, out: p[0], fill: p[1]})
		t.Cleanup(func() {
			in.Close()
			unix.Close(p[0])
			unix.Close(p[1])
		})
	}
	return d
}

// newLink makes two devices, each of which receives what the other one sends.
func newLink(t testing.TB, pairs int) (a, b *device) {
	a, b = newDevice(t, pairs), newDevice(t, pairs)
	for i := range pairs {
		a.wires[i].peer, b.wires[i].peer = b.wires[i], a.wires[i]
	}
	return a, b
}

func (d *device) Capabilities() netdev.Capabilities {
	return netdev.Capabilities{
		Kind: "test", MaxPairs: len(d.wires), MTU: d.mtu, FromGuest: offload.All, ToGuest: offload.All,
		IgnoresHeader: d.ignores, ZeroCopy: "as the test says",
	}
}

func (d *device) SetOffloads(s offload.Set) error { d.accept.Store(uint32(s)); return nil }
func (d *device) SetPairs(n int) error            { d.pairs.Store(int32(n)); return nil }
func (d *device) Queue(i int) netdev.Queue {
	if d.wires[i].orphans {
		return orphaner{d.wires[i]}
	}
	return d.wires[i]
}
func (d *device) Close() error { return nil }

func (w *wire) Send(bufs []*zerocopy.Buffer) int {
	switch n, done := w.take(bufs); {
	case done:
		return n
	case w.peer == nil:
		var all []parcel
		for _, b := range bufs {
			all = append(all, copyOf(b))
		}
		w.mu.Lock()
		w.sent = append(w.sent, all...)
		w.mu.Unlock()
		zerocopy.ReleaseAll(bufs, zerocopy.Copied)
		return len(bufs)
	}
	n := w.peer.room(w, len(bufs))
	for _, b := range bufs[:n] {
		p := copyOf(b)
		w.peer.push(p)
	}
	zerocopy.ReleaseAll(bufs[:n], zerocopy.Copied)
	return n
}

// take is Send for a wire that holds what it gets, or gets nothing.
func (w *wire) take(bufs []*zerocopy.Buffer) (n int, done bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.deaf {
		w.block()
		return 0, true
	}
	if !w.keep {
		return 0, false
	}
	w.held = append(w.held, bufs...)
	return len(bufs), true
}

// block makes SendFD unwritable, unblock writable again. w.mu is held.
func (w *wire) block() {
	junk := make([]byte, 4096)
	for {
		if _, err := unix.Write(w.fill, junk); err != nil {
			return
		}
	}
}

func (w *wire) unblock() {
	junk := make([]byte, 65536)
	for {
		if n, err := unix.Read(w.out, junk); err != nil || n == 0 {
			return
		}
	}
}

// room tells how many of n frames from the wire sender find room in w's inbox.
func (w *wire) room(sender *wire, n int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n = min(n, inboxSize-len(w.inbox))
	if n == 0 {
		w.full = true
		sender.block()
	}
	return n
}

func copyOf(b *zerocopy.Buffer) parcel {
	p := parcel{hdr: b.Header(), data: make([]byte, b.Len())}
	b.CopyTo(p.data, 0)
	return p
}

// push is a frame's arrival from outside.
func (w *wire) push(p parcel) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inbox = append(w.inbox, p)
	w.in.Signal()
}

// Reap implements netdev.Queue.
func (w *wire) Reap() {
	w.mu.Lock()
	f := w.reaped
	w.mu.Unlock()
	if f != nil {
		f()
	}
}

func (w *wire) SendFD() int { return w.fill }
func (w *wire) RecvFD() int { return w.in.FD() }

func (w *wire) Counters() netdev.Counters { return netdev.Counters{} }

func (w *wire) Recv(p *zerocopy.Posted, max int) (n int, idle bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for n < max && len(w.inbox) > 0 {
		switch f := w.inbox[0]; p.Write(f.hdr, [][]byte{f.data}) {
		case zerocopy.NoRoom:
			return n, false, nil
		default:
			w.inbox = w.inbox[1:]
			n++
		}
	}
	if w.full && len(w.inbox) < inboxSize/2 {
		w.full = false
		w.peer.unblock()
	}
	if len(w.inbox) == 0 {
		w.inbox = nil
		w.in.Drain()
		return n, true, nil
	}
	return n, false, nil
}

// holds is how many buffers are held.
func (w *wire) holds() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.held)
}

// letGo takes held buffer i from the device.
func (w *wire) letGo(i int) *zerocopy.Buffer {
	w.mu.Lock()
	defer w.mu.Unlock()
	b := w.held[i]
	w.held = slices.Delete(w.held, i, i+1)
	return b
}

// set changes the wire's behaviour.
func (w *wire) set(keep, deaf bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.deaf && !deaf {
		w.unblock()
	}
	w.keep, w.deaf = keep, deaf
}

// forget drops what waits for the guest.
func (w *wire) forget() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inbox = nil
}

// got returns and forgets what was sent.
func (w *wire) got() []parcel {
	w.mu.Lock()
	defer w.mu.Unlock()
	sent := w.sent
	w.sent = nil
	return sent
}

// orphaner is a wire that implements netdev.Orphaner.
type orphaner struct{ *wire }

func (o orphaner) Orphan() {
	o.mu.Lock()
	held := o.held
	o.held = nil
	o.orphaned += len(held)
	o.mu.Unlock()
	for _, b := range held {
		if err := b.Orphan(zerocopy.HeapAllocator); err != nil {
			panic(err)
		}
		b.Release(zerocopy.Copied)
	}
}
