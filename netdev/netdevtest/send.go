package netdevtest

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/soft"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
	"github.com/vhostd/vhostd/zerocopy"
)

// send has the queue take all of bufs, waiting for room where it must.
func (s *suite) send(q netdev.Queue, bufs ...*zerocopy.Buffer) {
	s.Helper()
	for {
		n := q.Send(bufs)
		if n < 0 || n > len(bufs) {
			s.Fatalf("Send took %d of %d", n, len(bufs))
		}
		bufs = bufs[n:]
		q.Reap()
		if h, ok := q.(netdev.Holder); len(bufs) == 0 && (!ok || !h.Held()) {
			return
		}
		s.await(q.SendFD(), unix.POLLOUT, "SendFD")
	}
}

// expect captures one frame, which must be want.
func (s *suite) expect(want []byte) {
	s.Helper()
	if s.Capture == nil {
		return
	}
	if _, got := s.Capture(); !bytes.Equal(got, want) {
		s.Fatalf("captured %d bytes, want others, %d\n got %.64x\nwant %.64x", len(got), len(want), got, want)
	}
}

func (s *suite) lengths() []int {
	all := []int{14, 15, 16, 59, 60, 61, 63, 64, 65, 127, 128, 129, 1000, 1499, 1500, 1513, 1514}
	for _, n := range []int{1518, 4096, 8999, 9000, 9014, 65535, s.MaxFrame} {
		if n > 1514 && n <= s.MaxFrame {
			all = append(all, n)
		}
	}
	return all
}

func (s *suite) sendLengths() {
	for i, n := range s.lengths() {
		f := Frame(n, uint32(i))
		s.send(s.queue, s.ledger.buffer(virtio.NetHdr{}, f))
		s.expect(f)
	}
}

func (s *suite) sendFragments() {
	f := Frame(min(s.MaxFrame, 1514), 7)
	for n := 1; n <= 64; n++ {
		s.send(s.queue, s.ledger.buffer(virtio.NetHdr{}, split(f, (len(f)+n-1)/n)...))
		s.expect(f)
	}
	small := Frame(100, 8)
	s.send(s.queue, s.ledger.buffer(virtio.NetHdr{}, split(small, 1)...))
	s.expect(small)
	s.send(s.queue, s.ledger.buffer(virtio.NetHdr{}, split(f, 1)...))
	s.expect(f)
}

// split cuts b into fragments of n bytes.
func split(b []byte, n int) (frags [][]byte) {
	for len(b) > n {
		frags = append(frags, b[:n:n])
		b = b[n:]
	}
	return append(frags, b)
}

// sendWindowOrder sends through rings, as a guest does: every chain comes back once, in order, and every frame arrives, in order.
func (s *suite) sendWindowOrder() {
	const total, ring = 500, 64
	g := NewGuest(s, ring, virtio.FVersion1)
	w := zerocopy.NewWindow(g.Ring, virtio.FVersion1, func() {})
	var batch [32]*zerocopy.Buffer
	var unsent []*zerocopy.Buffer
	var out []uint16
	sent, captured, returned := 0, 0, 0
	deadline := time.Now().Add(patience)
	for returned < total {
		for sent < total && g.Driver.Free() >= 8 {
			out = append(out, g.Send(virtio.NetHdr{}, Frame(60+sent%900, uint32(sent)), 12, 20, 400))
			sent++
		}
		if len(unsent) == 0 {
			n, status := w.Pop(batch[:])
			if status == vring.Broken {
				s.Fatal(g.Ring.Err())
			}
			unsent = batch[:n]
		}
		before := len(unsent)
		unsent = unsent[s.queue.Send(unsent):]
		for i := len(unsent); i < before; i++ {
			s.expect(Frame(60+captured%900, uint32(captured)))
			captured++
		}
		s.queue.Reap()
		w.Reap()
		g.Ring.Publish()
		for {
			id, _, ok := g.Driver.Reap()
			if !ok {
				break
			}
			if id != out[returned] {
				s.Fatalf("chain %d came back in place %d, want chain %d", id, returned, out[returned])
			}
			returned++
		}
		if time.Now().After(deadline) {
			s.Fatalf("after %v %d of %d chains came back", patience, returned, total)
		}
	}
	if n := w.Close(); n != 0 {
		s.Errorf("%d chains were still out", n)
	}
}

func (s *suite) sendChecksum() {
	s.needCapture()
	q := soft.Wrap(s.Device).Queue(0)
	for _, i := range []inet{{}, {udp: true}, {v6: true}, {v6: true, udp: true}} {
		for _, i.payload = range []int{1, 2, 333, 1400} {
			hdr, f := i.build(uint32(i.payload))
			s.send(q, s.ledger.buffer(hdr, split(f, 77)...))
			got, err := complete(s.Capture())
			if err != nil || len(got) != 1 || !i.good(got[0]) || !bytes.Equal(got[0][i.headers():], f[i.headers():]) {
				s.Fatalf("%+v arrived as %.80x (%v)", i, got, err)
			}
		}
	}
}

