//go:build linux

package netlab

import (
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/vhostd/vhostd/test/vm/stream"
)

// Servers are what a guest talks to: transfers and HTTP over TCP, echo over UDP.
type Servers struct {
	Stream net.Addr
	HTTP   net.Addr
	Echo   net.Addr

	close []func() error
	wg    sync.WaitGroup

	mu     sync.Mutex
	served []Served
	conns  map[net.Conn]bool
}

// Served is one transfer as the server saw it.
type Served struct {
	Header stream.Header
	Result stream.Result
	Err    error
}

// Serve starts the servers inside, on one address ("" is every one) and on ports that the kernel chooses.
func (n *Namespace) Serve(host string) (*Servers, error) {
	s := &Servers{conns: map[net.Conn]bool{}}
	addr := net.JoinHostPort(host, "0")
	err := errors.Join(s.startStream(n, addr), s.startHTTP(n, addr), s.startEcho(n, addr))
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Servers) startStream(n *Namespace, addr string) error {
	l, err := n.listenTCP(addr)
	if err != nil {
		return err
	}
	s.Stream = l.Addr()
	s.close = append(s.close, l.Close)
	s.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			s.track(conn, true)
			s.wg.Go(func() { s.serveStream(conn) })
		}
	})
	return nil
}

func (s *Servers) serveStream(conn net.Conn) {
	defer conn.Close()
	defer s.track(conn, false)
	_ = conn.SetDeadline(time.Now().Add(5 * time.Minute))
	h, r, err := stream.Serve(conn)
	s.mu.Lock()
	s.served = append(s.served, Served{h, r, err})
	s.mu.Unlock()
}

func (s *Servers) track(conn net.Conn, open bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if open {
		s.conns[conn] = true
	} else {
		delete(s.conns, conn)
	}
}

func (s *Servers) startHTTP(n *Namespace, addr string) error {
	l, err := n.listenTCP(addr)
	if err != nil {
		return err
	}
	s.HTTP = l.Addr()
	server := &http.Server{Handler: http.HandlerFunc(stream.ServeHTTP)}
	s.close = append(s.close, server.Close)
	s.wg.Go(func() { _ = server.Serve(l) })
	return nil
}

func (s *Servers) startEcho(n *Namespace, addr string) error {
	local, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return err
	}
	var conn *net.UDPConn
	err = n.Do(func() (err error) {
		conn, err = net.ListenUDP("udp", local)
		return err
	})
	if err != nil {
		return err
	}
	s.Echo = conn.LocalAddr()
	s.close = append(s.close, conn.Close)
	s.wg.Go(func() { stream.ServeEcho(conn) })
	return nil
}

// Served returns the transfers that have ended since the last call.
func (s *Servers) Served() []Served {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.served
	s.served = nil
	return out
}

// Close ends the servers and their connections.
func (s *Servers) Close() {
	for _, f := range s.close {
		_ = f()
	}
	s.mu.Lock()
	for conn := range s.conns {
		conn.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// At returns "host:port" for a server's port at another address of the namespace.
func At(host string, server net.Addr) string {
	_, port, err := net.SplitHostPort(server.String())
	if err != nil {
		panic("bug: " + err.Error())
	}
	return net.JoinHostPort(host, port)
}
