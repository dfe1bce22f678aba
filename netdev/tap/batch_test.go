package tap

import (
	"errors"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// sendSome sends n numbered frames in one call, and wants them to come out in order.
func sendSome(t *testing.T, d *Device, w wire, n int) {
	t.Helper()
	var b buffers
	want := make([]zerocopy.Outcome, n)
	for i := range n {
		b.add(virtio.NetHdr{}, numbered(100, uint32(i)))
		want[i] = zerocopy.Copied
	}
	b.sendAll(t, d.Queue(0), want...)
	for i := range n {
		wantFrame(t, w.recv(), numbered(100, uint32(i)))
	}
}

// TestBatches: which batches go through the ring, by option and by size; all arrive, in order.
func TestBatches(t *testing.T) {
	for options, least := range map[string]int{"": batchLeast, ",io-uring=auto": batchLeast, ",io-uring=on": 1, ",io-uring=off": 0} {
		t.Run(options, func(t *testing.T) {
			inNetns(t)
			d := open(t, "tap:t0,queues=2"+options)
			for _, q := range d.queues {
				if b := q.send.batch; (b != nil) != (least > 0) || b != nil && b.least != least {
					t.Errorf("batcher %+v, want one from %d frames on (0: none)", b, least)
				}
			}
			w := newWire(t, "t0")
			for _, n := range []int{1, batchLeast - 1, batchLeast, batchFrames, batchFrames + 1, 3*batchFrames + batchLeast} {
				sendSome(t, d, w, n)
			}
		})
	}
}

// TestBatchesBounded: the frames of a tap whose send buffer has a bound are written one by one, since any may be refused.
func TestBatchesBounded(t *testing.T) {
	inNetns(t)
	narrowed := func(name string) Options {
		fd := rawTap(t, name, sys.TunTap|sys.TunNoPI|sys.TunVnetHdr)
		must(t, unix.IoctlSetPointerInt(fd, unix.TUNSETSNDBUF, 1<<20))
		return Options{FDs: []int{fd}}
	}
	if d := openWith(t, narrowed("t0")); d.queues[0].send.batch != nil {
		t.Error("it has a ring")
	}
	o := narrowed("t1")
	o.IOUring = BatchAlways
	if _, err := Open(o); !errors.Is(err, errBounded) || !strings.Contains(err.Error(), "io-uring=on") {
		t.Errorf("io-uring=on: %v", err)
	}
}

// TestBatchesRingFails: a ring that breaks costs no frame and no order; what it did not take is written one by one, and so is all that follows.
func TestBatchesRingFails(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0,io-uring=on")
	w, q := newWire(t, "t0"), d.queues[0]
	sendSome(t, d, w, 10)
	// From now on its descriptor is another file's, which refuses io_uring_enter.
	other, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	must(t, err)
	must(t, unix.Dup3(other, q.send.batch.ring.FD(), unix.O_CLOEXEC))
	must(t, unix.Close(other))
	sendSome(t, d, w, 3*batchFrames)
	if q.send.batch != nil {
		t.Error("the ring that failed is still there")
	}
	sendSome(t, d, w, 10)
	if n := q.Counters().SendDropped; n != 0 {
		t.Errorf("%d frames dropped", n)
	}
}

// TestBatchesForbidden: on a host without io_uring, or one that forbids it, frames are written one by one, unless the user insists.
func TestBatchesForbidden(t *testing.T) {
	for _, errno := range []unix.Errno{unix.ENOSYS, unix.EPERM} {
		t.Run(errno.Error(), func(t *testing.T) {
			inNetns(t)
			runtime.LockOSThread() // for good: the thread, and the filter with it, ends with the subtest
			must(t, forbid(unix.SYS_IO_URING_SETUP, errno))
			d := open(t, "tap:t0")
			if d.queues[0].send.batch != nil {
				t.Error("it has a ring")
			}
			sendSome(t, d, newWire(t, "t0"), batchFrames)
			_, err := Open(Options{Name: "t1", IOUring: BatchAlways})
			if !errors.Is(err, errno) || !strings.Contains(err.Error(), "leave it out") {
				t.Errorf("io-uring=on: %v, want %v", err, errno)
			}
		})
	}
}

// TestBatchesClose: the interface is gone and every descriptor closed when Close returns, although the ring had them as well.
func TestBatchesClose(t *testing.T) {
	inNetns(t)
	before := countFDs(t)
	for range 5 {
		d, err := Open(Options{Name: "t0", Queues: 3, IOUring: BatchAlways})
		must(t, err)
		var b buffers
		b.add(virtio.NetHdr{}, testFrame(100, 1))
		b.sendAll(t, d.Queue(1), zerocopy.Copied)
		must(t, d.Close())
		if _, err := netlink.LinkByName("t0"); err == nil {
			t.Error("the interface is still there after Close")
		}
	}
	if after := countFDs(t); after != before {
		t.Errorf("%d descriptors, were %d", after, before)
	}
}