func (s *suite) sendSegments() {
	s.needCapture()
	q := soft.Wrap(s.Device).Queue(0)
	for _, i := range []inet{
		{gso: virtio.GSOTCPv4, size: 1400}, {gso: virtio.GSOTCPv6, v6: true, size: 1401},
		{gso: virtio.GSOUDPL4, udp: true, size: 1000}, {gso: virtio.GSOUDPL4, udp: true, v6: true, size: 999},
	} {
		i.payload = 30001
		hdr, f := i.build(5)
		s.send(q, s.ledger.buffer(hdr, split(f, 4096)...))
		var got []byte
		for len(got) < i.payload {
			segs, err := complete(s.Capture())
			if err != nil {
				s.Fatal(err)
			}
			for _, b := range segs {
				if !i.good(b) || len(b)-i.headers() > i.size {
					s.Fatalf("%+v: segment of %d bytes is wrong: %.80x", i, len(b), b)
				}
				if seq := binary.BigEndian.Uint32(b[i.l4()+4:]); !i.udp && int(seq) != len(got) {
					s.Fatalf("segment with sequence number %d comes after %d bytes", seq, len(got))
				}
				got = append(got, b[i.headers():]...)
			}
		}
		if !bytes.Equal(got, f[i.headers():]) {
			s.Fatalf("%+v: the segments' payload is not the frame's", i)
		}
	}
}

// sendBadOffload sends frames whose headers lie. They may be dropped, and must not take others with them.
func (s *suite) sendBadOffload() {
	q := soft.Wrap(s.Device).Queue(0)
	for _, h := range []virtio.NetHdr{
		{Flags: virtio.NetHdrNeedsCsum, CsumStart: 65535, CsumOffset: 65535},
		{Flags: virtio.NetHdrNeedsCsum, CsumStart: 59, CsumOffset: 0},
		{Flags: virtio.NetHdrNeedsCsum, GSOType: virtio.GSOTCPv4, GSOSize: 0, CsumStart: 34, CsumOffset: 16},
		{Flags: virtio.NetHdrNeedsCsum, GSOType: virtio.GSOTCPv4, GSOSize: 1, CsumStart: 34, CsumOffset: 16},
		{Flags: virtio.NetHdrNeedsCsum, GSOType: virtio.GSOTCPv6 | virtio.GSOECN, GSOSize: 9, CsumStart: 9999, CsumOffset: 16},
		{GSOType: virtio.GSOUDP, GSOSize: 8, HdrLen: 65535},
	} {
		s.send(q, s.ledger.buffer(h, Frame(60, 3)))
	}
	if s.Capture == nil {
		return
	}
	f := Frame(200, 99)
	s.send(q, s.ledger.buffer(virtio.NetHdr{}, f))
	for {
		if _, got := s.Capture(); len(got) == len(f) { // the others have 60 bytes, if they arrive
			if !bytes.Equal(got, f) {
				s.Fatalf("captured %.64x, want %.64x", got, f)
			}
			return
		}
	}
}

// sendBackpressure sends faster than the far end looks.
func (s *suite) sendBackpressure() {
	if !s.Lossless {
		s.Skip("skipped: this device may lose frames when the far end is slow")
	}
	const total = 5000
	captured := 0
	var bufs []*zerocopy.Buffer
	for i := range total {
		bufs = append(bufs, s.ledger.buffer(virtio.NetHdr{}, Frame(100, uint32(i))))
	}
	full := false
	for len(bufs) > 0 {
		n := s.queue.Send(bufs[:min(len(bufs), 64)])
		bufs = bufs[n:]
		if n > 0 || s.Capture == nil {
			continue
		}
		full = true
		for ; captured < total-len(bufs); captured++ {
			s.expect(Frame(100, uint32(captured)))
		}
		s.await(s.queue.SendFD(), unix.POLLOUT, "SendFD")
	}
	for ; s.Capture != nil && captured < total; captured++ {
		s.expect(Frame(100, uint32(captured)))
	}
	s.Logf("%d frames, Send was refused: %v", total, full)
}

func (s *suite) sendAllocates() {
	if s.SendAllocates {
		s.Skip("skipped: this device does not promise to send without allocating")
	}
	const size, warm = 16, 40
	f := Frame(1000, 1)
	var batches [warm + 2][]*zerocopy.Buffer
	for i := range batches {
		for range size {
			batches[i] = append(batches[i], s.ledger.buffer(virtio.NetHdr{}, split(f, 300)...))
		}
	}
	next := 0
	run := func() {
		if n := s.queue.Send(batches[next]); n != size {
			s.Fatalf("Send took %d of %d", n, size)
		}
		next++
	}
	for range warm {
		run()
		for range size {
			s.expect(f)
		}
	}
	if n := testing.AllocsPerRun(1, run); n != 0 {
		s.Errorf("%v allocations in a batch of %d frames", n, size)
	}
}

// sendThenClose closes the device with frames that nobody looked at.
func (s *suite) sendThenClose() {
	for i := range 2000 {
		b := s.ledger.buffer(virtio.NetHdr{}, Frame(500, uint32(i)))
		if s.queue.Send([]*zerocopy.Buffer{b}) == 0 {
			b.Release(zerocopy.Dropped) // not taken: still ours
			break
		}
	}
	s.close()
	s.ledger.check(s.T)
}
