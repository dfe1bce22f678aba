package user

import (
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// recvBatch is how many packets Recv takes from the outbox under one lock.
const recvBatch = 64

// queue is one queue pair.
type queue struct {
	dev *Device
	out *outbox

	// The receiveq worker's.
	batch   [recvBatch]*stack.PacketBuffer
	next, n int // batch[next:n] wait
	frags   [][]byte
	tooBig  atomic.Uint64
	refused atomic.Uint64 // the transmitq worker's, read by others
}

var _ netdev.Queue = (*queue)(nil)

// Send copies the frames. All of them are taken: the guest's TCP sees its window close when the host is slower, and datagrams
// that a socket has no room for are lost, as on any wire.
func (q *queue) Send(bufs []*zerocopy.Buffer) int {
	start := 0
	for i, b := range bufs {
		if q.dev.ingress.frame(b) {
			continue
		}
		q.refused.Add(1)
		zerocopy.ReleaseAll(bufs[start:i], zerocopy.Copied)
		zerocopy.ReleaseAll(bufs[i:i+1], zerocopy.Dropped)
		start = i + 1
	}
	zerocopy.ReleaseAll(bufs[start:], zerocopy.Copied)
	return len(bufs)
}

func (q *queue) Reap()       {}
func (q *queue) SendFD() int { return -1 }
func (q *queue) RecvFD() int { return q.out.wake.FD() }

// Counters: what the guest sent that a router refuses, and what did not fit into the outbox or the guest's buffers.
func (q *queue) Counters() netdev.Counters {
	return netdev.Counters{SendDropped: q.refused.Load(), RecvDropped: q.out.dropped.Load() + q.tooBig.Load()}
}

// writer is what Recv needs of zerocopy.Posted.
type writer interface {
	Write(hdr virtio.NetHdr, frags [][]byte) zerocopy.WriteResult
}

func (q *queue) Recv(p *zerocopy.Posted, max int) (n int, idle bool, err error) {
	n, idle = recv(q, p, max)
	return n, idle, nil
}

// recv is generic to keep the call of Write direct.
func recv[W writer](q *queue, w W, max int) (n int, idle bool) {
	for n < max {
		if q.next == q.n {
			q.next, q.n = 0, q.out.take(q.batch[:min(max-n, recvBatch)])
			if q.n == 0 {
				return n, true
			}
		}
		pkt := q.batch[q.next]
		hdr := q.dev.link.netHdr(pkt)
		switch w.Write(hdr, q.fragments(pkt)) {
		case zerocopy.NoRoom:
			return n, false
		case zerocopy.TooBig:
			q.tooBig.Add(1)
		case zerocopy.Written:
			n++
		}
		q.batch[q.next] = nil
		q.next++
		pkt.DecRef()
	}
	return n, false
}

// fragments are the pieces of the packet, good until the next call.
func (q *queue) fragments(pkt *stack.PacketBuffer) [][]byte {
	q.frags = q.frags[:0]
	views, skip := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		q.frags = append(q.frags, b[skip:])
		skip = 0
	}
	return q.frags
}

// flush drops what the worker has not delivered. The worker does not run.
func (q *queue) flush() {
	for _, pkt := range q.batch[q.next:q.n] {
		pkt.DecRef()
		q.tooBig.Add(1)
	}
	clear(q.batch[:])
	q.next, q.n = 0, 0
}

// netHdr describes a packet of the stack's as virtio-net does (virtio-v1.2 §5.1.6.2).
func (l *link) netHdr(pkt *stack.PacketBuffer) virtio.NetHdr {
	gso := &pkt.GSOOptions
	if !gso.NeedsCsum {
		// The stack has computed the checksums itself.
		if l.takes().Has(offload.Csum) {
			return virtio.NetHdr{Flags: virtio.NetHdrDataValid}
		}
		return virtio.NetHdr{}
	}
	start := len(pkt.LinkHeader().Slice()) + len(pkt.NetworkHeader().Slice())
	h := virtio.NetHdr{
		Flags:      virtio.NetHdrNeedsCsum,
		HdrLen:     uint16(start + len(pkt.TransportHeader().Slice())),
		CsumStart:  uint16(start),
		CsumOffset: gso.CsumOffset,
	}
	if pkt.Size()-int(h.HdrLen) <= int(gso.MSS) {
		return h
	}
	switch gso.Type {
	case stack.GSOTCPv4:
		h.GSOType, h.GSOSize = virtio.GSOTCPv4, gso.MSS
	case stack.GSOTCPv6:
		h.GSOType, h.GSOSize = virtio.GSOTCPv6, gso.MSS
	}
	return h
}

// Sizes in bytes of the pieces that frames are copied into. The stack copies a piece that it shares when it looks at a header in it,
// so those of a large segment are apart from its payload.
const (
	headerPiece = 192      // holds Ethernet, IP and TCP headers with all their options
	otherPiece  = 32 << 10 // of a large segment's payload; cleared before it is written: in the cache
)

// copyIn returns the frame as a packet of private memory, its link header not parsed yet.
func copyIn(b *zerocopy.Buffer, hdr *virtio.NetHdr) *stack.PacketBuffer {
	left := b.Len()
	piece := left // what is decided on a frame may take all of it: its checksum
	if hdr.GSOType != virtio.GSONone {
		piece = min(left, headerPiece)
	}
	var payload buffer.Buffer
	v := buffer.NewView(piece)
	room := piece
	for _, seg := range b.Segs() {
		for m := seg.Mem; len(m) > 0; {
			if room == 0 {
				payload.Append(v)
				room = min(left, otherPiece)
				v = buffer.NewView(room)
			}
			n := min(len(m), room)
			v.Write(m[:n])
			m, room, left = m[n:], room-n, left-n
		}
	}
	payload.Append(v)
	return stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: payload})
}
