//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

const (
	userBase = 0x7f00_0000_0000
	slotSize = 2048 // bytes of a buffer
	maxFrame = 1514 // bytes
	stuck    = 30 * time.Second
)

// guest is a virtual machine without one: memory, one queue pair, and what a VMM says until frames can flow.
type guest struct {
	mem   []byte
	fd    int
	used  int // bytes of mem that are allocated
	fe    *vhostuser.FrontEnd
	recv  *queue
	send  *queue
	mac   [6]byte
	to    [6]byte // whom frames are for
	peer  *guest  // who gets them: the guest itself, at a port that returns them
	frame int     // the next to send
	want  int     // the next to come
}

// guests counts them, for their addresses.
var guests atomic.Uint32

// queue is a virtqueue, seen from the guest. Buffer i is slotSize bytes from bufs+i*slotSize on.
type queue struct {
	g      *guest
	index  uint32
	hdr    int // bytes of the virtio-net header
	driver *vring.Driver
	addr   vhostuser.VringAddr
	kick   *sys.EventFD
	call   *sys.EventFD
	bufs   guestmem.GPA
	free   []uint16 // buffers
	bufOf  []uint16 // by chain
}

// newGuest connects to a port and starts its queues, of size descriptors each. Receive buffers are posted, calls are wanted: it idles.
func newGuest(path string, size int) (_ *guest, err error) {
	n := guests.Add(1)
	g := &guest{fd: -1, mac: [6]byte{2, 0, 0, 0, byte(n >> 8), byte(n)}, to: [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}
	g.peer = g
	defer func() {
		if err != nil {
			g.close()
		}
	}()
	if err := g.makeMemory(4<<20 + 2*size*(slotSize+64)); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), stuck)
	defer cancel()
	if g.fe, err = vhostuser.Dial(ctx, path); err != nil {
		return nil, err
	}
	f, err := g.negotiate()
	if err != nil {
		return nil, err
	}
	if g.recv, err = g.newQueue(0, size, f); err != nil {
		return nil, err
	}
	if g.send, err = g.newQueue(1, size, f); err != nil {
		return nil, err
	}
	if err := g.recv.post(); err != nil {
		return nil, err
	}
	if err := errors.Join(g.recv.start(), g.send.start()); err != nil {
		return nil, err
	}
	_, err = g.fe.GetFeatures() // answered when all before has been served
	return g, err
}

func (g *guest) makeMemory(n int) (err error) {
	if g.fd, err = unix.MemfdCreate("scale-guest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING); err != nil {
		return fmt.Errorf("memfd_create: %w", err)
	}
	if err := unix.Ftruncate(g.fd, int64(n)); err != nil {
		return fmt.Errorf("%d bytes of guest memory: %w", n, err)
	}
	if g.mem, err = unix.Mmap(g.fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE); err != nil {
		return fmt.Errorf("%d bytes of guest memory: %w", n, err)
	}
	return nil
}

// alloc takes n bytes, aligned as everything wants.
func (g *guest) alloc(n int) (guestmem.GPA, []byte) {
	at := (g.used + 127) &^ 127
	g.used = at + n
	return guestmem.GPA(at), g.mem[at:g.used:g.used]
}

// negotiate accepts what QEMU and a Linux guest do, and shares the memory.
func (g *guest) negotiate() (f virtio.Features, err error) {
	offered, err := g.fe.GetFeatures()
	if err != nil {
		return 0, err
	}
	f = virtio.Features(offered) &^ (virtio.FRingPacked | virtio.FInOrder | virtio.FIndirectDesc | virtio.FLogAll | virtio.FAccessPlatform)
	protocol, err := g.fe.GetProtocolFeatures()
	if err != nil {
		return 0, err
	}
	region := vhostuser.MemoryRegion{Size: uint64(len(g.mem)), UserAddr: userBase}
	return f, errors.Join(g.fe.SetProtocolFeatures(protocol), g.fe.SetOwner(), g.fe.SetFeatures(uint64(f)),
		g.fe.SetMemTable([]vhostuser.MemoryRegion{region}, []int{g.fd}))
}

