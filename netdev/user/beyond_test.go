package user

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/vhostd/vhostd/internal/require"
)

// childEnv says that the test runs in a network namespace of its own.
const childEnv = "VHOSTD_USER_TEST_CHILD"

// far is an address of the host's that is not its loopback, as any other on the way out.
var far = netip.MustParseAddr("192.0.2.1")

// TestBeyondTheHost runs in a process of its own, without privilege outside of its namespaces: goroutines cannot be kept on one thread.
func TestBeyondTheHost(t *testing.T) {
	if os.Getenv(childEnv) == "" {
		reexec(t)
		return
	}
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	must(t, netlink.LinkSetUp(lo))
	must(t, netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: far.AsSlice(), Mask: net.CIDRMask(32, 32)}}))

	t.Run("TCP and UDP", farFlows)
	t.Run("ping", farPing)
	t.Run("unreachable", farUnreachable)
	t.Run("loopback", loopbackIsTheHosts)
	t.Run("restrict", restricted)
}

func reexec(t *testing.T) {
	cmd := exec.Command(os.Args[0], "-test.run=^TestBeyondTheHost$", "-test.v")
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	if err != nil && len(out) == 0 {
		require.Skip(t, "netns", "a process in namespaces of its own cannot be started: %v", err)
	}
	if t.Logf("%s", out); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(out), "--- SKIP") {
		t.Skip("see above")
	}
}

func farFlows(t *testing.T) {
	l, err := net.Listen("tcp4", netip.AddrPortFrom(far, 0).String())
	must(t, err)
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			c.Write([]byte("far"))
			c.Close()
		}
	}()
	g := newGuest(t, openTest(t, ""), guestOptions{features: offloads, address: true})
	c := g.mustDial(far, l.Addr().(*net.TCPAddr).AddrPort().Port())
	c.SetDeadline(time.Now().Add(testTimeout))
	b := make([]byte, 3)
	if _, err := c.Read(b); err != nil || string(b) != "far" {
		t.Errorf("%q, %v", b, err)
	}
	roundTrip(t, g.dialUDP(far, portOf(echoUDP(t, netip.AddrPortFrom(far, 0).String()))), []byte("far"))
}

func farPing(t *testing.T) {
	g := newGuest(t, openTest(t, ""), guestOptions{features: offloads, address: true})
	const groups = "/proc/sys/net/ipv4/ping_group_range"
	// A new namespace allows it to nobody, of which the guest is told.
	prohibited := g.sniff(func(f []byte) bool {
		ip := header.IPv4(f[ethLen:])
		return header.Ethernet(f).Type() == header.IPv4ProtocolNumber && ip.TransportProtocol() == header.ICMPv4ProtocolNumber &&
			header.ICMPv4(ip.Payload()).Type() == header.ICMPv4DstUnreachable && header.ICMPv4(ip.Payload()).Code() == header.ICMPv4AdminProhibited
	})
	if err := g.ping(far, 56, 100*time.Millisecond); err == nil {
		t.Error("answered, but the host does not allow it")
	}
	select {
	case <-prohibited:
	case <-time.After(testTimeout):
		t.Error("the guest was not told")
	}
	if err := os.WriteFile(groups, []byte("0 0"), 0); err != nil {
		require.Skip(t, "netns", "ping sockets cannot be allowed: %v", err)
	}
	for _, n := range []int{56, 4000} {
		if err := g.ping(far, n, testTimeout); err != nil {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func farUnreachable(t *testing.T) {
	g := newGuest(t, openTest(t, ""), guestOptions{features: offloads, address: true})
	g.waitAddress(guestIP6)
	for _, a := range []string{"198.51.100.1", "2001:db8::1"} {
		start := time.Now()
		_, err := g.dial(netip.MustParseAddr(a), 80)
		if err == nil || !strings.Contains(err.Error(), "unreachable") && !strings.Contains(err.Error(), "no route") || time.Since(start) > testTimeout/2 {
			t.Errorf("%s: after %v: %v, want unreachable at once", a, time.Since(start), err)
		}
	}
}

// loopbackIsTheHosts: nothing but the router's address leads there.
func loopbackIsTheHosts(t *testing.T) {
	port := listen(t, "tcp4", func(c *net.TCPConn) { c.Write([]byte("secret")) })
	udp := echoUDP(t, "127.0.0.1:0")
	d := openTest(t, "hostloopback=off")
	g := newGuest(t, d, guestOptions{features: offloads, address: true})
	if c, err := g.dial(gateway, port); err == nil {
		c.Close()
		t.Error("hostloopback=off, and the loopback was reached")
	}
	for _, a := range []string{"127.0.0.1", "127.1.2.3", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "::127.0.0.1"} {
		src := guestIP.String()
		if strings.Contains(a, ":") {
			src = guestIP6.String()
		}
		g.send(synFrame(src, a, 5000, port))
		g.send(udpFrame(src, a, 5000, portOf(udp), []byte("x")))
	}
	time.Sleep(50 * time.Millisecond)
	if s := d.Stats(); s.Conns != 0 || s.ConnsTotal != 0 || s.UDPFlows != 0 {
		t.Errorf("%+v", s)
	}
	if n := d.Queue(0).Counters().SendDropped; n != 14 {
		t.Errorf("%d frames refused, want 14", n)
	}
}

func restricted(t *testing.T) {
	port := listen(t, "tcp4", func(c *net.TCPConn) {})
	far := netip.AddrPortFrom(far, portOf(echoUDP(t, netip.AddrPortFrom(far, 0).String())))
	d := openTest(t, "restrict=on")
	g := newGuest(t, d, guestOptions{features: offloads, address: true})
	for _, a := range []netip.Addr{gateway, far.Addr()} {
		if c, err := g.dial(a, port); err == nil {
			c.Close()
			t.Errorf("restrict=on, and %v was reached", a)
		}
	}
	g.dialUDP(far.Addr(), far.Port()).Write([]byte("x"))
	g.dialUDP(dnsIP, dnsPort).Write([]byte("x"))
	if err := g.ping(gateway, 56, testTimeout); err != nil {
		t.Errorf("the router itself: %v", err)
	}
	if s := d.Stats(); s.ConnsTotal != 0 || s.UDPFlows != 0 {
		t.Errorf("%+v", s)
	}
}
