// Package null is a device without a wire: it throws away what the guest sends, and makes frames for the guest if it is asked to. It
// measures what everything else costs: Send does not look at a frame's bytes, Recv copies the same frame again and again.
package null

import (
	"fmt"
	"math"
	"sync/atomic"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// Options are what a null device is made of. The zero Options are one queue pair on which no frame ever comes.
type Options struct {
	Pairs       int    // queue pairs; 0 means 1
	ReadHeaders bool   // Send reads the virtio-net header of each frame, as a device with a wire must
	Generate    bool   // frames come as fast as the guest posts buffers
	Size        int    // of a generated frame in bytes, without the virtio-net header, 14 to virtio.MaxFrame; 0 means 60
	Count       uint64 // frames generated on each queue pair; 0 means without end
}

// Device is a null device.
type Device struct {
	readHeaders bool
	queues      []queue
}

// queue is one queue pair. Its fields belong to the receiveq's worker, but for the counter.
type queue struct {
	readHeaders bool
	frame       [][]byte // nil when none are to be made
	left        uint64   // frames still to be made
	dropped     atomic.Uint64
}

const minFrame = 14

// New makes a null device.
func New(o Options) (*Device, error) {
	if o.Size == 0 {
		o.Size = 60
	}
	if o.Size < minFrame || o.Size > virtio.MaxFrame {
		return nil, fmt.Errorf("generated frames of %d bytes, must be %d to %d", o.Size, minFrame, virtio.MaxFrame)
	}
	if o.Pairs < 0 {
		return nil, fmt.Errorf("%d queue pairs", o.Pairs)
	}
	d := &Device{readHeaders: o.ReadHeaders, queues: make([]queue, max(o.Pairs, 1))}
	for i := range d.queues {
		q := &d.queues[i]
		q.readHeaders = o.ReadHeaders
		if o.Generate {
			q.frame, q.left = [][]byte{template(o.Size)}, o.Count
			if o.Count == 0 {
				q.left = math.MaxUint64 // five hundred years at a frame per nanosecond
			}
		}
	}
	return d, nil
}

// template is a broadcast frame of n bytes of the EtherType for experiments (IEEE 802, 0x88b5).
func template(n int) []byte {
	b := make([]byte, n)
	copy(b, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5})
	for i := minFrame; i < n; i++ {
		b[i] = byte(i)
	}
	return b
}

// Capabilities implements netdev.Device.
func (d *Device) Capabilities() netdev.Capabilities {
	return netdev.Capabilities{
		Kind: "null", MaxPairs: len(d.queues), FromGuest: offload.All, ToGuest: offload.All,
		IgnoresHeader: !d.readHeaders, ZeroCopy: "never: nothing is sent",
	}
}

// SetOffloads implements netdev.Device: generated frames need none.
func (d *Device) SetOffloads(offload.Set) error { return nil }

// SetPairs implements netdev.Device.
func (d *Device) SetPairs(int) error { return nil }

// Queue implements netdev.Device.
func (d *Device) Queue(i int) netdev.Queue { return &d.queues[i] }

// Close implements netdev.Device.
func (d *Device) Close() error { return nil }

// Send takes all frames and is done with them.
func (q *queue) Send(bufs []*zerocopy.Buffer) int {
	if q.readHeaders {
		for _, b := range bufs {
			b.HeaderWords()
		}
	}
	zerocopy.ReleaseAll(bufs, zerocopy.Copied)
	return len(bufs)
}

// Reap implements netdev.Queue.
func (q *queue) Reap() {}

// SendFD implements netdev.Queue: there is always room.
func (q *queue) SendFD() int { return -1 }

// Recv makes frames until max, the guest's buffers or the count are used up.
func (q *queue) Recv(p *zerocopy.Posted, max int) (n int, idle bool, err error) {
	if q.frame == nil {
		return 0, true, nil
	}
	for ; n < max; n++ {
		if q.left == 0 {
			return n, true, nil
		}
		if p.WriteNext(0, 0, q.frame[0]) {
			q.left--
			continue
		}
		if r := p.WriteWords(0, 0, q.frame); r != zerocopy.Written {
			if r == zerocopy.TooBig {
				q.dropped.Add(1)
			}
			return n, false, nil // one that never fits waits too, for other buffers: dropping it would be a loop without end
		}
		q.left--
	}
	return n, false, nil
}

// RecvFD implements netdev.Queue: what there is comes without waiting.
func (q *queue) RecvFD() int { return -1 }

// Counters implements netdev.Queue.
func (q *queue) Counters() netdev.Counters { return netdev.Counters{RecvDropped: q.dropped.Load()} }
