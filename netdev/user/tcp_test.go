package user

import (
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
)

// pattern is n bytes that no part of which is like another.
type pattern struct {
	rnd *rand.ChaCha8
	n   int64
}

func newPattern(n int64) io.Reader { return &pattern{rand.NewChaCha8([32]byte{1}), n} }

func (p *pattern) Read(b []byte) (int, error) {
	if p.n == 0 {
		return 0, io.EOF
	}
	b = b[:min(int64(len(b)), p.n)]
	p.n -= int64(len(b))
	return p.rnd.Read(b)
}

func sum(r io.Reader) (n int64, crc uint32, err error) {
	h := crc32.NewIEEE()
	n, err = io.CopyBuffer(struct{ io.Writer }{h}, r, make([]byte, 1<<17))
	return n, h.Sum32(), err
}

func wantSum(n int64) uint32 {
	_, crc, _ := sum(newPattern(n))
	return crc
}

// transfer moves n bytes each way over one connection at a time, with half-close as the end of the stream.
func transfer(t *testing.T, g *guest, network string, n int64) {
	t.Helper()
	type result struct {
		n   int64
		crc uint32
		err error
	}
	got := make(chan result, 1)
	port := listen(t, network, func(c *net.TCPConn) {
		var r result
		r.n, r.crc, r.err = sum(c)
		got <- r
		io.CopyBuffer(struct{ io.Writer }{c}, newPattern(n), make([]byte, 1<<17))
		c.CloseWrite()
	})
	to := gateway
	if strings.HasSuffix(network, "6") {
		to = gateway6
	}
	c := g.mustDial(to, port)
	c.SetDeadline(time.Now().Add(4 * testTimeout))
	start := time.Now()
	if _, err := io.CopyBuffer(struct{ io.Writer }{c}, newPattern(n), make([]byte, 1<<17)); err != nil {
		t.Fatalf("guest to host: %v", err)
	}
	must(t, c.CloseWrite())
	r := <-got
	up := time.Since(start)
	want := wantSum(n)
	if r.err != nil || r.n != n || r.crc != want {
		t.Fatalf("guest to host: %d bytes, crc %08x, %v; want %d and %08x", r.n, r.crc, r.err, n, want)
	}
	start = time.Now()
	m, crc, err := sum(c)
	if err != nil || m != n || crc != want {
		t.Fatalf("host to guest: %d bytes, crc %08x, %v; want %d and %08x", m, crc, err, n, want)
	}
	t.Logf("%d MiB: guest to host %v, host to guest %v, largest frame %d bytes", n>>20, up, time.Since(start), g.link.largest.Load())
}

func TestTCPMovesBytesBothWays(t *testing.T) {
	for _, c := range []struct {
		name     string
		features virtio.Features
		mtu      int
		options  string
		n        int64
	}{
		{"offloads", offloads, 1500, "", 64 << 20},
		{"no offloads", plain, 1500, "", 16 << 20},
		{"bare", bare, 1500, "", 16 << 20},
		{"mtu 9000", offloads, 9000, "mtu=9000", 64 << 20},
		{"mtu 9000 without offloads", bare, 9000, "mtu=9000", 16 << 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newGuest(t, openTest(t, c.options), guestOptions{features: c.features, mtu: c.mtu, address: true})
			transfer(t, g, "tcp4", c.n)
			if gso := c.features.Has(virtio.FNetHostTSO4); gso != (int(g.link.largest.Load()) > c.mtu+ethLen) {
				t.Errorf("largest frame of %d bytes with offloads %v", g.link.largest.Load(), gso)
			}
		})
	}
}

func TestTCPOverIPv6(t *testing.T) {
	if l, err := net.Listen("tcp6", "[::1]:0"); err != nil {
		require.Skip(t, "ipv6", "the host has none: %v", err)
	} else {
		l.Close()
	}
	g := newGuest(t, openTest(t, ""), guestOptions{features: offloads})
	g.waitAddress(guestIP6)
	transfer(t, g, "tcp6", 16<<20)
}

