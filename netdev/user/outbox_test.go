package user

import (
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

func newOutboxes(t *testing.T, n int) *outboxes {
	t.Helper()
	o := new(outboxes)
	must(t, o.open())
	o.inUse.Store(int32(n))
	t.Cleanup(func() { must(t, o.close()) })
	return o
}

func testPacket(n int) *stack.PacketBuffer {
	return stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(make([]byte, n))})
}

func readable(t testing.TB, fd int, wait time.Duration) bool {
	t.Helper()
	return netdevtest.Poll(t, fd, unix.POLLIN, wait)
}

// TestOutboxLosesNoWakeUp: a worker that sleeps on an empty outbox gets every packet, with no help from a timer.
func TestOutboxLosesNoWakeUp(t *testing.T) {
	const putters, each = 4, 5000
	box := &newOutboxes(t, 1).boxes[0]
	var wg sync.WaitGroup
	for range putters {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for range each {
				pkt := testPacket(60)
				for !box.put(pkt) {
					time.Sleep(time.Millisecond) // full
				}
				pkt.DecRef()
			}
		}()
	}
	var batch [3]*stack.PacketBuffer
	for got := 0; got < putters*each; {
		n := box.take(batch[:])
		for _, pkt := range batch[:n] {
			pkt.DecRef()
		}
		got += n
		if n == 0 && !readable(t, box.wake.FD(), testTimeout) {
			t.Fatalf("asleep after %d of %d packets", got, putters*each)
		}
	}
	wg.Wait()
	if n := box.take(batch[:]); n != 0 || readable(t, box.wake.FD(), 0) {
		t.Errorf("%d packets too many, or a signal for nothing", n)
	}
}

func TestOutboxSignalsOnlyASleeper(t *testing.T) {
	box := &newOutboxes(t, 1).boxes[0]
	pkt := testPacket(60)
	defer pkt.DecRef()
	box.put(pkt)
	if readable(t, box.wake.FD(), 0) {
		t.Error("signalled a worker that has never been idle")
	}
	var batch [8]*stack.PacketBuffer
	if n := box.take(batch[:]); n != 1 {
		t.Fatalf("took %d", n)
	}
	batch[0].DecRef()
	if n := box.take(batch[:]); n != 0 {
		t.Fatalf("took %d", n)
	}
	box.put(pkt)
	if !readable(t, box.wake.FD(), 0) {
		t.Error("not signalled")
	}
}

func TestOutboxIsBounded(t *testing.T) {
	for _, c := range []struct{ size, max int }{{60, outboxFrames}, {60 << 10, outboxBytes / (60 << 10)}} {
		box := &newOutboxes(t, 1).boxes[0]
		pkt := testPacket(c.size)
		n := 0
		for box.put(pkt) {
			n++
		}
		if n > c.max || n < c.max*9/10 || box.dropped.Load() != 1 {
			t.Errorf("%d packets of %d bytes, want %d; %d dropped", n, c.size, c.max, box.dropped.Load())
		}
		pkt.DecRef()
	}
}

// fullGuest is buffers that the guest has posted too few of.
type fullGuest struct {
	room int
	got  []virtio.NetHdr
	size []int
}

func (f *fullGuest) Write(hdr virtio.NetHdr, frags [][]byte) zerocopy.WriteResult {
	if f.room == 0 {
		return zerocopy.NoRoom
	}
	f.room--
	n := 0
	for _, b := range frags {
		n += len(b)
	}
	f.got, f.size = append(f.got, hdr), append(f.size, n)
	return zerocopy.Written
}

