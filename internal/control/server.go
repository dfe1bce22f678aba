package control

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vhostd/vhostd/internal/sys"
)

// Server answers requests on a UNIX socket until it is closed.
type Server struct {
	file     *sys.SocketFile
	sock     *net.UnixListener
	handlers map[string]Handler
	admits   func(sys.Peer) error // nil: everybody

	serving sync.WaitGroup
	mu      sync.Mutex
	conns   map[net.Conn]struct{} // nil once the server is closed
}

// Listen makes the socket, with mode 0600 from the start, and serves it to those whom admits lets in, nil being everybody who can open it. A socket that is left over from a process that ended is
// replaced; one that somebody listens on, or a file of another kind, is an error.
func Listen(path string, handlers map[string]Handler, admits func(sys.Peer) error) (*Server, error) {
	sock, file, err := sys.ListenUnix(path, 0o600)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	s := &Server{file: file, sock: sock, handlers: handlers, admits: admits, conns: map[net.Conn]struct{}{}}
	s.serving.Go(s.run)
	return s, nil
}

// Close ends all conversations and removes the socket. It may be called more than once.
func (s *Server) Close() error {
	s.mu.Lock()
	conns := s.conns
	s.conns = nil
	s.mu.Unlock()
	if conns == nil {
		return nil
	}
	err := errors.Join(s.file.Remove(), s.sock.Close())
	for c := range conns {
		c.Close()
	}
	s.serving.Wait()
	return err
}

// run accepts until the socket is closed. Other failures (no descriptors left) may pass, but not by trying at full speed.
func (s *Server) run() {
	for {
		c, err := s.sock.AcceptUnix()
		switch {
		case err == nil:
			s.admit(c)
		case errors.Is(err, net.ErrClosed):
			return
		default:
			time.Sleep(100 * time.Millisecond)
		}
	}
}

// admit serves a connection if its peer may ask and there is room for it.
func (s *Server) admit(c *net.UnixConn) {
	if err := s.refuses(c); err != nil {
		_ = s.answer(c, Response{Error: err.Error()})
		c.Close()
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.conns == nil:
		c.Close()
	case len(s.conns) >= MaxConns:
		_ = s.answer(c, Response{Error: fmt.Sprintf("%d clients are connected already, which is the limit", MaxConns)})
		c.Close()
	default:
		s.conns[c] = struct{}{}
		s.serving.Go(func() { s.serve(c) })
	}
}

func (s *Server) refuses(c *net.UnixConn) error {
	if s.admits == nil {
		return nil
	}
	peer, err := sys.PeerOf(c)
	if err != nil {
		return err
	}
	return s.admits(peer)
}

func (s *Server) serve(c net.Conn) {
	defer func() {
		c.Close()
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()
	s.converse(c, c, func() error { return c.SetReadDeadline(time.Now().Add(RequestTimeout)) })
}

// converse answers requests until the client ends or what it sends is no request. next is called before each request is read.
func (s *Server) converse(r io.Reader, w io.Writer, next func() error) {
	lines := bufio.NewReaderSize(r, MaxRequest)
	for {
		if next() != nil {
			return
		}
		line, err := lines.ReadSlice('\n')
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return // hung up or too slow: nobody to answer
		}
		var req Request
		if err != nil {
			err = fmt.Errorf("%w: longer than %d bytes", ErrRequest, MaxRequest)
		} else {
			req, err = parseRequest(line)
		}
		if err != nil {
			_ = s.answer(w, Response{Error: err.Error()})
			return
		}
		if s.answer(w, s.handle(req)) != nil {
			return
		}
	}
}

// handle finds the answer to a well-formed request.
func (s *Server) handle(req Request) Response {
	name := req.Request
	h, ok := s.handlers[name]
	if !ok {
		known := slices.Sorted(maps.Keys(s.handlers))
		return Response{Error: fmt.Sprintf("unknown request %q: this vhostd knows %s", name, strings.Join(known, ", "))}
	}
	v, err := h(req.Args)
	if err != nil {
		return Response{Error: err.Error()}
	}
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("bug: the answer to %q cannot be encoded: %v", name, err))
	}
	return Response{Result: b}
}

// answer writes one line.
func (s *Server) answer(w io.Writer, r Response) error {
	r.Version = Version
	b, err := json.Marshal(r)
	if err != nil {
		panic(fmt.Sprintf("bug: response cannot be encoded: %v", err))
	}
	if c, ok := w.(net.Conn); ok {
		if err := c.SetWriteDeadline(time.Now().Add(WriteTimeout)); err != nil {
			return err
		}
	}
	_, err = w.Write(append(b, '\n'))
	return err
}
