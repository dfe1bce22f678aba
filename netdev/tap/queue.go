package tap

import "github.com/vhostd/vhostd/netdev"

// queue is one descriptor of a tap. Its two directions are driven by two workers, so they stay off each other's cache lines.
type queue struct {
	fd       int
	hdr      int // bytes of the kernel's virtio-net header: hdrSize, or 0
	detached bool
	_        [64]byte
	send     sender
	_        [64]byte
	recv     receiver
}

var _ netdev.Queue = (*queue)(nil)

func newQueue(fd, hdr int) *queue {
	return &queue{fd: fd, hdr: hdr, recv: receiver{want: minWant, stage: make([]byte, stageSize)}}
}

// Counters: see netdev.Queue.
func (q *queue) Counters() netdev.Counters {
	return netdev.Counters{SendDropped: q.send.dropped.Load(), RecvDropped: q.recv.lost.Load()}
}
