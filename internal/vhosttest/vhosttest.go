// Package vhosttest is a whole guest in the test's own process: RAM in memory files, the driver ends of the virtqueues laid out in it,
// and the front-end that hands both to a back-end. Every part is a real one; only the operating system of the guest is missing.
//
// # Theory of operation
//
//	Guest                                            back-end under test
//	  Memory   memfds, mapped once here   --fds-->   mapped a second time
//	  FE       vhostuser.FrontEnd         <------>   vhostuser.Serve, over a socket pair or a path
//	  Queues   vring.Driver over Memory   <------>   vring.Device over the same pages
//	           Kick, Call, Err eventfds
//
// Start does all that a VMM does until traffic can flow; New, Connect and Queue.Start are its steps, for tests that do them otherwise.
// Queue.Send, Recv and their parts are a driver's data path; Queue.Driver.Raw*, Memory.At and FE.SendRaw reach behind it, to play a
// guest or a front-end that breaks the rules.
//
// A Queue belongs to one goroutine at a time, and so does the control side (FE, Connect, Stop), but they do not exclude each other: a
// guest sends while its front-end is busy. Errors of data-path methods are returned, since they run on any goroutine; the
// control side fails the test.
//
// NoLeaks, called first, checks at the end of the test that no goroutine, descriptor or mapping is left.
package vhosttest

import (
	"os"
	"testing"
	"time"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/virtio"
)

// Guests sleep in system calls, beside a back-end in another process too, where nobody else keeps Go's timers going.
func init() { sys.Heartbeat() }

// Patience bounds every wait. It is no measure of speed: nothing but a hang takes that long.
const Patience = 60 * time.Second

// StartIndex is where ring indices start, unless Options say otherwise: 16 entries before they wrap. Packed rings start 16 descriptors before
// their end, in the first lap.
const StartIndex = 0xfff0

// Options are what a Guest is made of. The zero value is a guest of one queue pair that accepts all that it is offered.
type Options struct {
	Pairs     int             // queue pairs; 0: 1
	QueueSize int             // descriptors; 0: 256
	Without   virtio.Features // offered features that the driver does not accept
	Packed    bool            // the driver accepts packed rings
	AtZero    bool            // ring indices start at 0 and not at StartIndex

	NoReplyAck bool // REPLY_ACK is not accepted: errors show only as the end of the connection
	NoProtocol bool // VHOST_USER_F_PROTOCOL_FEATURES is not accepted: rings are enabled from the start
	MemSlots   bool // memory goes over region by region, with ADD_MEM_REG
	Polled     bool // no kick descriptors
	Disabled   bool // rings are started and left disabled
	Path       string

	Regions    []RegionSpec // RAM; nil: two regions with a hole between them, large enough
	Heap       bool         // RAM that Regions does not name lies in the heap: see RegionSpec
	SendSize   int          // bytes of a transmit buffer, virtio-net header included; 0: 2048
	RecvSize   int          // bytes of a posted receive buffer; 0: 2048
	RecvLayout Layout       // descriptors of a posted receive buffer
	Direct     bool         // chains are never indirect, even if that was negotiated
}

// indirectLen is how many descriptors an indirect table has.
const indirectLen = 32

// defaultSize is the size in bytes of transmit and receive buffers: what a frame of 1500 bytes takes, and some.
const defaultSize = 2048

func (o Options) withDefaults() Options {
	if o.Pairs == 0 {
		o.Pairs = 1
	}
	if o.QueueSize == 0 {
		o.QueueSize = 256
	}
	if o.SendSize == 0 {
		o.SendSize = defaultSize
	}
	if o.RecvSize == 0 {
		o.RecvSize = defaultSize
	}
	if o.Regions == nil {
		o.Regions = []RegionSpec{
			{GPA: 0, Size: 2 << 20, Heap: o.Heap},
			{GPA: 1 << 32, Size: o.need(), Heap: o.Heap},
		}
	}
	return o
}

// need is more than all queues take, in bytes.
func (o Options) need() uint64 {
	ring := virtio.DescTableLen(o.QueueSize) + virtio.AvailLen(o.QueueSize) + virtio.UsedLen(o.QueueSize) + 3*page
	tables := o.QueueSize*indirectLen*virtio.DescSize + page
	data := o.QueueSize * (max(o.SendSize, o.RecvSize) + page)
	total := uint64(2*o.Pairs*(ring+tables+data)) + 1<<20
	return (total + 1<<21 - 1) &^ (1<<21 - 1)
}

// Layout says how a buffer is cut into descriptors: the bytes of each but the last, which takes the rest. Pieces beyond the buffer's end
// are left out. nil is one descriptor.
type Layout []int

// Layouts that occur in the wild: what Linux does, what it does without VIRTIO_F_ANY_LAYOUT, and what only a spec lawyer does.
var (
	Flat        Layout
	HeaderApart = Layout{virtio.NetHdrSize}
	Crumbs      = Layout{1, 1, 2, 3, 1, 7, 1, 14, 100}
)

// cut returns n bytes at a in l's pieces, appended to to.
func (l Layout) cut(to []piece, a guestmem.GPA, n int) []piece {
	for _, m := range l {
		if m >= n {
			break
		}
		to = append(to, piece{GPA: a, Len: uint32(m)})
		a += guestmem.GPA(m)
		n -= m
	}
	return append(to, piece{GPA: a, Len: uint32(n)})
}

// ShortDir is a directory of the test's own, with a path that is short enough for a socket in it, as that of TempDir is not always.
func ShortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vhostd-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
