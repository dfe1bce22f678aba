package tap

import (
	"encoding/binary"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// narrow opens a tap whose frames pass a token bucket of rate bytes a second, charged to the tap's send buffer until they leave, on their way to
// sink. They have at most 1014 bytes.
func narrow(t *testing.T, options string, rate uint64) (d, sink *Device) {
	t.Helper()
	d = open(t, "tap:t0"+options)
	snoop := false // a snooping bridge sends frames of its own
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}, MulticastSnooping: &snoop}
	must(t, netlink.LinkAdd(bridge))
	must(t, netlink.LinkSetUp(bridge))
	must(t, netlink.LinkSetMaster(netdevtest.Link(t, "t0"), bridge))
	sink = open(t, "tap:t1,bridge=br0")
	must(t, netlink.QdiscReplace(&netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: netdevtest.Link(t, "t1").Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       rate, Limit: 1 << 20, Buffer: netlink.Xmittime(rate, 3000),
	}))
	return d, sink
}

// bound gives the tap a send buffer of n bytes.
func bound(t *testing.T, d *Device, n int) {
	t.Helper()
	must(t, unix.IoctlSetPointerInt(d.queues[0].fd, unix.TUNSETSNDBUF, n))
}

// numbered is a frame that tells its place.
func numbered(n int, i uint32) []byte {
	return binary.BigEndian.AppendUint32(testFrame(n-4, i), i)
}

// TestSendFull: with the send buffer full, Send takes what goes and the rest later.
func TestSendFull(t *testing.T) {
	inNetns(t)
	d, sink := narrow(t, ",io-uring=off", 200_000)
	bound(t, d, 20000)
	g := newGuest(t, 256, plain)
	var b buffers
	const frames = 60
	for i := range frames {
		b.add(virtio.NetHdr{}, testFrame(1014, uint32(i)))
	}
	q, got, full := d.Queue(0), 0, false
	for left := b.bufs; len(left) > 0 || got < frames; {
		n := q.Send(left)
		full = full || n < len(left)
		left = left[n:]
		g.post(1, 2048)
		wantFrame(t, g.recv(sink.Queue(0)).data, testFrame(1014, uint32(got)))
		got++
		if n == 0 && len(left) > 0 {
			pollFor(t, q.SendFD(), unix.POLLOUT)
		}
	}
	if !full {
		t.Error("Send took all at once: the test does not fill the send buffer")
	}
	if len(b.outcomes) != frames {
		t.Errorf("%d releases for %d frames", len(b.outcomes), frames)
	}
}

// TestSendFullBatches: a send buffer that gets a bound while batches are written and that fills in the middle of one, with room for those behind the
// frame that was refused a moment later. None overtakes another, every frame arrives or is counted as dropped, and from the first
// refusal on they are written one by one and none is lost any more.
func TestSendFullBatches(t *testing.T) {
	inNetns(t)
	const rounds, perRound = 20, 4 * batchFrames
	d, sink := narrow(t, "", 20<<20)
	q, g := d.queues[0], newGuest(t, 1024, plain)
	var next, seq uint32 // that is expected at least, and to be sent
	lost, refused, arrived := 0, 0, 0
	read := func() {
		g.post(1, 2048)
		f := g.recv(sink.Queue(0)).data
		i := binary.BigEndian.Uint32(f[len(f)-4:])
		wantFrame(t, f, numbered(1014, i))
		if i < next {
			t.Fatalf("frame %d arrives behind %d", i, next-1)
		}
		next = i + 1
		arrived++
	}
	for range rounds {
		bound(t, d, sys.TunUnbounded)
		q.stopBatches()
		var err error
		q.send.batch, err = newBatcher(q.fd, 1)
		must(t, err)
		bound(t, d, 30000)
		var b buffers
		for range perRound {
			b.add(virtio.NetHdr{}, numbered(1014, seq))
			seq++
		}
		for left := b.bufs; len(left) > 0; {
			batched, before := q.send.batch != nil, len(b.outcomes)
			n := q.Send(left)
			for _, o := range b.outcomes[before:] {
				if o != zerocopy.Dropped {
					continue
				}
				if lost++; !batched {
					t.Fatal("a frame that was written by itself was dropped")
				}
			}
			if left = left[n:]; len(left) > 0 {
				if refused++; q.send.batch != nil {
					t.Fatal("the ring is still used after a refusal")
				}
				pollFor(t, q.SendFD(), unix.POLLOUT)
			}
		}
		if len(b.outcomes) != perRound {
			t.Fatalf("%d releases for %d frames", len(b.outcomes), perRound)
		}
		for arrived+lost < int(seq) {
			read()
		}
	}
	if refused == 0 {
		t.Error("nothing was refused: the test does not fill the send buffer")
	}
	if got := int(q.Counters().SendDropped); got != lost {
		t.Errorf("SendDropped is %d, but %d frames were released as dropped", got, lost)
	}
	t.Logf("%d times refused, %d frames of %d would have been overtaken and were dropped", refused, lost, seq)
}

// TestSettle: what becomes of the frames of a batch, for every pattern of what the kernel can say.
func TestSettle(t *testing.T) {
	const ok, again, bad = 0, unix.EAGAIN, unix.EINVAL
	const copied, dropped = zerocopy.Copied, zerocopy.Dropped
	for _, c := range []struct {
		errnos []unix.Errno
		full   bool
		want   []zerocopy.Outcome // of those that were taken
	}{
		{[]unix.Errno{ok, ok, ok}, false, []zerocopy.Outcome{copied, copied, copied}},
		{[]unix.Errno{bad, ok, bad}, false, []zerocopy.Outcome{dropped, copied, dropped}},
		{[]unix.Errno{ok, again, again}, true, []zerocopy.Outcome{copied}},
		{[]unix.Errno{again, again}, true, nil},
		{[]unix.Errno{ok, bad, again, bad}, true, []zerocopy.Outcome{copied, dropped}},
		// The third got through: the second comes too late for ever.
		{[]unix.Errno{ok, again, ok, again}, true, []zerocopy.Outcome{copied, dropped, copied}},
		{[]unix.Errno{again, again, bad, ok}, false, []zerocopy.Outcome{dropped, dropped, dropped, copied}},
	} {
		var b buffers
		for i := range c.errnos {
			b.add(virtio.NetHdr{}, testFrame(60, uint32(i)))
		}
		q := newQueue(-1, hdrSize)
		if n, full := q.settle(b.bufs, c.errnos); n != len(c.want) || full != c.full {
			t.Errorf("%v: takes %d, full %v; want %d, %v", c.errnos, n, full, len(c.want), c.full)
		}
		if !slices.Equal(b.outcomes, c.want) {
			t.Errorf("%v: released as %v, want %v", c.errnos, b.outcomes, c.want)
		}
	}
}