func TestRecvKeepsWhatTheGuestHasNoRoomFor(t *testing.T) {
	d := openTest(t, "ipv6=off")
	must(t, d.SetPairs(1))
	q := &d.queues[0]
	for i := range 10 {
		pkt := testPacket(100 + i)
		d.out.put(pkt)
		pkt.DecRef()
	}
	f := &fullGuest{room: 3}
	if n, idle := recv(q, f, 64); n != 3 || idle {
		t.Fatalf("%d, %v", n, idle)
	}
	if n, idle := recv(q, f, 64); n != 0 || idle {
		t.Fatalf("%d, %v", n, idle)
	}
	f.room = 100
	if n, idle := recv(q, f, 5); n != 5 || idle {
		t.Fatalf("%d, %v", n, idle)
	}
	if n, idle := recv(q, f, 64); n != 2 || !idle {
		t.Fatalf("%d, %v", n, idle)
	}
	for i, n := range f.size {
		if n != 100+i {
			t.Errorf("frame %d has %d bytes, want %d", i, n, 100+i)
		}
	}
}

func TestNetHdr(t *testing.T) {
	var l link
	pkt := testPacket(100)
	defer pkt.DecRef()
	if h := l.netHdr(pkt); h != (virtio.NetHdr{}) {
		t.Errorf("for a guest without offloads: %+v", h)
	}
	l.accept.Store(uint32(offload.Csum))
	if h := l.netHdr(pkt); h != (virtio.NetHdr{Flags: virtio.NetHdrDataValid}) {
		t.Errorf("computed by the stack: %+v", h)
	}
	seg := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: 100, Payload: buffer.MakeWithData(make([]byte, 5000))})
	defer seg.DecRef()
	seg.TransportHeader().Push(32)
	seg.NetworkHeader().Push(20)
	seg.LinkHeader().Push(14)
	seg.GSOOptions = stack.GSO{Type: stack.GSOTCPv4, NeedsCsum: true, CsumOffset: 16, MSS: 1448}
	want := virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, GSOType: virtio.GSOTCPv4, HdrLen: 66, GSOSize: 1448, CsumStart: 34, CsumOffset: 16}
	if h := l.netHdr(seg); h != want {
		t.Errorf("%+v, want %+v", h, want)
	}
	seg.GSOOptions.MSS = 5000
	want.GSOType, want.GSOSize = 0, 0
	if h := l.netHdr(seg); h != want {
		t.Errorf("%+v, want %+v", h, want)
	}
}

func TestSendReleasesEachBufferOnce(t *testing.T) {
	d := openTest(t, "ipv6=off")
	must(t, d.SetPairs(1))
	var outcomes []zerocopy.Outcome
	u := zerocopy.Ubuf{Callback: func(_ *zerocopy.Ubuf, o zerocopy.Outcome) { outcomes = append(outcomes, o) }}
	good := arpFrame(1, "10.0.2.15", "10.0.2.2")
	var bufs []*zerocopy.Buffer
	for _, f := range [][]byte{good, good[:20], good, good, make([]byte, 5), make([]byte, virtio.MaxFrame+1), good} {
		bufs = append(bufs, zerocopy.NewUbufBuffer(u, virtio.NetHdr{}, f[:len(f)/2], f[len(f)/2:]))
	}
	if n := d.Queue(0).Send(bufs); n != len(bufs) {
		t.Fatalf("took %d of %d", n, len(bufs))
	}
	want := []zerocopy.Outcome{0, zerocopy.Dropped, 0, 0, zerocopy.Dropped, zerocopy.Dropped, 0}
	if len(outcomes) != len(want) {
		t.Fatalf("%v, want %v", outcomes, want)
	}
	for i, o := range outcomes {
		if o != want[i] {
			t.Errorf("buffer %d: %v, want %v", i, o, want[i])
		}
	}
	if n := d.Queue(0).Counters().SendDropped; n != 3 {
		t.Errorf("%d counted as dropped, want 3", n)
	}
}

func TestSetPairs(t *testing.T) {
	d := openTest(t, "")
	for _, n := range []int{-1, maxPairs + 1} {
		if d.SetPairs(n) == nil {
			t.Errorf("%d pairs are taken", n)
		}
	}
	for _, n := range []int{maxPairs, 0, 1, 2, 0} {
		must(t, d.SetPairs(n))
	}
	for i := range maxPairs {
		if len(d.out.boxes[i].waiting) != 0 {
			t.Errorf("pair %d still holds frames", i)
		}
	}
}
