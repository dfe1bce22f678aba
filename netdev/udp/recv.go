package udp

import (
	"fmt"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/zerocopy"
)

const (
	recvBatch  = 32
	maxBatches = 2       // of datagrams that one call of Recv takes
	recvSize   = 1 << 16 // bytes: no datagram is longer
)

// receiver takes datagrams from outside. It belongs to the receiveq's worker, but for the counters.
type receiver struct {
	fd    int
	mode  Mode
	vni   uint32
	table *table // nil: nothing is learnt
	inbox *sys.Inbox
	next  int // datagrams [next, count) of inbox wait for the guest
	count int
	frags [1][]byte
	// flights have completions that make fd poll as in error, which ends every wait for it until they are taken; nil: there are none.
	flights *flights

	malformed, otherVNI, failed atomic.Uint64
	tooBig                      atomic.Uint64 // frames that the guest's buffers can never take
}

// Recv implements netdev.Queue.
func (q *queue) Recv(p *zerocopy.Posted, limit int) (n int, idle bool, err error) {
	r := &q.recv
	// Datagrams that carry no frame do not count for the caller, who takes n = 0 for the end of something: they are bounded by batches,
	// after which nothing waits here, and the descriptor, if there is more, brings the caller back.
	for batch := 0; ; batch++ {
		for r.next < r.count {
			if n == limit {
				return n, false, nil
			}
			frame := r.open(r.next)
			if frame != nil {
				r.frags[0] = frame
				switch p.WriteWords(0, 0, r.frags[:]) {
				case zerocopy.NoRoom:
					return n, false, nil
				case zerocopy.Written:
					n++
				case zerocopy.TooBig:
					r.tooBig.Add(1)
				}
			}
			r.next++
		}
		if n == limit {
			return n, false, nil
		}
		if batch == maxBatches {
			return n, n == 0, nil
		}
		r.next, r.count = 0, 0
		count, errno := r.inbox.Recv(r.fd)
		if errno != 0 {
			if r.flights != nil {
				r.flights.visit()
			}
			return n, true, r.explain(errno)
		}
		r.count = count
	}
}

// open finds the frame in a datagram, and learns from it; nil when there is none.
func (r *receiver) open(i int) []byte {
	d, from := r.inbox.Datagram(i)
	frame, v := r.mode.frame(d, r.vni)
	switch v {
	case malformed:
		r.malformed.Add(1)
		return nil
	case otherVNI:
		r.otherVNI.Add(1)
		return nil
	}
	if r.table != nil {
		r.table.learn(mac(frame[6:]), from, time.Now())
	}
	return frame
}

// explain tells a descriptor that will never be readable again from the network's passing troubles.
func (r *receiver) explain(errno syscall.Errno) error {
	switch errno {
	case unix.EAGAIN:
		return nil
	case unix.EBADF, unix.ENOTSOCK, unix.EFAULT, unix.EINVAL:
		return fmt.Errorf("receiving datagrams: %w", errno)
	}
	r.failed.Add(1)
	return nil
}

// RecvFD implements netdev.Queue.
func (q *queue) RecvFD() int { return q.recv.fd }
