package user

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/vhostd/vhostd/virtio"
)

// echoUDP is a server of the host's that sends back what it gets.
func echoUDP(t testing.TB, addr string) *net.UDPConn {
	t.Helper()
	pc, err := net.ListenPacket("udp", addr)
	must(t, err)
	c := pc.(*net.UDPConn)
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			c.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-done
	})
	return c
}

func portOf(c *net.UDPConn) uint16 { return c.LocalAddr().(*net.UDPAddr).AddrPort().Port() }

// roundTrip sends msg until it comes back: datagrams may be lost, or be slow, and then what was sent before comes back once more.
func roundTrip(t testing.TB, c net.Conn, msg []byte) {
	t.Helper()
	buf := make([]byte, 1<<16)
	var others []int
	for end := time.Now().Add(testTimeout); time.Now().Before(end); {
		if _, err := c.Write(msg); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(2 * time.Second))
		for {
			n, err := c.Read(buf)
			if err != nil {
				break
			}
			if bytes.Equal(buf[:n], msg) {
				return
			}
			others = append(others, n)
		}
	}
	t.Fatalf("a datagram of %d bytes never came back, but others of %v", len(msg), others)
}

func TestUDPEcho(t *testing.T) {
	for _, features := range []virtio.Features{offloads, bare} {
		g := newGuest(t, openTest(t, ""), guestOptions{features: features, address: true})
		g.waitAddress(guestIP6)
		c := g.dialUDP(gateway, portOf(echoUDP(t, "127.0.0.1:0")))
		for _, n := range []int{1, 100, 1472, 1473, 8000, 60000} {
			msg, err := io.ReadAll(newPattern(int64(n)))
			must(t, err)
			roundTrip(t, c, msg)
		}
		if pc, err := net.ListenPacket("udp", "[::1]:0"); err == nil {
			pc.Close()
			c6 := g.dialUDP(gateway6, portOf(echoUDP(t, "[::1]:0")))
			roundTrip(t, c6, []byte("six"))
			roundTrip(t, c6, bytes.Repeat([]byte("six"), 5000))
		}
		if n := g.dev.Stats().UDPFlows; n == 0 {
			t.Error("no flow is counted")
		}
	}
}

func TestUDPRefusedIsRefusedForTheGuest(t *testing.T) {
	// A port that is taken, so that nobody else listens there, by a socket that hears another's datagrams only.
	c0, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9})
	must(t, err)
	defer c0.Close()
	port := portOf(c0)
	g := newGuest(t, openTest(t, ""), guestOptions{features: offloads, address: true})
	c := g.dialUDP(gateway, port)
	for end := time.Now().Add(testTimeout); time.Now().Before(end); {
		_, werr := c.Write([]byte("anybody?"))
		c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, rerr := c.Read(make([]byte, 1))
		if strings.Contains(fmt.Sprint(werr, rerr), "refused") {
			return
		}
	}
	t.Fatal("the guest was never told that nobody listens")
}

func TestUDPFlowTableIsBounded(t *testing.T) {
	port := portOf(echoUDP(t, "127.0.0.1:0"))
	d := openTest(t, "")
	g := newGuest(t, d, guestOptions{features: offloads, noStack: true})
	for i := range maxUDPFlows + 100 {
		g.send(udpFrame(guestIP.String(), gateway.String(), uint16(1000+i), port, []byte("x")))
	}
	if n := d.Stats().UDPFlows; n != maxUDPFlows {
		t.Errorf("%d flows, want %d", n, maxUDPFlows)
	}
}

