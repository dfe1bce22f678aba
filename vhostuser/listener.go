package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/vhostd/vhostd/internal/sys"
)

// ListenOptions are the options of a Listener.
type ListenOptions struct {
	Mode    uint32 // permission bits of the socket; 0 stands for 0600
	Conn    ConnOptions
	Refused func() // if not nil, told each connection that was refused
}

// Listener is the Acceptor of server mode. A device has one front-end: while it is there, all other connections are
// closed at once. One that has connected and said nothing for longer than ConnOptions.PartialTimeout is none: it gives
// way to the next. One goroutine accepts for the Listener's whole life, so that nobody waits unanswered in the backlog,
// and it holds at most one connection that Accept has not returned yet: that of a front-end which came back before the
// back-end had done with its last connection.
type Listener struct {
	sock *net.UnixListener
	file *sys.SocketFile // nil if the path is not ours
	opts ListenOptions

	mu     sync.Mutex
	active *Conn         // the last that Accept returned
	parked *Conn         // the next that it will return
	arrive chan struct{} // buffered: something is parked
	fail   error         // why no more will come; valid when ended is closed
	ended  chan struct{} // the accepting goroutine is gone

	closing sync.Once
	closed  chan struct{}
}

// Listen makes the socket at path and listens on it. The socket has the permissions of the options from the start. A
// socket that is left over from a process that ended is replaced; one that somebody listens on, or a file of another
// kind, is an error.
func Listen(path string, opts ListenOptions) (*Listener, error) {
	if opts.Mode == 0 {
		opts.Mode = 0o600
	}
	sock, file, err := sys.ListenUnix(path, opts.Mode)
	if err != nil {
		return nil, fmt.Errorf("vhost-user socket: %w", err)
	}
	return newListener(sock, file, opts), nil
}

// ListenFD makes a Listener of a listening UNIX stream socket (socket activation), whose descriptor it owns from here
// on, also if it returns an error. The socket's path stays when it is closed.
func ListenFD(fd int, opts ListenOptions) (*Listener, error) {
	sock, err := inheritListener(fd)
	if err != nil {
		return nil, fmt.Errorf("vhost-user socket: %w", err)
	}
	return newListener(sock, nil, opts), nil
}

func newListener(sock *net.UnixListener, file *sys.SocketFile, opts ListenOptions) *Listener {
	l := &Listener{
		sock: sock, file: file, opts: opts,
		arrive: make(chan struct{}, 1), ended: make(chan struct{}), closed: make(chan struct{}),
	}
	go l.run()
	return l
}

// Accept waits for a front-end.
func (l *Listener) Accept(ctx context.Context) (*Conn, error) {
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if c := l.take(); c != nil {
			return c, nil
		}
		select {
		case <-l.arrive:
		case <-ctx.Done():
		case <-l.ended:
			return nil, l.fail
		}
	}
}

func (l *Listener) take() *Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.parked
	if c != nil {
		l.active, l.parked = c, nil
	}
	return c
}

// Close stops listening, removes the socket's path if Listen made it, and closes a connection that nobody accepted. It
// may be called more than once.
func (l *Listener) Close() error {
	var err error
	l.closing.Do(func() {
		close(l.closed)
		err = errors.Join(l.file.Remove(), l.sock.Close())
		<-l.ended
	})
	return err
}

// run accepts until the socket is closed.
func (l *Listener) run() {
	defer close(l.ended)
	defer l.dropParked()
	for delay := time.Duration(0); ; {
		sock, err := l.sock.AcceptUnix()
		switch {
		case err == nil:
			delay = 0
			if l.opts.Conn.admit(sock) != nil {
				continue // it has no say in who is served, and holds nobody up
			}
			l.offer(NewConn(sock, l.opts.Conn))
		case errors.Is(err, net.ErrClosed):
			l.fail = net.ErrClosed
			return
		default: // out of descriptors or memory: it may pass, but not by trying at full speed
			delay = min(max(2*delay, 5*time.Millisecond), time.Second)
			select {
			case <-time.After(delay):
			case <-l.closed:
			}
		}
	}
}

func (l *Listener) dropParked() {
	if c := l.take(); c != nil {
		c.Close()
	}
}

// offer parks a new connection, or refuses it while the device has a front-end.
func (l *Listener) offer(c *Conn) {
	l.mu.Lock()
	if l.parked != nil && l.parked.HungUp() {
		l.parked.Close()
		l.parked = nil
	}
	if l.active != nil && l.active.silent() {
		l.active.Close()
	}
	free := l.parked == nil && (l.active == nil || l.active.HungUp())
	if free {
		l.parked = c
	}
	l.mu.Unlock()
	if free {
		select {
		case l.arrive <- struct{}{}:
		default: // Accept has not seen the last one, and will look at what is parked
		}
		return
	}
	c.Close()
	if l.opts.Refused != nil {
		l.opts.Refused()
	}
}
