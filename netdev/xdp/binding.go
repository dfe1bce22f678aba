package xdp

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/internal/sys/xsk"
)

const (
	sendBuffer = 8 << 20 // bytes of kernel memory behind a socket in copy mode
	kickBatch  = 256     // frames that one system call sends
	busyPause  = 5 * time.Millisecond
)

// binding is a socket that is bound to a queue of the interface, and what goes with it. It is never changed into another one.
type binding struct {
	layout
	arena *shm.Arena
	mem   []byte // arena's
	sock  *xsk.Socket
	way   way
	send  sending               // guarded by port.mu, or nobody else knows the binding
	recv  receiving             // of the receiveq's worker
	fault atomic.Pointer[error] // see err
}

// err is what ended the socket (the interface went away), or nil. The kernel says it once, to either half.
func (b *binding) err() error {
	if err := b.fault.Load(); err != nil {
		return *err
	}
	err := b.sock.Err()
	if err != nil {
		b.fault.Store(&err)
	}
	return err
}

// way is how sockets of a device are bound.
type way struct {
	flags  uint16
	meta   bool // a checksum can be left to the kernel
	pieces int  // of a frame that is sent, at most
}

func (w way) zerocopy() bool  { return w.flags&unix.XDP_ZEROCOPY != 0 }
func (w way) scattered() bool { return w.flags&unix.XDP_USE_SG != 0 }

// ways lists how to bind, the best first.
func ways(m Mode, native bool, f features) (list []way) {
	if native && (m == Auto || m == Native || m == ZeroCopy) && f.zerocopy {
		if f.segs > 1 {
			list = append(list, way{unix.XDP_ZEROCOPY | unix.XDP_USE_SG | unix.XDP_USE_NEED_WAKEUP, f.csum, min(f.segs, xsk.MaxPieces)})
		}
		list = append(list, way{unix.XDP_ZEROCOPY | unix.XDP_USE_NEED_WAKEUP, f.csum, 1})
	}
	if m == ZeroCopy {
		return list
	}
	return append(list,
		way{unix.XDP_COPY | unix.XDP_USE_SG | unix.XDP_USE_NEED_WAKEUP, true, xsk.MaxPieces},
		way{unix.XDP_COPY | unix.XDP_USE_SG | unix.XDP_USE_NEED_WAKEUP, false, xsk.MaxPieces},
		way{unix.XDP_COPY | unix.XDP_USE_NEED_WAKEUP, false, 1},
	)
}

// errFrame says that a way has no room for the longest frame.
var errFrame = errors.New("frames of that length need several chunks, which the kernel or the driver does not know: lower mtu=")

// openBinding makes a binding over private memory and regions, which may be none. While the queue still belongs to a socket that was closed it
// tries again, until deadline.
func (d *Device) openBinding(p *port, w way, regions [][]byte, deadline time.Time) (*binding, error) {
	queue, guest := p.queue, len(regions) > 0
	b := &binding{layout: newLayout(d.frame, guest, w.meta, guest && !w.zerocopy() && p.lends.Load()), way: w}
	if !w.scattered() && !b.single() {
		return nil, fmt.Errorf("queue %d: %d bytes: %w", queue, d.frame, errFrame)
	}
	var err error
	if b.arena, err = shm.NewArena(b.private(), regions...); err != nil {
		return nil, fmt.Errorf("memory of queue %d: %w", queue, err)
	}
	b.mem = b.arena.Bytes()
	for {
		if err = b.bind(d, queue); err == nil {
			break
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return nil, errors.Join(fmt.Errorf("queue %d: %w%s", queue, err, explainBind(err)), b.arena.Close())
		}
		time.Sleep(busyPause)
	}
	b.prepareSend()
	b.prepareRecv()
	return b, nil
}

func (b *binding) bind(d *Device, queue int) (err error) {
	c := xsk.Config{
		Memory: b.mem, Chunk: b.chunk, Headroom: b.headroom, Unaligned: b.guest, Metadata: b.meta,
		Fill: ringSize, Rx: ringSize, Tx: ringSize, Done: ringSize,
	}
	err = d.inNamespace(func() (err error) {
		b.sock, err = xsk.New(c)
		return err
	})
	if err != nil {
		return err
	}
	b.sock.SetSendBuffer(sendBuffer)
	if err := b.sock.Bind(d.ifindex, queue, b.way.flags); err != nil {
		return errors.Join(fmt.Errorf("binding: %w", err), b.sock.Close())
	}
	b.sock.SetBatch(kickBatch)
	return nil
}

// close ends the socket: nothing refers to guest memory when it returns. lost is how many frames it did not send.
func (b *binding) close() (lost int, err error) {
	taken := b.sock.Tx.Taken()
	err = b.sock.Close()
	return b.abandon(taken), errors.Join(err, b.arena.Close())
}

func explainBind(err error) string {
	switch {
	case errors.Is(err, unix.EPERM):
		return ": AF_XDP needs CAP_NET_RAW"
	case errors.Is(err, unix.ENOBUFS):
		return ": more memory than this process may lock: raise LimitMEMLOCK= (ulimit -l), or give it CAP_IPC_LOCK"
	case errors.Is(err, unix.EBUSY):
		return ": another socket has that queue"
	case errors.Is(err, unix.EOPNOTSUPP):
		return ": the driver has no zero-copy AF_XDP: leave mode=zerocopy out"
	case errors.Is(err, unix.EINVAL):
		return ": there is no such queue, or the kernel is too old"
	}
	return ""
}