func TestUDPFlowsEndWhenIdle(t *testing.T) {
	port := portOf(echoUDP(t, "127.0.0.1:0"))
	d := openTest(t, "")
	g := newGuest(t, d, guestOptions{features: offloads, address: true})
	roundTrip(t, g.dialUDP(gateway, port), []byte("x"))
	d.udp.flows.mu.Lock()
	for _, f := range d.udp.flows.m {
		if left := time.Until(f.expires()); left < idleAnswered-testTimeout {
			t.Errorf("%v are left of a flow that was just used", left)
		}
		f.last.Store(time.Now().Add(-idleAnswered - time.Second).UnixNano())
		f.conn.SetReadDeadline(time.Now())
	}
	d.udp.flows.mu.Unlock()
	for end := time.Now().Add(testTimeout); d.Stats().UDPFlows != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the flow has not ended")
		}
	}
}

func TestForwardTCP(t *testing.T) {
	d := openTest(t, "hostfwd=tcp:127.0.0.1:0-:80,hostfwd=:127.0.0.1:0-:81")
	g := newGuest(t, d, guestOptions{features: offloads}) // no address yet
	fwd := d.Stats().Forwards
	c, err := net.Dial("tcp", fwd[0].Host.String())
	must(t, err)
	defer c.Close()
	// The connection waits for the guest to come up, which listens by then: a refusal would be believed.
	l, err := gonet.ListenTCP(g.stack, tcpip.FullAddress{NIC: 1, Port: 80}, header.IPv4ProtocolNumber)
	must(t, err)
	defer l.Close()
	g.addAddress(netip.PrefixFrom(guestIP, 24))
	const size = 8 << 20
	// One way after the other. A guest that echoes stops reading while it writes, and gVisor's TCP takes no ACK while its window is closed but for less than
	// what the window scale can tell: the peer's sequence number is then beyond the window, and neither end ever goes on.
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		if n, crc, err := sum(c); err != nil || n != size || crc != wantSum(size) {
			t.Errorf("host to guest: %d bytes, crc %08x, %v; want %d and %08x", n, crc, err, size, wantSum(size))
		}
		io.Copy(struct{ io.Writer }{c}, newPattern(size))
	}()
	c.SetDeadline(time.Now().Add(testTimeout))
	go func() {
		io.Copy(struct{ io.Writer }{c}, newPattern(size))
		c.(*net.TCPConn).CloseWrite()
	}()
	n, crc, err := sum(c)
	if want := wantSum(size); err != nil || n != size || crc != want {
		t.Fatalf("guest to host: %d bytes, crc %08x, %v; want %d and %08x", n, crc, err, size, want)
	}
	if s := d.Stats().Forwards[0]; s.Total != 1 || s.Guest.String() != "10.0.2.15:80" {
		t.Errorf("%+v", s)
	}
	refused, err := net.Dial("tcp", fwd[1].Host.String())
	if err == nil {
		refused.SetDeadline(time.Now().Add(testTimeout))
		_, err = refused.Read(make([]byte, 1))
		refused.Close()
	}
	if err == nil || errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "reset") {
		t.Errorf("a port that the guest refuses: %v, want a reset", err)
	}
}

// TestForwardsLeaveConnectionsToTheGuest: whoever connects to a forwarded port as often as he can does not keep the guest from connecting itself.
func TestForwardsLeaveConnectionsToTheGuest(t *testing.T) {
	d := openTest(t, "hostfwd=tcp:127.0.0.1:0-10.0.2.77:7") // where nobody is: they wait
	g := newGuest(t, d, guestOptions{features: offloads, address: true})
	for range maxConns + 10 {
		c, err := net.Dial("tcp", d.Stats().Forwards[0].Host.String())
		must(t, err)
		defer c.Close()
	}
	for end := time.Now().Add(testTimeout); d.Stats().Conns < maxForwarded; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%+v", d.Stats())
		}
	}
	g.mustDial(gateway, listen(t, "tcp4", func(c *net.TCPConn) { io.Copy(io.Discard, c) }))
}

