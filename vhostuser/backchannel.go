package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// BackendConn is the back-end's end of the back channel. Its methods may be called from any goroutine and end in
// bounded time; after an error the channel is closed, since an answer could come late and pass for another's.
type BackendConn struct {
	conn     *Conn
	protocol ProtocolFeatures // acked when the channel was set up
	wait     time.Duration    // for an ack
	mu       sync.Mutex       // one request at a time
}

// Close ends the back channel. It may be called more than once.
func (b *BackendConn) Close() error { return b.conn.Close() }

// ConfigChange tells the front-end that the device configuration space has changed. With wait it returns once the
// front-end has dealt with that; then a Handler method must not call it, since many front-ends answer only when their
// own request has been answered.
//
// Errors: ErrNotNegotiated without CONFIG, or with wait and without REPLY_ACK; NACKError.
func (b *BackendConn) ConfigChange(wait bool) error { return b.call(BackendConfigChange, wait) }

func (b *BackendConn) call(req BackendRequest, wait bool) error {
	needs := backChannelTable[req].needs
	if wait {
		needs |= ProtocolReplyAck
	}
	if missing := needs &^ b.protocol; missing != 0 {
		return fmt.Errorf("%v: %w: %v", req, ErrNotNegotiated, missing)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	m := &Message{Request: Request(req), Flags: FlagVersion}
	if wait {
		m.Flags |= FlagNeedReply
	}
	err := b.conn.WriteMessage(m)
	if err == nil && wait {
		err = b.conn.readAck(Request(req), b.wait)
	}
	if err == nil {
		return nil
	}
	if nack := (*NACKError)(nil); !errors.As(err, &nack) {
		b.conn.Close()
	}
	return fmt.Errorf("vhost-user %v: %w", req, err)
}

// BackendHandler is what a front-end does with requests of the back channel.
type BackendHandler interface {
	// ConfigChange learns that the device configuration space has changed.
	ConfigChange() error
}

// ServeBackChannel is the front-end's end of the back channel: it serves requests until the back-end hangs up (nil)
// or the context ends (its error), and closes the connection. A request that fails is answered with a non-zero ack if
// the back-end asked for one, else it is forgotten; a malformed one ends the channel.
func ServeBackChannel(ctx context.Context, c *Conn, h BackendHandler) error {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	for {
		m, err := c.ReadMessage()
		if err == nil {
			err = serveBack(c, h, m)
		}
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET):
			return nil
		default:
			return err
		}
	}
}

func serveBack(c *Conn, h BackendHandler, m *Message) error {
	defer m.CloseFDs()
	req := BackendRequest(m.Request)
	if m.Flags&FlagReply != 0 {
		return fmt.Errorf("vhost-user %v: %w: reply flag on a request", req, ErrProtocol)
	}
	row, known := backChannelTable[req]
	ack := uint64(1)
	if known {
		if err := row.check(m); err != nil {
			return fmt.Errorf("vhost-user %v: %w", req, err)
		}
		if h.ConfigChange() == nil { // the only row
			ack = 0
		}
	}
	if m.Flags&FlagNeedReply == 0 {
		return nil
	}
	return c.WriteMessage(&Message{Request: m.Request, Flags: FlagVersion | FlagReply, Payload: encodeU64(ack)})
}
