package vhostuser

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
)

// DefaultTimeout is used for every time limit that is left at zero.
const DefaultTimeout = 10 * time.Second

// ConnOptions are the time limits of a connection, for which zero stands for DefaultTimeout, and who may be at its other end.
type ConnOptions struct {
	PartialTimeout time.Duration // from the first byte of a message to its last
	WriteTimeout   time.Duration // to send one message

	// Admit, if not nil, is asked about the peer before anything is read. After an error the connection is closed.
	Admit func(sys.Peer) error
}

// admit closes sock unless its peer may be there.
func (o ConnOptions) admit(sock *net.UnixConn) error {
	if o.Admit == nil {
		return nil
	}
	peer, err := sys.PeerOf(sock)
	if err == nil {
		err = o.Admit(peer)
	}
	if err != nil {
		_ = aside(sock.Close) // with what the peer has sent by now
	}
	return err
}

func orDefault(d time.Duration) time.Duration {
	if d <= 0 {
		return DefaultTimeout
	}
	return d
}

// Conn sends and receives messages over a UNIX stream socket. One goroutine may read while others write and close.
type Conn struct {
	sock    *net.UnixConn
	partial time.Duration
	write   time.Duration

	born  time.Time
	heard atomic.Bool // a message has come

	writing sync.Mutex // one message at a time

	closing sync.Once
	closed  chan struct{}
	err     error // of the socket's close
}

// NewConn makes a Conn of a connected UNIX stream socket, which it owns from here on.
func NewConn(sock *net.UnixConn, opts ConnOptions) *Conn {
	return &Conn{
		sock:    sock,
		born:    time.Now(),
		partial: orDefault(opts.PartialTimeout),
		write:   orDefault(opts.WriteTimeout),
		closed:  make(chan struct{}),
	}
}

// NewConnFD makes a Conn of a descriptor, which it owns from here on, also if it returns an error: the descriptor is
// not a connected UNIX stream socket.
func NewConnFD(fd int, opts ConnOptions) (*Conn, error) {
	f := os.NewFile(uintptr(fd), "vhost-user socket")
	if f == nil {
		return nil, fmt.Errorf("file descriptor %d: %w", fd, os.ErrInvalid)
	}
	defer aside(f.Close)      // it may be anything, and a front-end's
	c, err := net.FileConn(f) // duplicates, close-on-exec and non-blocking
	if err != nil {
		return nil, fmt.Errorf("file descriptor %d is not a connected socket: %w", fd, err)
	}
	sock, ok := c.(*net.UnixConn)
	if !ok || sock.LocalAddr().Network() != "unix" || sock.RemoteAddr() == nil {
		_ = aside(c.Close)
		return nil, fmt.Errorf("file descriptor %d is not a connected UNIX stream socket", fd)
	}
	if err := opts.admit(sock); err != nil {
		return nil, err
	}
	return NewConn(sock, opts), nil
}

// Close ends the connection and wakes up whoever reads or writes. It may be called more than once. Where the peer has sent what closes slowly, it takes a moment,
// and the socket may be there for longer; but either end knows from then on that this one has hung up.
func (c *Conn) Close() error {
	c.closing.Do(func() {
		close(c.closed)
		_ = c.sock.CloseWrite()
		c.err = aside(c.closeSock)
	})
	return c.err
}

// closeSock closes the socket. Go has the last user of a descriptor close it, which may be somebody who reads: a duplicate sees to it that the socket goes here, and what is
// unread with it.
func (c *Conn) closeSock() error {
	last := -1
	if raw, err := c.sock.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { last, _ = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	}
	err := c.sock.Close()
	if last >= 0 {
		_ = unix.Close(last)
	}
	return err
}

// Closed is closed when Close has been called.
func (c *Conn) Closed() <-chan struct{} { return c.closed }

func (c *Conn) isClosed() bool {
	select {
	case <-c.closed:
		return true
	default:
		return false
	}
}

// HungUp tells, without waiting, whether either end has closed the connection. Messages may still be left to read.
func (c *Conn) HungUp() bool {
	if c.isClosed() {
		return true
	}
	raw, err := c.sock.SyscallConn()
	if err != nil {
		return true
	}
	hungUp := true
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		_, err := unix.Poll(p, 0)
		hungUp = err == nil && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
	})
	return err != nil || hungUp
}

// ReadMessage waits, for as long as it takes, for the next message and reads it whole. The caller owns the message
// and its descriptors.
//
// Errors: io.EOF if the peer hung up between messages, net.ErrClosed after Close, ErrProtocol for what the framing
// does not allow, os.ErrDeadlineExceeded for a message left unfinished. After any error the stream is out of step and
// the Conn is of no further use but to be closed. No descriptor stays open.
func (c *Conn) ReadMessage() (*Message, error) { return c.readMessage(0) }

// readMessage is ReadMessage with a limit for the wait for the first byte; 0 is none.
func (c *Conn) readMessage(wait time.Duration) (*Message, error) {
	var start time.Time // zero: no deadline
	if wait > 0 {
		start = time.Now().Add(wait)
	}
	if err := c.sock.SetReadDeadline(start); err != nil {
		return nil, err
	}
	r := reader{conn: c}
	m, err := r.message()
	if err != nil {
		CloseFDs(r.fds)
		return nil, err
	}
	c.heard.Store(true)
	received()
	return m, nil
}

// silent tells that nothing has come for as long as a message may take: whoever connected says nothing.
func (c *Conn) silent() bool { return !c.heard.Load() && time.Since(c.born) > c.partial }

