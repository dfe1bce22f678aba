package vhosttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// Add adds a frame to a transmitq, unseen by the device until Flush. vring.ErrFull says that chains have to be reaped first.
func (q *Queue) Add(hdr virtio.NetHdr, frame []byte, l Layout) (id uint16, err error) {
	n := q.hdrLen + len(frame)
	if n > q.slotSize() {
		return 0, fmt.Errorf("frame of %d bytes and header of %d, buffers have %d", len(frame), q.hdrLen, q.slotSize())
	}
	s, ok := q.slot()
	if !ok {
		return 0, vring.ErrFull
	}
	b := q.g.Mem.At(q.slots[s], n)
	hdr.Encode(b[:q.hdrLen])
	copy(b[q.hdrLen:], frame)
	return q.add(s, n, l)
}

// Resend adds the first n bytes of a buffer as they are, header included: what was sent in it last, or zeroes. It is the cheapest way to
// load a transmitq.
func (q *Queue) Resend(n int, l Layout) (id uint16, err error) {
	s, ok := q.slot()
	if !ok {
		return 0, vring.ErrFull
	}
	return q.add(s, n, l)
}

// Reap takes back all chains that the device has used, and returns how many.
func (q *Queue) Reap() (n int) {
	for {
		if _, _, ok := q.reap(); !ok {
			return n
		}
		n++
	}
}

// Send adds a frame and flushes, after waiting for room if it must.
func (q *Queue) Send(hdr virtio.NetHdr, frame []byte, l Layout) error {
	for {
		_, err := q.Add(hdr, frame, l)
		if err == nil {
			q.Flush()
			return nil
		}
		if !errors.Is(err, vring.ErrFull) {
			return err
		}
		if q.Reap() > 0 {
			continue
		}
		q.Flush()
		if err := q.Wait(Patience); err != nil {
			return fmt.Errorf("waiting for room: %w", err)
		}
	}
}

// Settle waits until the device has returned every chain of a transmitq.
func (q *Queue) Settle() error {
	for {
		q.Reap()
		if q.Driver.Out() == 0 {
			return q.Driver.Err()
		}
		if err := q.Wait(Patience); err != nil {
			return fmt.Errorf("%d chains are out: %w", q.Driver.Out(), err)
		}
	}
}

// Post posts as many receive buffers as fit; on a transmitq it does nothing.
func (q *Queue) Post() error {
	if q.Transmit() {
		return nil
	}
	for {
		s, ok := q.slot()
		if !ok {
			break
		}
		if _, err := q.add(s, q.slotSize(), q.g.opts.RecvLayout); errors.Is(err, vring.ErrFull) {
			break
		} else if err != nil {
			return err
		}
	}
	q.Flush()
	return nil
}

// Recv receives one frame and posts its buffers anew. Without any it waits up to timeout: 0 is not at all, and ErrTimeout the answer.
func (q *Queue) Recv(timeout time.Duration) (hdr virtio.NetHdr, frame []byte, err error) {
	for {
		hdr, frame, ok, err := q.take()
		if err != nil || ok {
			return hdr, frame, err
		}
		if err := q.Wait(timeout); err != nil {
			return hdr, nil, err
		}
	}
}

// take receives a frame that is there.
func (q *Queue) take() (hdr virtio.NetHdr, frame []byte, ok bool, err error) {
	s, written, ok := q.reap()
	if !ok {
		return hdr, nil, false, q.Driver.Err()
	}
	if int(written) < q.hdrLen {
		return hdr, nil, false, fmt.Errorf("queue %d: %d bytes were written, the header has %d", q.Index, written, q.hdrLen)
	}
	b := q.g.Mem.At(q.slots[s], int(written))
	hdr = virtio.DecodeNetHdr(b[:q.hdrLen])
	frame = append(frame, b[q.hdrLen:]...)
	if err := q.checkBuffers(hdr); err != nil {
		return hdr, nil, false, err
	}
	for i := 1; i < int(hdr.NumBuffers); i++ {
		s, written, ok := q.reap()
		if !ok {
			return hdr, nil, false, fmt.Errorf("queue %d: %d of %d merged buffers are there", q.Index, i, hdr.NumBuffers)
		}
		frame = append(frame, q.g.Mem.At(q.slots[s], int(written))...)
	}
	return hdr, frame, true, q.Post()
}

// checkBuffers checks num_buffers (virtio-v1.2 §5.1.6.4.1).
func (q *Queue) checkBuffers(hdr virtio.NetHdr) error {
	mergeable := q.g.Features.Has(virtio.FNetMrgRxbuf)
	switch n := hdr.NumBuffers; {
	case q.hdrLen < virtio.NetHdrSize:
	case n == 0, n > 1 && !mergeable:
		return fmt.Errorf("queue %d: num_buffers %d, mergeable %v", q.Index, n, mergeable)
	}
	return nil
}

// Drain takes back and posts anew all buffers that were filled, unread, and returns how many.
func (q *Queue) Drain() (n int, err error) {
	if n = q.Reap(); n == 0 {
		return 0, q.Driver.Err()
	}
	return n, q.Post()
}

// MinFrame is the shortest Frame in bytes.
const MinFrame = 14 + 16

// Frame makes a frame of n bytes that CheckFrame knows again: Ethernet, broadcast, with an ethertype for experiments, its number, and
// bytes that depend on it.
func Frame(seq uint64, n int) []byte {
	if n < MinFrame {
		panic(fmt.Sprintf("frame of %d bytes, at least %d", n, MinFrame))
	}
	f := make([]byte, n)
	copy(f, "\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x01\x88\xb5")
	binary.BigEndian.PutUint64(f[14:], seq)
	binary.BigEndian.PutUint64(f[22:], uint64(n))
	x := seq*0x9e3779b97f4a7c15 + 1
	for i := MinFrame; i < n; i++ {
		if i%8 == 6 {
			x ^= x << 13
			x ^= x >> 7
			x ^= x << 17
		}
		f[i] = byte(x >> (8 * (i % 8)))
	}
	return f
}

// CheckFrame returns the number of a frame that Frame made, or what is wrong with it.
func CheckFrame(f []byte) (seq uint64, err error) {
	if len(f) < MinFrame {
		return 0, fmt.Errorf("frame of %d bytes, at least %d", len(f), MinFrame)
	}
	seq = binary.BigEndian.Uint64(f[14:])
	if n := binary.BigEndian.Uint64(f[22:]); n != uint64(len(f)) {
		return seq, fmt.Errorf("frame %d has %d bytes, was sent with %d", seq, len(f), n)
	}
	for i, b := range Frame(seq, len(f)) {
		if f[i] != b {
			return seq, fmt.Errorf("frame %d of %d bytes: byte %d is %#x, was sent as %#x", seq, len(f), i, f[i], b)
		}
	}
	return seq, nil
}
