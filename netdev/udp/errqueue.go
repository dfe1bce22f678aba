package udp

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/zerocopy"
)

// errorQueueEngine sends with MSG_ZEROCOPY, and reads from the sockets' error queues when the kernel is done with the pages: for hosts without
// io_uring.
type errorQueueEngine struct {
	socks []*pageSocket
	epoll int               // readable while any of socks has something to tell
	ready []unix.EpollEvent // reap's own
	queue sys.ErrorQueue
}

// pageSocket is a socket that sends pages. The kernel numbers such sends one by one.
type pageSocket struct {
	fd    int            // the device's
	errs  int            // the same socket, open for as long as a send is in flight: completions are lost with it
	next  uint32         // number of the next send
	slots map[uint32]int // by number: what is in flight
	limit int            // sends in flight that were too many; 0: unknown
}

// newErrorQueueEngine prepares sockets, which stay the caller's to close.
func newErrorQueueEngine(fds []int) (*errorQueueEngine, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	e := &errorQueueEngine{epoll: epoll, ready: make([]unix.EpollEvent, len(fds))}
	for _, fd := range fds {
		if err := e.add(fd); err != nil {
			return nil, errors.Join(err, e.close())
		}
	}
	return e, nil
}

// add prepares one socket.
func (e *errorQueueEngine) add(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1); err != nil {
		return fmt.Errorf("SO_ZEROCOPY, which needs Linux 5.0: %w", err)
	}
	errs, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("duplicating a socket: %w", err)
	}
	e.socks = append(e.socks, &pageSocket{fd: fd, errs: errs, slots: map[uint32]int{}})
	ev := unix.EpollEvent{Fd: int32(len(e.socks) - 1)} // errors always count
	if err := unix.EpollCtl(e.epoll, unix.EPOLL_CTL_ADD, errs, &ev); err != nil {
		return fmt.Errorf("epoll of a socket: %w", err)
	}
	return nil
}

func (e *errorQueueEngine) send(f *flights, p *pageSends) (refused uint64) {
	for i := 0; i < p.msgs.Len(); {
		s, end := e.sock(p.fds[i]), i+1
		for end < p.msgs.Len() && p.fds[end] == s.fd {
			end++
		}
		for i < end {
			n, r := e.sendSome(f, s, p, i, end)
			i, refused = i+n, refused+r
		}
	}
	return refused + e.reap(f)
}

func (e *errorQueueEngine) sock(fd int) *pageSocket {
	for _, s := range e.socks {
		if s.fd == fd {
			return s
		}
	}
	panic(fmt.Sprintf("bug: descriptor %d is none of the sockets that send pages", fd))
}

// sendSome sends at least the first of datagrams [i, end) of one socket, in whatever way, and returns how many it did.
func (e *errorQueueEngine) sendSome(f *flights, s *pageSocket, p *pageSends, i, end int) (n int, refused uint64) {
	if s.full() {
		if e.drain(f, s); s.full() {
			return 1, e.sendCopy(f, s, p, i)
		}
	}
	if s.limit > 0 {
		end = min(end, i+s.limit-len(s.slots))
	}
	before := len(s.slots)
	n, errno := p.msgs.SendPages(s.fd, i, end)
	for j := range n {
		s.slots[s.next] = p.slots[i+j]
		s.next++
	}
	if n == end-i {
		return n, 0
	}
	// The kernel may have numbered a send that it refused: then it has let go of the pages at once, and says so.
	e.drain(f, s)
	switch {
	case n > 0: // why the next was refused is not said: try it alone
		return n, 0
	case errno == unix.ENOBUFS && len(s.slots) < before:
		return 0, 0 // there is room again
	case errno == unix.ENOBUFS:
		s.limit = len(s.slots)
		return 1, e.sendCopy(f, s, p, i)
	}
	f.throttle.giveBack()
	f.end(p.slots[i], zerocopy.Dropped)
	return 1, 1
}

// full reports whether the kernel is known to refuse another send for the number of those in flight.
func (s *pageSocket) full() bool { return s.limit > 0 && len(s.slots) >= s.limit }

// sendCopy sends a datagram with a copy, where the kernel's limits on what is in flight leave it no other way: in its turn, and not lost.
func (e *errorQueueEngine) sendCopy(f *flights, s *pageSocket, p *pageSends, i int) (refused uint64) {
	f.limited++
	if s.limit == 0 {
		f.throttle.report(true) // nothing in flight, and refused all the same
	} else {
		f.throttle.giveBack()
	}
	if p.msgs.SendOne(s.fd, i) != 0 {
		f.end(p.slots[i], zerocopy.Dropped)
		return 1
	}
	f.end(p.slots[i], zerocopy.CopiedCap)
	return 0
}

func (e *errorQueueEngine) poke() {}

// reap asks in one system call which sockets have something to tell.
func (e *errorQueueEngine) reap(f *flights) uint64 {
	n, _ := unix.EpollWait(e.epoll, e.ready, 0) // an error, a signal's, leaves it for the next time
	for i := range max(n, 0) {
		e.drain(f, e.socks[e.ready[i].Fd])
	}
	return 0
}

// drain reads all completions of a socket.
func (e *errorQueueEngine) drain(f *flights, s *pageSocket) {
	for more := true; more; {
		var list []sys.Completions
		list, more, _ = e.queue.Recv(s.errs) // what an error leaves there is found the next time
		for _, c := range list {
			s.complete(c, func(slot int) { f.done(slot, c.Copied) })
		}
	}
	if len(s.slots) == 0 {
		s.limit = 0 // it may have been raised
	}
}

// complete calls done for the slots of sends that are complete.
func (s *pageSocket) complete(c sys.Completions, done func(slot int)) {
	for n := c.Lo; ; n++ {
		if slot, ok := s.slots[n]; ok {
			delete(s.slots, n)
			done(slot)
		}
		if n == c.Hi {
			break
		}
	}
	// Numbers from next on belong to sends that the kernel refused after it had counted them.
	if ahead := c.Hi - s.next; int32(ahead) >= 0 {
		s.next = c.Hi + 1
	}
}

func (e *errorQueueEngine) fd() int { return e.epoll }

func (e *errorQueueEngine) close() error {
	var errs []error
	for _, s := range e.socks {
		errs = append(errs, unix.Close(s.errs))
	}
	e.socks = nil
	return errors.Join(append(errs, unix.Close(e.epoll))...)
}