// reader collects one message.
type reader struct {
	conn *Conn
	got  int   // bytes of this message so far
	fds  []int // that came with its first bytes
}

func (r *reader) message() (*Message, error) {
	var hdr [HeaderSize]byte
	if err := r.full(hdr[:]); err != nil {
		return nil, err
	}
	h, err := DecodeHeader(hdr[:])
	if err != nil {
		return nil, &RequestError{h.Request, err}
	}
	m := &Message{Request: h.Request, Flags: h.Flags, Payload: make([]byte, h.Size)}
	if err := r.full(m.Payload); err != nil {
		return nil, &RequestError{h.Request, err}
	}
	m.FDs = r.fds
	return m, nil
}

// full fills b, however small the pieces are.
func (r *reader) full(b []byte) error {
	for len(b) > 0 {
		first := r.got == 0
		n, err := r.some(b)
		r.got += n
		b = b[n:]
		if err != nil {
			return r.explain(err)
		}
		if first && r.got > 0 {
			if err := r.conn.sock.SetReadDeadline(time.Now().Add(r.conn.partial)); err != nil {
				return err
			}
		}
	}
	return nil
}

// mostFDs is how many descriptors may come with one write to a socket (SCM_MAX_FD of Linux). There is room for all of them, though a message has MaxFDs at most:
// what there is none for the kernel closes itself, within the read, and a close can wait (see aside).
const mostFDs = 253

// some reads what there is, and takes in its descriptors. Those are legal with the first bytes only.
func (r *reader) some(b []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(mostFDs*4))
	n, oobn, flags, _, err := r.conn.sock.ReadMsgUnix(b, oob) // descriptors arrive close-on-exec
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if n, oobn, flags = r.arrived(b, oob); n > 0 {
			err = nil
		}
	}
	n, oobn = max(n, 0), max(oobn, 0) // -1 with some errors
	fds, perr := parseFDs(oob[:oobn])
	late := r.got > 0 && len(fds) > 0
	r.fds = append(r.fds, fds...)
	switch {
	case err != nil:
		return n, err
	case flags&unix.MSG_CTRUNC != 0: // there are no numbers for more
		return n, fmt.Errorf("%w: file descriptors were cut off", ErrProtocol)
	case len(fds) > MaxFDs:
		return n, fmt.Errorf("%w: more than %d file descriptors", ErrProtocol, MaxFDs)
	case perr != nil:
		return n, fmt.Errorf("%w: ancillary data: %w", ErrProtocol, perr)
	case late:
		return n, fmt.Errorf("%w: file descriptors in the middle of a message", ErrProtocol)
	}
	return n, nil
}

// arrived reads what has arrived by now. On a host that is busy the time for a message can be over before this process has come to read the rest of it, which
// is no fault of the peer's. What has not arrived then is late.
func (r *reader) arrived(b, oob []byte) (n, oobn, flags int) {
	raw, err := r.conn.sock.SyscallConn()
	if err != nil {
		return 0, 0, 0
	}
	_ = raw.Control(func(fd uintptr) {
		n, oobn, flags, _, _ = unix.Recvmsg(int(fd), b, oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	})
	return n, oobn, flags
}

// room sends what there is room for by now, and returns how many bytes that is: to writing what arrived is to reading.
func (c *Conn) room(b, oob []byte) (n int) {
	raw, err := c.sock.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) {
		n, _ = unix.SendmsgN(int(fd), b, oob, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	})
	return max(n, 0)
}

// explain tells the end of the stream between two messages from one within a message, and names what was missing.
func (r *reader) explain(err error) error {
	switch {
	case r.got == 0:
		return err
	case errors.Is(err, io.EOF):
		return fmt.Errorf("%w: connection closed after %d bytes of a message", io.ErrUnexpectedEOF, r.got)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("message unfinished after %d bytes and %v: %w", r.got, r.conn.partial, err)
	}
	return err
}

// parseFDs returns the descriptors in received ancillary data.
func parseFDs(oob []byte) (fds []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	for _, m := range msgs {
		if m.Header.Level != unix.SOL_SOCKET || m.Header.Type != unix.SCM_RIGHTS {
			continue
		}
		some, perr := unix.ParseUnixRights(&m)
		fds = append(fds, some...)
		err = errors.Join(err, perr)
	}
	return fds, err
}

// WriteMessage sends a message; its descriptors stay the caller's. Nothing about it is checked. If it cannot be sent
// within the write timeout, the connection is closed: part of it may have gone out.
func (c *Conn) WriteMessage(m *Message) error { return c.WriteRaw(m.Encode(), m.FDs) }

// WriteRaw sends bytes, and descriptors with the first of them, as they are. Otherwise it is as WriteMessage.
func (c *Conn) WriteRaw(b []byte, fds []int) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	sending()
	err := c.writeAll(b, fds)
	if err != nil && c.isClosed() {
		err = net.ErrClosed // and not how far that has come
	}
	if err != nil {
		c.Close()
	}
	return err
}

// writeAll sends in one piece if the socket takes it: some front-ends do not put replies together again.
func (c *Conn) writeAll(b []byte, fds []int) error {
	if err := c.sock.SetWriteDeadline(time.Now().Add(c.write)); err != nil {
		return err
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	for len(b) > 0 {
		n, _, err := c.sock.WriteMsgUnix(b, oob, nil)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			if n = c.room(b, oob); n == 0 {
				return fmt.Errorf("peer does not read: %d bytes not sent within %v: %w", len(b), c.write, err)
			}
		} else if err != nil {
			return err
		}
		b, oob = b[n:], nil
	}
	return nil
}
