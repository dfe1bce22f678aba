package user

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Sizes in bytes. What is read from the host at once becomes one packet to the guest if TCP's windows allow, so it has to fit into one
// with its headers.
const (
	toGuestChunk = 60 << 10
	toHostChunk  = 128 << 10
)

type pumpBuffer [toHostChunk]byte

var pumpBuffers = sync.Pool{New: func() any { return new(pumpBuffer) }}

// pump carries the bytes of one connection between an endpoint of the stack's, which is the guest's peer, and a socket of the host.
// Either direction ends by itself, and is closed by itself; a reset of one side resets the other. A connection that is
// idle holds no buffer.
type pump struct {
	ep   tcpip.Endpoint
	wq   *waiter.Queue
	conn *net.TCPConn
	// linger is how long the guest may take to acknowledge the last bytes.
	linger time.Duration

	failed sync.Once
}

// run returns when both directions have ended, or ctx has. It closes both sides.
func (p *pump) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { p.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	up := make(chan struct{})
	go func() {
		defer close(up)
		if err := p.toHost(ctx); err != nil {
			p.fail()
			return
		}
		p.conn.CloseWrite()
	}()
	if err := p.toGuest(ctx); err != nil {
		p.fail()
	} else if err := p.ep.Shutdown(tcpip.ShutdownWrite); err != nil {
		p.fail()
	}
	<-up
	p.conn.Close()
	closeSlowly(ctx, p.ep, p.linger)
}

// closeSlowly closes ep, and returns when the guest has acknowledged all that was sent to it, or has not for so long that the
// connection is reset: until then the stack holds memory for it, which has to count as a connection.
func closeSlowly(ctx context.Context, ep tcpip.Endpoint, long time.Duration) {
	ep.Close()
	deadline := time.NewTimer(long)
	defer deadline.Stop()
	for pause := time.Millisecond; ; pause = min(2*pause, time.Second) {
		switch tcp.EndpointState(ep.State()) {
		case tcp.StateTimeWait, tcp.StateClose, tcp.StateError:
			return
		}
		select {
		case <-time.After(pause):
		case <-deadline.C:
			ep.Abort()
			return
		case <-ctx.Done():
			return // and the stack is closed next
		}
	}
}

// fail resets both sides, which also ends the other direction.
func (p *pump) fail() {
	p.failed.Do(func() {
		p.conn.SetLinger(0)
		p.conn.Close()
		p.ep.Abort()
	})
}

var errPump = errors.New("the guest's side of the connection has failed")

// toHost carries what the guest sends, until it sends no more.
func (p *pump) toHost(ctx context.Context) error {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr)
	p.wq.EventRegister(&entry)
	defer p.wq.EventUnregister(&entry)
	var w tcpip.SliceWriter
	for {
		if p.ep.Readiness(waiter.ReadableEvents) == 0 {
			select {
			case <-ready:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		buf := pumpBuffers.Get().(*pumpBuffer)
		w = buf[:]
		res, err := p.ep.Read(&w, tcpip.ReadOptions{})
		var werr error
		if err == nil {
			p.ep.ModerateRecvBuf(res.Count)
			_, werr = p.conn.Write(buf[:res.Count])
		}
		pumpBuffers.Put(buf)
		switch err.(type) {
		case nil:
			if werr != nil {
				return werr
			}
		case *tcpip.ErrWouldBlock:
		case *tcpip.ErrClosedForReceive:
			return nil
		default:
			return errPump
		}
	}
}

// toGuest carries what the host's side sends, until it sends no more.
func (p *pump) toGuest(ctx context.Context) error {
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	p.wq.EventRegister(&entry)
	defer p.wq.EventUnregister(&entry)
	rc, err := p.conn.SyscallConn()
	if err != nil {
		return err
	}
	in := lazyReader{chunk: toGuestChunk}
	in.read = in.tryRead
	var data bytes.Reader
	for {
		n, err := in.next(rc)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		err = p.writeGuest(ctx, in.buf[:n], &data, ready)
		in.free()
		if err != nil {
			return err
		}
	}
}

// writeGuest waits while the guest's window, or the stack's buffer, is full.
func (p *pump) writeGuest(ctx context.Context, b []byte, data *bytes.Reader, ready <-chan struct{}) error {
	for len(b) > 0 {
		data.Reset(b)
		n, err := p.ep.Write(data, tcpip.WriteOptions{})
		b = b[n:]
		switch err.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			select {
			case <-ready:
			case <-ctx.Done():
				return ctx.Err()
			}
		default:
			return errPump
		}
	}
	return nil
}

// lazyReader reads from a non-blocking descriptor into a buffer that it takes only when there is something to read.
type lazyReader struct {
	chunk     int
	datagrams bool                  // nothing read is not the end
	read      func(fd uintptr) bool // tryRead, as a value made once
	buf       *pumpBuffer
	n         int
	err       error
}

func (l *lazyReader) tryRead(fd uintptr) bool {
	l.buf = pumpBuffers.Get().(*pumpBuffer)
	for {
		l.n, l.err = unix.Read(int(fd), l.buf[:l.chunk])
		if l.err != unix.EINTR {
			break
		}
	}
	if l.err == nil {
		return true
	}
	l.free()
	return l.err != unix.EAGAIN
}

// next waits for bytes, which are in buf[:n] until free. The end of a stream is io.EOF.
func (l *lazyReader) next(rc syscall.RawConn) (n int, err error) {
	if err := rc.Read(l.read); err != nil {
		return 0, err
	}
	if l.err == nil && l.n == 0 && !l.datagrams {
		l.free()
		return 0, io.EOF
	}
	return l.n, l.err
}

func (l *lazyReader) free() {
	if l.buf != nil {
		pumpBuffers.Put(l.buf)
		l.buf = nil
	}
}
