package bench

import (
	"errors"
	"fmt"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// The vrings of the one queue pair.
const (
	receiveq  = 0
	transmitq = 1
)

// packedStart is where a packed ring starts: descriptor 0, wrap counter 1.
const packedStart = 1 << 15

// minStride is the least distance of two buffers in bytes: that of a driver that has buffers for whole frames.
const minStride = 2304

// queue is a virtqueue with its buffers, at the guest's end.
type queue struct {
	index  uint32
	packed bool
	driver *vring.Driver
	desc   area
	avail  area
	used   area
	kick   *sys.EventFD
	call   *sys.EventFD // never polled: the driver does not ask for calls
	broken *sys.EventFD // the back-end's err descriptor
	kicks  uint64

	bufs    area
	stride  int
	writeOK bool     // device-writable: a receiveq's
	free    []uint32 // slots, a ring: taken and given back first in, first out, so that all are used in turn
	take    int      // next slot to take in free
	give    int      // where the next slot goes that is given back
	spare   int      // slots that can be taken
	slotOf  []uint32 // by chain
	chain   int      // descriptors of a chain
	cut     []vring.Buf
}

// layout is what a queue needs of memory.
type layout struct {
	size, chain   int
	indirect      bool
	stride, slots int
}

func (c Config) layout(bytes int) layout {
	l := layout{size: c.Size, chain: c.Chain, indirect: c.Indirect, stride: roundUp(max(bytes, minStride), 64)}
	l.slots = max(c.Size, c.Cold/l.stride)
	return l
}

// tablesLen is the length of all indirect tables in bytes.
func (l layout) tablesLen() int {
	if !l.indirect {
		return 0
	}
	return l.size * l.chain * virtio.DescSize
}

// bytes is what the queue takes of guest memory.
func (l layout) bytes() (n int) {
	for _, part := range []int{
		virtio.DescTableLen(l.size), virtio.AvailLen(l.size), virtio.UsedLen(l.size), l.tablesLen(), l.stride * l.slots,
	} {
		n += roundUp(part, page)
	}
	return n
}

// newQueue lays a queue out in mem.
func newQueue(mem *memory, index uint32, l layout, f virtio.Features) (_ *queue, err error) {
	q := &queue{
		index: index, packed: f.Has(virtio.FRingPacked), chain: l.chain, stride: l.stride, writeOK: index == receiveq,
		desc: mem.alloc(virtio.DescTableLen(l.size)), avail: mem.alloc(virtio.AvailLen(l.size)), used: mem.alloc(virtio.UsedLen(l.size)),
		free: make([]uint32, l.slots), spare: l.slots, slotOf: make([]uint32, l.size), cut: make([]vring.Buf, l.chain),
	}
	for i := range q.free {
		q.free[i] = uint32(i)
	}
	tables := mem.alloc(l.tablesLen())
	q.bufs = mem.alloc(l.stride * l.slots)
	cfg := vring.DriverConfig{
		Size: l.size, Features: f, Base: q.base(), Desc: q.desc.mem, Avail: q.avail.mem, Used: q.used.mem,
		Indirect: tables.mem, IndirectAddr: tables.at,
	}
	if l.indirect {
		cfg.IndirectLen = l.chain
	}
	if q.driver, err = vring.NewDriver(cfg); err != nil {
		return nil, err
	}
	q.driver.DisableCall()
	for _, fd := range []**sys.EventFD{&q.kick, &q.call, &q.broken} {
		if *fd, err = sys.NewEventFD(); err != nil {
			q.close()
			return nil, err
		}
	}
	return q, nil
}

func (q *queue) close() {
	for _, fd := range []*sys.EventFD{q.kick, q.call, q.broken} {
		if fd != nil {
			_ = fd.Close()
		}
	}
}

// base is where the ring starts.
func (q *queue) base() uint16 {
	if q.packed {
		return packedStart
	}
	return 0
}

// start hands the queue to the back-end, in QEMU's order.
func (q *queue) start(fe *vhostuser.FrontEnd, enable bool) error {
	base := uint32(q.base())
	if q.packed {
		base |= base << 16 // of the used descriptors
	}
	err := errors.Join(
		fe.SetVringNum(q.index, uint32(q.driver.Size())),
		fe.SetVringBase(q.index, base),
		fe.SetVringAddr(vhostuser.VringAddr{Index: q.index, Desc: q.desc.user(), Avail: q.avail.user(), Used: q.used.user()}),
		fe.SetVringErr(q.index, q.broken.FD()),
		fe.SetVringCall(q.index, q.call.FD()),
		fe.SetVringKick(q.index, q.kick.FD()),
	)
	if err == nil && enable {
		err = fe.SetVringEnable(q.index, true)
	}
	return err
}

// next is the buffer that add will use; ok is false when the ring or the buffers are used up.
func (q *queue) next() (buf []byte, ok bool) {
	if q.spare == 0 || q.driver.Free() < q.chain {
		return nil, false
	}
	return q.slot(q.free[q.take]), true
}

func (q *queue) slot(s uint32) []byte {
	from := int(s) * q.stride
	return q.bufs.mem[from : from+q.stride : from+q.stride]
}

// add makes a chain of the first n bytes of the next buffer: of one descriptor, or the virtio-net header in one and the rest cut evenly.
func (q *queue) add(n int) (id uint16, err error) {
	s := q.free[q.take]
	at := q.bufs.at + guestmem.GPA(int(s)*q.stride)
	if q.chain == 1 {
		q.cut[0] = vring.Buf{GPA: at, Len: uint32(n)}
	} else {
		q.cutEvenly(at, n)
	}
	if q.writeOK {
		id, err = q.driver.Add(nil, q.cut)
	} else {
		id, err = q.driver.Add(q.cut, nil)
	}
	if err != nil {
		return 0, err
	}
	q.slotOf[id] = s
	if q.take++; q.take == len(q.free) {
		q.take = 0
	}
	q.spare--
	return id, nil
}

// cutEvenly fills cut with a buffer's pieces.
func (q *queue) cutEvenly(at guestmem.GPA, n int) {
	q.cut[0] = vring.Buf{GPA: at, Len: virtio.NetHdrSize}
	at += virtio.NetHdrSize
	n -= virtio.NetHdrSize
	for i := 1; i < q.chain; i++ {
		m := n / (q.chain - i)
		q.cut[i] = vring.Buf{GPA: at, Len: uint32(m)}
		at += guestmem.GPA(m)
		n -= m
	}
}

// reap takes back a chain and what was written into its buffer, which add may use again soon: ok is false when there is none.
func (q *queue) reap() (id uint16, buf []byte, written int, ok bool) {
	id, n, ok := q.driver.Reap()
	if !ok {
		return 0, nil, 0, false
	}
	s := q.slotOf[id]
	q.free[q.give] = s
	if q.give++; q.give == len(q.free) {
		q.give = 0
	}
	q.spare++
	return id, q.slot(s), int(n), true
}

// flush publishes what was added, and kicks if the device wants that.
func (q *queue) flush() {
	q.driver.Publish()
	if q.driver.NeedsKick() {
		q.kicks++
		q.kick.Signal()
	}
}

func (q *queue) err() error {
	if err := q.driver.Err(); err != nil {
		return fmt.Errorf("the back-end broke the %s: %w", q.name(), err)
	}
	return nil
}

func (q *queue) name() string {
	if q.index == receiveq {
		return "receiveq"
	}
	return "transmitq"
}
