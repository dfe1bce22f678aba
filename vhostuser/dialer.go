package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
)

// Limits of a Dialer's wait between two attempts.
const (
	MinDialDelay = 20 * time.Millisecond
	MaxDialDelay = time.Second
)

// DialOptions are the options of a Dialer.
type DialOptions struct {
	Conn    ConnOptions
	Waiting func(err error) // if not nil, told the first failure of each wait
}

// Dialer is the Acceptor of client mode: the front-end listens, vhostd connects, and connects again when the
// connection has ended. It tries as long as nobody listens, at growing intervals from MinDialDelay to MaxDialDelay. A
// connection that ends soon counts as a failure, so that a front-end which hangs up at once costs no more than one that
// is not there.
type Dialer struct {
	path   string
	opts   DialOptions
	delay  time.Duration // before the next attempt; 0 for the first
	last   time.Time     // the last connection was made
	closed context.Context
	close  context.CancelFunc
}

// NewDialer makes a Dialer for a socket path. One goroutine may use Accept at a time.
func NewDialer(path string, opts DialOptions) (*Dialer, error) {
	if err := sys.CheckPath(path); err != nil {
		return nil, err
	}
	d := &Dialer{path: path, opts: opts}
	d.closed, d.close = context.WithCancel(context.Background())
	return d, nil
}

// Accept connects, waiting for the front-end's socket to be there. Failures other than "nobody listens there (yet)"
// are returned: they need somebody to do something about them.
func (d *Dialer) Accept(ctx context.Context) (*Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(d.closed, cancel)()
	if !d.last.IsZero() && time.Since(d.last) > MaxDialDelay {
		d.delay = 0
	}
	for told := false; ; {
		if err := d.pause(ctx); err != nil {
			return nil, d.ended(err)
		}
		c, err := dial(ctx, d.path, d.opts.Conn)
		if err == nil {
			d.last = time.Now()
			return c, nil
		}
		if ctx.Err() != nil {
			return nil, d.ended(ctx.Err())
		}
		if !nobodyListens(err) {
			return nil, fmt.Errorf("vhost-user socket: %w", err)
		}
		if !told && d.opts.Waiting != nil {
			d.opts.Waiting(err)
		}
		told = true
	}
}

// pause waits before an attempt, and makes the next wait longer.
func (d *Dialer) pause(ctx context.Context) error {
	delay := d.delay
	d.delay = min(max(2*delay, MinDialDelay), MaxDialDelay)
	if delay == 0 {
		return ctx.Err()
	}
	t := time.NewTimer(delay)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *Dialer) ended(err error) error {
	if d.closed.Err() != nil {
		return net.ErrClosed
	}
	return err
}

// Close ends the attempts.
func (d *Dialer) Close() error {
	d.close()
	return nil
}

func nobodyListens(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) || // no socket, no process behind it
		errors.Is(err, unix.EAGAIN) // its backlog is full
}
