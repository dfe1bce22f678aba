package user

import (
	"errors"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
	"github.com/vhostd/vhostd/zerocopy"
)

// guestQueue is a queue pair of the guest's.
type guestQueue struct {
	g      *guest
	i      int
	sendMu sync.Mutex
	posted *zerocopy.Posted
	dev    *vring.Device
	drv    *vring.Driver
	mem    []byte
	bufs   map[uint16]vring.Buf
	frames int
	frame  []byte
}

const (
	guestBase  = guestmem.GPA(0x4000_0000)
	guestRings = 1 << 16
	ringSize   = 256
)

func newGuestQueue(t testing.TB, g *guest, i, bufSize int) *guestQueue {
	t.Helper()
	region, err := guestmem.NewHeapRegion(guestBase, 0x7f00_0000_0000, guestRings+(ringSize*bufSize+4095)&^4095)
	must(t, err)
	table, err := guestmem.NewTable(region)
	must(t, err)
	t.Cleanup(table.Unpin)
	b := region.Bytes()
	const avail, used = 1 << 15, 1<<15 + 1<<14
	cfg := vring.Config{Size: ringSize, Desc: b[:avail], Avail: b[avail:used], Used: b[used:guestRings], Features: g.features}
	drv, err := vring.NewDriver(vring.DriverConfig{Size: ringSize, Desc: cfg.Desc, Avail: cfg.Avail, Used: cfg.Used, Features: g.features})
	must(t, err)
	dev, err := vring.NewDevice(cfg, guestmem.NewView(table, nil))
	must(t, err)
	q := &guestQueue{
		g: g, i: i, posted: zerocopy.NewPosted(dev, g.features), dev: dev, drv: drv, mem: b, bufs: make(map[uint16]vring.Buf),
	}
	for n := range ringSize {
		q.post(vring.Buf{GPA: guestBase + guestmem.GPA(guestRings+n*bufSize), Len: uint32(bufSize)})
	}
	drv.Publish()
	return q
}

func (q *guestQueue) post(b vring.Buf) {
	id, err := q.drv.Add(nil, []vring.Buf{b})
	must(q.g, err)
	q.bufs[id] = b
}

// receive is the worker of the receiveq, and the guest's interrupt handler.
func (q *guestQueue) receive() {
	defer q.g.wg.Done()
	dq := q.g.dev.Queue(q.i)
	for {
		_, idle, err := dq.Recv(q.posted, 64)
		if err != nil {
			panic(err)
		}
		q.dev.Publish()
		for q.take() {
		}
		q.drv.Publish()
		select {
		case <-q.g.stop:
			return
		default:
		}
		if idle && q.posted.Flush() {
			fds := []unix.PollFd{{Fd: int32(dq.RecvFD()), Events: unix.POLLIN}}
			if _, err := unix.Poll(fds, 50); err != nil && !errors.Is(err, unix.EINTR) {
				panic(err)
			}
		}
	}
}

// take gives one frame to the guest, and its buffers back to the device.
func (q *guestQueue) take() bool {
	b := q.chain()
	if b == nil {
		return false
	}
	hdr := virtio.DecodeNetHdr(b[:virtio.NetHdrSize])
	q.frame = append(q.frame[:0], b[virtio.NetHdrSize:]...)
	for i := 1; i < int(hdr.NumBuffers); i++ {
		q.frame = append(q.frame, q.chain()...)
	}
	q.frames++
	q.g.input(hdr, q.frame)
	return true
}

func (q *guestQueue) chain() []byte {
	id, n, ok := q.drv.Reap()
	if !ok {
		return nil
	}
	b := q.bufs[id]
	q.post(b)
	off := int(b.GPA - guestBase)
	return q.mem[off : off+int(n)]
}