func TestForwardUDP(t *testing.T) {
	d := openTest(t, "hostfwd=udp:127.0.0.1:0-:53")
	g := newGuest(t, d, guestOptions{features: offloads, address: true})
	local := full(netip.AddrPortFrom(guestIP, 53))
	srv, err := gonet.DialUDP(g.stack, &local, nil, header.IPv4ProtocolNumber)
	must(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			n, from, err := srv.ReadFrom(buf)
			if err != nil {
				return
			}
			srv.WriteTo(buf[:n], from)
		}
	}()
	defer func() { srv.Close(); <-done }()
	for i := range 3 {
		c, err := net.Dial("udp", d.Stats().Forwards[0].Host.String())
		must(t, err)
		defer c.Close()
		roundTrip(t, c, fmt.Append(nil, "peer ", i))
		roundTrip(t, c, bytes.Repeat([]byte{byte(i)}, 10000))
	}
	if s := d.Stats().Forwards[0]; s.Active != 3 || s.Total != 3 {
		t.Errorf("%+v", s)
	}
}

// TestForwardUDPLinkLocal: the answer to a link-local address goes to the interface that the question came from.
func TestForwardUDPLinkLocal(t *testing.T) {
	lo, err := net.InterfaceByName("lo")
	must(t, err)
	for zone, want := range map[string]uint32{"": 0, "lo": uint32(lo.Index), "4711": 4711, "gone": 0} {
		from := netip.AddrPortFrom(netip.MustParseAddr("fe80::1").WithZone(zone), 53)
		if to := sockaddr(from).(*unix.SockaddrInet6); to.ZoneId != want || to.Port != 53 {
			t.Errorf("%v: %+v, want scope %d", from, to, want)
		}
	}
}

func TestForwardsPortIsTaken(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	o, err := ParseOptions(fmt.Sprintf("hostfwd=tcp:%v-:22", l.Addr()))
	must(t, err)
	if d, err := Open(o); err == nil {
		d.Close()
		t.Fatal("two listeners on one port")
	} else if !strings.Contains(err.Error(), "in use") || d != nil {
		t.Errorf("%v, %v", d, err)
	}
}

// ping sends an echo request and returns whether it was answered in time.
func (g *guest) ping(addr netip.Addr, payload int, timeout time.Duration) error {
	g.Helper()
	proto, kind := icmp.ProtocolNumber4, byte(header.ICMPv4Echo)
	if addr.Is6() {
		proto, kind = icmp.ProtocolNumber6, byte(header.ICMPv6EchoRequest)
	}
	wq := new(waiter.Queue)
	ep, terr := g.stack.NewEndpoint(proto, protoOf(addr), wq)
	mustTCPIP(g, terr)
	defer ep.Close()
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventErr)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	mustTCPIP(g, ep.Connect(tcpip.FullAddress{NIC: 1, Addr: stackAddr(addr)}))
	msg := append([]byte{kind, 0, 0, 0, 0, 0, 0, 1}, make([]byte, payload)...)
	_, terr = ep.Write(bytes.NewReader(msg), tcpip.WriteOptions{})
	mustTCPIP(g, terr)
	select {
	case <-ready:
	case <-time.After(timeout):
		return errors.New("no answer")
	}
	var got bytes.Buffer
	if _, terr := ep.Read(&got, tcpip.ReadOptions{}); terr != nil {
		return errors.New(terr.String())
	}
	if got.Len() != len(msg) {
		return fmt.Errorf("an answer of %d bytes to %d", got.Len(), len(msg))
	}
	return nil
}

func TestPingRouter(t *testing.T) {
	g := newGuest(t, openTest(t, ""), guestOptions{features: offloads, address: true})
	g.waitAddress(guestIP6)
	for _, a := range []netip.Addr{gateway, dnsIP, gateway6, netip.MustParseAddr("fd00::3")} {
		for _, n := range []int{56, 4000} {
			if err := g.ping(a, n, testTimeout); err != nil {
				t.Errorf("%v, %d bytes: %v", a, n, err)
			}
		}
	}
}