func TestTCPRefusedIsRefusedForTheGuest(t *testing.T) {
	// A port that is taken, so that nobody else listens there.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	must(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	at, err := unix.Getsockname(fd)
	must(t, err)
	port := uint16(at.(*unix.SockaddrInet4).Port)
	g := newGuest(t, openTest(t, ""), guestOptions{features: offloads, address: true})
	start := time.Now()
	c, err := g.dial(gateway, port)
	if err == nil {
		c.Close()
		t.Fatal("connected to a port that nobody listens on")
	}
	if !strings.Contains(err.Error(), "refused") || time.Since(start) > testTimeout/2 {
		t.Fatalf("after %v: %v, want a refusal at once", time.Since(start), err)
	}
}

func TestTCPHalfCloseByTheHost(t *testing.T) {
	const size = 1 << 20
	got := make(chan int64, 1)
	port := listen(t, "tcp4", func(c *net.TCPConn) {
		c.CloseWrite()
		n, _, _ := sum(c)
		got <- n
	})
	g := newGuest(t, openTest(t, ""), guestOptions{features: offloads, address: true})
	c := g.mustDial(gateway, port)
	c.SetDeadline(time.Now().Add(testTimeout))
	if n, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("Read = %d, %v; want EOF", n, err)
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{c}, newPattern(size), make([]byte, 1<<16)); err != nil {
		t.Fatalf("writing after the host's half-close: %v", err)
	}
	must(t, c.CloseWrite())
	if n := <-got; n != size {
		t.Fatalf("the host read %d bytes of %d", n, size)
	}
}

func TestTCPResetByTheHostReachesTheGuest(t *testing.T) {
	port := listen(t, "tcp4", func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 1))
		c.SetLinger(0)
	})
	g := newGuest(t, openTest(t, ""), guestOptions{features: offloads, address: true})
	c := g.mustDial(gateway, port)
	c.SetDeadline(time.Now().Add(testTimeout))
	if _, err := c.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	_, err := c.Read(make([]byte, 1))
	if err == nil || errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "reset") {
		t.Fatalf("Read: %v, want a reset", err)
	}
}

func TestCloseWithConnectionsInEveryState(t *testing.T) {
	port := listen(t, "tcp4", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	d := openTest(t, "hostfwd=tcp:127.0.0.1:0-10.0.2.77:7")
	g := newGuest(t, d, guestOptions{features: offloads, address: true})
	busy := g.mustDial(gateway, port)
	g.mustDial(gateway, port) // idle
	go func() {
		for {
			if _, err := busy.Write(make([]byte, 1<<16)); err != nil {
				return
			}
		}
	}()
	// A handshake that the guest never finishes: by hand, from an address that no stack answers for.
	g.send(synFrame("10.0.2.99", gateway.String(), 4000, port))
	// A forwarded connection that waits for a guest that is not there.
	c, err := net.Dial("tcp", d.Stats().Forwards[0].Host.String())
	must(t, err)
	defer c.Close()
	time.Sleep(100 * time.Millisecond)
	busy.Close()
	// openTest's cleanup closes the device and looks for what is left.
}

// TestTCPUnacknowledgedEndCounts: what the stack holds for a guest that does not acknowledge is bounded, as it counts as a
// connection, and does not stay for ever.
func TestTCPUnacknowledgedEndCounts(t *testing.T) {
	for _, linger := range []time.Duration{lingerTime, 500 * time.Millisecond} {
		t.Run(linger.String(), func(t *testing.T) { testUnacknowledgedEnd(t, linger) })
	}
}

func testUnacknowledgedEnd(t *testing.T, linger time.Duration) {
	closed := make(chan struct{})
	port := listen(t, "tcp4", func(c *net.TCPConn) {
		c.Write(make([]byte, 1000))
		c.SetLinger(-1)
		c.Close()
		close(closed)
	})
	d := openTest(t, "")
	d.tcp.linger = linger
	g := newGuest(t, d, guestOptions{features: offloads, address: true})
	g.link.deaf.Store(true) // to all but SYN-ACK
	c := g.mustDial(gateway, port)
	must(t, c.CloseWrite())
	<-closed
	if linger < lingerTime {
		vhosttest.Eventually(t, "the connection ends", func() bool { return d.Stats().Conns == 0 })
		return
	}
	time.Sleep(100 * time.Millisecond) // it would have ended
	if n := d.Stats().Conns; n != 1 {
		t.Errorf("%d connections are counted, want 1", n)
	}
}

func TestCloseTwice(t *testing.T) {
	d := openTest(t, "hostfwd=tcp:127.0.0.1:0-:7,hostfwd=udp:127.0.0.1:0-:7")
	must(t, d.Close())
	// openTest's cleanup closes it again.
}
