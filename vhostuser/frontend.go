package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// FrontEnd is the front-end role: one method per request. It asks for an ack to every request once REPLY_ACK is
// negotiated (see NeedReply) and returns a refusal as NACKError. All errors are RequestErrors. Methods may be called
// from any goroutine; they go out one at a time. After a reply that is late or wrong the connection is closed.
// Descriptors that are passed in stay the caller's.
type FrontEnd struct {
	// NeedReply makes requests ask for an ack, and wait for it, when REPLY_ACK is negotiated. New front-ends have it
	// set. Without it errors show only as the end of the connection.
	NeedReply bool
	// ReplyTimeout bounds the wait for a reply.
	ReplyTimeout time.Duration

	conn     *Conn
	mu       sync.Mutex
	protocol ProtocolFeatures // as of the last SetProtocolFeatures
}

// NewFrontEnd makes a front-end on a connection, which it owns from here on.
func NewFrontEnd(c *Conn) *FrontEnd {
	return &FrontEnd{NeedReply: true, ReplyTimeout: DefaultTimeout, conn: c}
}

// Dial connects to a back-end that listens on the path.
func Dial(ctx context.Context, path string) (*FrontEnd, error) {
	c, err := dial(ctx, path, ConnOptions{})
	if err != nil {
		return nil, err
	}
	return NewFrontEnd(c), nil
}

func dial(ctx context.Context, path string, opts ConnOptions) (*Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	sock := c.(*net.UnixConn)
	if err := opts.admit(sock); err != nil {
		return nil, err
	}
	return NewConn(sock, opts), nil
}

// Close ends the connection. It may be called more than once.
func (f *FrontEnd) Close() error { return f.conn.Close() }

// Send sends a message without waiting for anything, and without checking it.
func (f *FrontEnd) Send(m *Message) error { return f.conn.WriteMessage(m) }

// SendRaw sends bytes, and descriptors with the first of them.
func (f *FrontEnd) SendRaw(b []byte, fds []int) error { return f.conn.WriteRaw(b, fds) }

// Receive waits up to ReplyTimeout for a message, whatever it is. The caller owns its descriptors.
func (f *FrontEnd) Receive() (*Message, error) { return f.conn.readMessage(orDefault(f.ReplyTimeout)) }

// call sends a request and returns the payload of its reply, nil if it has none of its own.
func (f *FrontEnd) call(req Request, payload []byte, fds ...int) ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := &Message{Request: req, Flags: FlagVersion, Payload: payload, FDs: fds}
	row := frontEndTable[req]
	if err := row.check(m); err != nil {
		return nil, &RequestError{req, err}
	}
	reply, err := f.exchange(m, row)
	if nack := (*NACKError)(nil); err != nil && !errors.As(err, &nack) {
		f.conn.Close() // a late reply would pass for the next one
	}
	if err != nil {
		return nil, &RequestError{req, err}
	}
	return reply, nil
}

func (f *FrontEnd) exchange(m *Message, row row) ([]byte, error) {
	ack := row.reply == noPayload && f.NeedReply && f.protocol&ProtocolReplyAck != 0
	if ack {
		m.Flags |= FlagNeedReply
	}
	if err := f.conn.WriteMessage(m); err != nil {
		return nil, err
	}
	switch {
	case ack:
		return nil, f.conn.readAck(m.Request, orDefault(f.ReplyTimeout))
	case row.reply == noPayload:
		return nil, nil
	}
	reply, err := f.conn.readReply(m.Request, orDefault(f.ReplyTimeout))
	if err != nil {
		return nil, err
	}
	if m.Request == ReqGetConfig && len(reply) == 0 {
		return nil, &NACKError{}
	}
	return reply, row.reply.checkSize(reply)
}

// readReply waits for the reply to a request and returns its payload. No reply that vhostd knows carries descriptors.
func (c *Conn) readReply(req Request, wait time.Duration) ([]byte, error) {
	m, err := c.readMessage(wait)
	if err != nil {
		return nil, fmt.Errorf("reply: %w", err)
	}
	defer m.CloseFDs()
	switch {
	case m.Flags != FlagVersion|FlagReply:
		return nil, fmt.Errorf("%w: reply with flags %#x, want %#x", ErrProtocol, m.Flags, FlagVersion|FlagReply)
	case m.Request != req:
		return nil, fmt.Errorf("%w: reply to request %d, want %d", ErrProtocol, uint32(m.Request), uint32(req))
	case len(m.FDs) > 0:
		return nil, fmt.Errorf("%w: reply with %d file descriptors", ErrProtocol, len(m.FDs))
	}
	return m.Payload, nil
}

// readAck waits for the ack to a request; one that is not zero is a NACKError.
func (c *Conn) readAck(req Request, wait time.Duration) error {
	p, err := c.readReply(req, wait)
	if err == nil {
		err = u64Payload.checkSize(p)
	}
	if err != nil {
		return err
	}
	if v := native.Uint64(p); v != 0 {
		return &NACKError{v}
	}
	return nil
}

// OpenBackChannel makes the back channel with SET_BACKEND_REQ_FD and returns the front-end's end of it, for
// ServeBackChannel.
func (f *FrontEnd) OpenBackChannel() (*Conn, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, &RequestError{ReqSetBackendReqFD, fmt.Errorf("socketpair: %w", err)}
	}
	defer unix.Close(pair[1])
	mine, err := NewConnFD(pair[0], ConnOptions{})
	if err != nil {
		return nil, &RequestError{ReqSetBackendReqFD, err}
	}
	if _, err := f.call(ReqSetBackendReqFD, nil, pair[1]); err != nil {
		mine.Close()
		return nil, err
	}
	return mine, nil
}
