//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/vhostd/vhostd/test/vm/rpc"
	"github.com/vhostd/vhostd/test/vm/stream"
)

// transfer runs the streams of one transfer side by side. The checksum is that of the only stream, or a mix of all.
func transfer(a rpc.TCPArgs) (stream.Result, error) {
	n := max(a.Streams, 1)
	results, errs := make([]stream.Result, n), make([]error, n)
	start := time.Now()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { results[i], errs[i] = transferOne(a, uint64(i), a.Bytes/uint64(n)) })
	}
	wg.Wait()
	sum := stream.Result{Elapsed: time.Since(start)}
	for i, r := range results {
		sum.Bytes += r.Bytes
		sum.CRC32C = crc32.Update(sum.CRC32C, crc32.IEEETable, []byte{byte(i)}) ^ r.CRC32C
	}
	if n == 1 {
		sum.CRC32C = results[0].CRC32C
	}
	return sum, errors.Join(errs...)
}

// dialTimeout is for a connection on an idle link.
const dialTimeout = 30 * time.Second

func transferOne(a rpc.TCPArgs, i, bytes uint64) (stream.Result, error) {
	conn, err := net.DialTimeout("tcp", a.Addr, min(a.Timeout, dialTimeout))
	if err != nil {
		return stream.Result{}, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(a.Timeout))
	return stream.Transfer(conn, stream.Header{Mode: a.Mode, Seed: a.Seed + i, Bytes: bytes})
}

// udpWindow is how many datagrams echo lets wait for their reply: no more than a receive buffer holds, whose default is
// 208 KiB with what the kernel itself needs for each.
func udpWindow(size int) uint64 { return uint64(max(1, min(16, 48<<10/size))) }

func echo(a rpc.UDPArgs) (stream.EchoCounters, error) {
	conn, err := net.Dial("udp", a.Addr)
	if err != nil {
		return stream.EchoCounters{}, err
	}
	e, err := stream.NewEcho(conn, a.Size, a.Seed)
	if err != nil {
		return stream.EchoCounters{}, errors.Join(err, conn.Close())
	}
	var wg sync.WaitGroup
	wg.Go(e.Receive)
	for range a.Count {
		e.Send()
		waitReplies(e, udpWindow(a.Size)-1, time.Second)
	}
	waitReplies(e, 0, a.Timeout)
	err = conn.Close()
	wg.Wait()
	return e.Counters(), err
}

// waitReplies waits until at most open datagrams wait for their reply, or the time is over.
func waitReplies(e *stream.Echo, open uint64, wait time.Duration) {
	for end := time.Now().Add(wait); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if c := e.Counters(); c.Sent-min(c.Received, c.Sent) <= open {
			return
		}
	}
}

// traffic is datagrams in the background: at most one flow at a time.
type traffic struct {
	mu   sync.Mutex
	echo *stream.Echo
	stop func()
}

func (t *traffic) do(a rpc.TrafficArgs) (stream.EchoCounters, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if a.Action == "start" {
		return stream.EchoCounters{}, t.start(a)
	}
	if t.echo == nil {
		return stream.EchoCounters{}, errors.New("no traffic was started")
	}
	c := t.echo.Counters()
	if a.Action == "stop" {
		t.stop()
		t.echo = nil
	}
	return c, nil
}

func (t *traffic) start(a rpc.TrafficArgs) error {
	if t.echo != nil {
		return errors.New("traffic runs already")
	}
	conn, err := net.Dial("udp", a.Addr)
	if err != nil {
		return err
	}
	e, err := stream.NewEcho(conn, a.Size, 1)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	ctx, cancel := context.WithCancel(context.Background())
	go e.Receive()
	go func() {
		for tick := time.NewTicker(a.Interval); ctx.Err() == nil; <-tick.C {
			e.Send()
		}
	}()
	t.echo, t.stop = e, func() { cancel(); conn.Close() }
	return nil
}

func fetch(a rpc.HTTPArgs) (rpc.HTTPResult, error) {
	start := time.Now()
	client := http.Client{Timeout: a.Timeout, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(a.URL)
	if err != nil {
		return rpc.HTTPResult{}, err
	}
	defer resp.Body.Close()
	sum, head := &stream.CRC{}, &prefix{max: 200}
	n, err := io.CopyBuffer(io.MultiWriter(sum, head), resp.Body, make([]byte, 256<<10))
	r := rpc.HTTPResult{Status: resp.StatusCode, Bytes: n, CRC32C: sum.Sum, Head: string(head.b)}
	r.Elapsed = time.Since(start)
	return r, err
}

// prefix keeps the first bytes written to it.
type prefix struct {
	b   []byte
	max int
}

func (p *prefix) Write(b []byte) (int, error) {
	p.b = append(p.b, b[:min(len(b), p.max-len(p.b))]...)
	return len(b), nil
}

func lookup(a rpc.LookupArgs) (rpc.LookupResult, error) {
	network := "udp"
	if a.TCP {
		network = "tcp"
	}
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, a.Server)
	}}
	ctx, cancel := context.WithTimeout(context.Background(), a.Timeout)
	defer cancel()
	addrs, err := r.LookupHost(ctx, a.Name)
	return rpc.LookupResult{Addrs: addrs}, err
}

// serve starts servers on every address of the guest.
func serve(a rpc.ServeArgs) (none, error) {
	if a.Stream != 0 {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", a.Stream))
		if err != nil {
			return none{}, err
		}
		go acceptStreams(l)
	}
	if a.Echo != 0 {
		conn, err := net.ListenUDP("udp", &net.UDPAddr{Port: a.Echo})
		if err != nil {
			return none{}, err
		}
		go stream.ServeEcho(conn)
	}
	if a.HTTP != 0 {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", a.HTTP))
		if err != nil {
			return none{}, err
		}
		go func() { _ = http.Serve(l, http.HandlerFunc(stream.ServeHTTP)) }()
	}
	return none{}, nil
}

func acceptStreams(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			_, _, _ = stream.Serve(conn) // the dialling end sees every error too
		}()
	}
}
