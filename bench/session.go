package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
)

// session is a connection to a back-end, with all that was handed to it.
type session struct {
	fe       *vhostuser.FrontEnd
	conn     *vhostuser.Conn
	pid      int // of the back-end; 0: it cannot be told
	features virtio.Features
	mem      *memory
	recv     *queue
	send     *queue
	far      *session // with Through: of the other port. Its receiveq is this one's recv, and the other way round

	quit  chan struct{}
	ended chan struct{} // watch has returned
	fault atomic.Pointer[error]
}

// open connects and starts both queues, or those of both ports. Errors name the request that failed.
func open(ctx context.Context, c Config) (*session, error) {
	s, err := start(ctx, c)
	if err != nil {
		return nil, err
	}
	if c.To != "" {
		c.Path = c.To
		if s.far, err = start(ctx, c); err != nil {
			s.close()
			return nil, err
		}
		s.recv, s.far.recv = s.far.recv, s.recv
		err = s.far.introduce(c.patience())
		s.far.ended = make(chan struct{})
		go s.far.watch()
	}
	s.ended = make(chan struct{})
	go s.watch()
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// introduce sends a frame from the address that all others go to, so that a switch knows where that is: to everybody, as a switch holds none of those for one guest
// that has posted no buffer yet.
func (s *session) introduce(patience time.Duration) error {
	buf, ok := s.send.next()
	if !ok {
		return errors.New("transmitq: no room")
	}
	frame := buf[virtio.NetHdrSize : virtio.NetHdrSize+MinFrame]
	writeHead(frame, 0, 0, 0)
	copy(frame, "\xff\xff\xff\xff\xff\xff")
	copy(frame[6:], addresses[:6])
	if _, err := s.send.add(virtio.NetHdrSize + MinFrame); err != nil {
		return fmt.Errorf("transmitq: %w", err)
	}
	s.send.flush()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if _, _, _, ok := s.send.reap(); ok {
			return nil
		}
		time.Sleep(time.Millisecond)
	}
	return errors.New("the other port's back-end takes no frame")
}

// start connects and starts both queues.
func start(ctx context.Context, c Config) (_ *session, err error) {
	sock, err := connect(ctx, c)
	if err != nil {
		return nil, err
	}
	s := &session{pid: peer(sock), conn: vhostuser.NewConn(sock, vhostuser.ConnOptions{}), quit: make(chan struct{}), ended: make(chan struct{})}
	s.fe = vhostuser.NewFrontEnd(s.conn)
	close(s.ended)
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if err := s.negotiate(c); err != nil {
		return nil, explain(err)
	}
	if err := s.share(c); err != nil {
		return nil, explain(err)
	}
	return s, nil
}

// explain puts the end of a connection into words.
func explain(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
		return fmt.Errorf("the back-end has hung up (%w): it serves another front-end, or its log says more", err)
	}
	return err
}

// connect dials, or listens and waits until a back-end does.
func connect(ctx context.Context, c Config) (*net.UnixConn, error) {
	if err := sys.CheckPath(c.Path); err != nil {
		return nil, err
	}
	if !c.Server {
		var d net.Dialer
		sock, err := d.DialContext(ctx, "unix", c.Path)
		if err != nil {
			return nil, fmt.Errorf("no back-end listens on %s: %w", c.Path, err)
		}
		return sock.(*net.UnixConn), nil
	}
	l, file, err := sys.ListenUnix(c.Path, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = errors.Join(file.Remove(), l.Close()) }()
	defer context.AfterFunc(ctx, func() { _ = l.SetDeadline(time.Unix(1, 0)) })()
	sock, err := l.AcceptUnix()
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("no back-end connected to %s: %w", c.Path, ctx.Err())
	}
	return sock, err
}

// peer is the process at the other end.
func peer(sock *net.UnixConn) (pid int) {
	raw, err := sock.SyscallConn()
	if err != nil {
		return 0
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}

// negotiate accepts features.
func (s *session) negotiate(c Config) error {
	offered, err := s.fe.GetFeatures()
	if err != nil {
		return err
	}
	if s.features, err = c.features(virtio.Features(offered)); err != nil {
		return err
	}
	if s.features.Has(virtio.FProtocolFeatures) {
		protocol, err := s.fe.GetProtocolFeatures()
		if err != nil {
			return err
		}
		if err := s.fe.SetProtocolFeatures(protocol & vhostuser.ProtocolReplyAck); err != nil {
			return err
		}
	}
	if err := s.fe.SetOwner(); err != nil {
		return err
	}
	return s.fe.SetFeatures(uint64(s.features))
}

// share makes guest memory with both queues in it and hands them over.
func (s *session) share(c Config) (err error) {
	recv, send := c.layout(c.recvSize()), c.layout(virtio.NetHdrSize+c.longest())
	if s.mem, err = newMemory(recv.bytes()+send.bytes(), c.Huge); err != nil {
		return err
	}
	if s.recv, err = newQueue(s.mem, receiveq, recv, s.features); err != nil {
		return err
	}
	if s.send, err = newQueue(s.mem, transmitq, send, s.features); err != nil {
		return err
	}
	if err := s.fe.SetMemTable([]vhostuser.MemoryRegion{s.mem.region()}, []int{s.mem.fd}); err != nil {
		return err
	}
	enable := s.features.Has(virtio.FProtocolFeatures)
	if err := errors.Join(s.recv.start(s.fe, enable), s.send.start(s.fe, enable)); err != nil {
		return err
	}
	_, err = s.fe.GetFeatures() // answered when all before has been served, acks or not
	return err
}

// watch notes a connection that ends, and a queue that the back-end gives up.
func (s *session) watch() {
	defer close(s.ended)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-s.quit:
			return
		case <-tick.C:
		}
		var err error
		switch {
		case s.conn.HungUp():
			err = errors.New("the back-end has hung up")
		case s.send.broken.Drain():
			err = errors.New("the back-end says that the transmitq is broken")
		case s.recv.broken.Drain():
			err = errors.New("the back-end says that the receiveq is broken")
		}
		if err != nil {
			s.fault.Store(&err)
			return
		}
	}
}

// err is what ended the session, or nil.
func (s *session) err() error {
	if err := s.fault.Load(); err != nil {
		return *err
	}
	if s.far != nil {
		return s.far.err()
	}
	return nil
}

// stop ends the queues. When it returns nil the back-end has let go of guest memory.
func (s *session) stop() error {
	for _, q := range []*queue{s.recv, s.send} {
		if _, err := s.fe.GetVringBase(q.index); err != nil {
			return explain(err)
		}
	}
	if s.far != nil {
		return s.far.stop()
	}
	return nil
}

func (s *session) close() {
	if s.far != nil {
		defer s.far.close()
	}
	close(s.quit)
	<-s.ended
	_ = s.fe.Close()
	for _, q := range []*queue{s.recv, s.send} {
		if q != nil {
			q.close()
		}
	}
	if s.mem != nil {
		s.mem.close()
	}
}
