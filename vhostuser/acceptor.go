package vhostuser

import (
	"context"
	"fmt"
	"net"
	"sync"
)

// Acceptor is where a back-end's connections come from, one after the other: Listener, Dialer or Connected.
type Acceptor interface {
	// Accept waits for the next front-end. The caller owns the connection and closes it before the next Accept.
	// Errors: the context's; net.ErrClosed when there will be no further connection; others are the host's.
	Accept(ctx context.Context) (*Conn, error)
	// Close releases what the Acceptor holds and wakes up Accept. Connections that Accept returned stay open.
	Close() error
}

// Connected is the Acceptor of a socket that the back-end was started with (--fd): it has that one connection.
type Connected struct {
	mu   sync.Mutex
	conn *Conn
}

// NewConnected makes an Acceptor of a connected UNIX stream socket, whose descriptor it owns from here on, also if it
// returns an error.
func NewConnected(fd int, opts ConnOptions) (*Connected, error) {
	c, err := NewConnFD(fd, opts)
	if err != nil {
		return nil, fmt.Errorf("vhost-user socket: %w", err)
	}
	return &Connected{conn: c}, nil
}

// Accept returns the connection, and net.ErrClosed ever after.
func (a *Connected) Accept(ctx context.Context) (*Conn, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if a.conn == nil {
		return nil, net.ErrClosed
	}
	c := a.conn
	a.conn = nil
	return c, nil
}

// Close closes the connection if nobody has accepted it.
func (a *Connected) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.conn == nil {
		return nil
	}
	err := a.conn.Close()
	a.conn = nil
	return err
}