func (g *guest) newQueue(index uint32, size int, f virtio.Features) (q *queue, err error) {
	q = &queue{g: g, index: index, hdr: virtio.NetHdrLen(f), bufOf: make([]uint16, size)}
	cfg := vring.DriverConfig{Size: size, Features: f}
	var desc, avail, used guestmem.GPA
	desc, cfg.Desc = g.alloc(virtio.DescTableLen(size))
	avail, cfg.Avail = g.alloc(virtio.AvailLen(size))
	used, cfg.Used = g.alloc(virtio.UsedLen(size))
	q.addr = vhostuser.VringAddr{Index: index, Desc: userBase + uint64(desc), Avail: userBase + uint64(avail), Used: userBase + uint64(used)}
	q.bufs, _ = g.alloc(size * slotSize)
	for i := range size {
		q.free = append(q.free, uint16(i))
	}
	for _, fd := range []**sys.EventFD{&q.kick, &q.call} {
		if *fd, err = sys.NewEventFD(); err != nil {
			return q, err
		}
	}
	q.driver, err = vring.NewDriver(cfg)
	return q, err
}

// start hands the queue over, in QEMU's order.
func (q *queue) start() error {
	fe := q.g.fe
	return errors.Join(
		fe.SetVringNum(q.index, uint32(q.driver.Size())), fe.SetVringBase(q.index, 0), fe.SetVringAddr(q.addr),
		fe.SetVringCall(q.index, q.call.FD()), fe.SetVringKick(q.index, q.kick.FD()), fe.SetVringEnable(q.index, true))
}

// close hangs up. It takes a guest that is not finished.
func (g *guest) close() {
	if g.fe != nil {
		_ = g.fe.Close()
	}
	for _, q := range []*queue{g.recv, g.send} {
		if q != nil && q.call != nil {
			_ = q.kick.Close()
			_ = q.call.Close()
		}
	}
	if g.mem != nil {
		_ = unix.Munmap(g.mem)
	}
	if g.fd >= 0 {
		_ = unix.Close(g.fd)
	}
}

// add makes a chain of the first n bytes of a free buffer, whose bytes it returns.
func (q *queue) add(n int) ([]byte, error) {
	if len(q.free) == 0 {
		return nil, vring.ErrFull
	}
	i := q.free[len(q.free)-1]
	buf := []vring.Buf{{GPA: q.bufs + guestmem.GPA(int(i)*slotSize), Len: uint32(n)}}
	readable, writable := buf, []vring.Buf(nil)
	if q.index == 0 {
		readable, writable = nil, buf
	}
	id, err := q.driver.Add(readable, writable)
	if err != nil {
		return nil, err
	}
	q.free = q.free[:len(q.free)-1]
	q.bufOf[id] = i
	return q.bytes(i)[:n], nil
}

func (q *queue) bytes(i uint16) []byte {
	at := int(q.bufs) + int(i)*slotSize
	return q.g.mem[at : at+slotSize : at+slotSize]
}

// reap takes back a chain: what was written into its buffer, which the next add may take. nil: there is none.
func (q *queue) reap() []byte {
	id, n, ok := q.driver.Reap()
	if !ok {
		return nil
	}
	i := q.bufOf[id]
	q.free = append(q.free, i)
	return q.bytes(i)[:n:slotSize]
}

func (q *queue) flush() {
	q.driver.Publish()
	if q.driver.NeedsKick() {
		q.kick.Signal()
	}
}

// post posts all free buffers.
func (q *queue) post() error {
	for len(q.free) > 0 {
		if _, err := q.add(slotSize); err != nil {
			return err
		}
	}
	q.flush()
	return nil
}

// wait sleeps until there is something to reap.
func (q *queue) wait(until time.Time) error {
	for !q.driver.EnableCall() {
		left := time.Until(until)
		if left <= 0 {
			return fmt.Errorf("queue %d: nothing came within %v", q.index, stuck)
		}
		p := []unix.PollFd{{Fd: int32(q.call.FD()), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, int(left/time.Millisecond)+1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("queue %d: waiting for a call: %w", q.index, err)
		}
		q.call.Drain()
	}
	q.driver.DisableCall()
	return q.driver.Err()
}
