package udp_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/netdev/udp"
)

// lab is two network namespaces with a cable between them: the device's and the peer's.
//
//	here [v0 10.9.0.1] ---------- [v0 10.9.0.2] there
type lab struct {
	testing.TB
	here, there string
}

const (
	hereIP  = "10.9.0.1"
	thereIP = "10.9.0.2"
)

func newLab(t testing.TB, mtu int) *lab {
	t.Helper()
	require.Root(t, "netns")
	require.Tool(t, "netns", "ip")
	require.Tool(t, "netns", "tc")
	name := fmt.Sprintf("vhostd-udp-%d-", os.Getpid())
	l := &lab{TB: t, here: name + "here", there: name + "there"}
	for _, ns := range []string{l.here, l.there} {
		if out, err := exec.Command("ip", "netns", "add", ns).CombinedOutput(); err != nil {
			require.Skip(t, "netns", "ip netns add: %v: %s", err, out)
		}
		t.Cleanup(func() { l.run("ip netns del " + ns) })
		// Missing in a kernel without IPv6: then there is nothing to turn off.
		_ = exec.Command("ip", "netns", "exec", ns, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6").Run()
		l.run("ip -n " + ns + " link set lo up")
	}
	l.run(fmt.Sprintf("ip -n %s link add v0 mtu %d address 02:00:00:00:00:01 type veth peer name v0 mtu %d address 02:00:00:00:00:02 netns %s",
		l.here, mtu, mtu, l.there))
	l.run("ip -n " + l.here + " address add " + hereIP + "/24 dev v0")
	l.run("ip -n " + l.there + " address add " + thereIP + "/24 dev v0")
	for _, ns := range []string{l.here, l.there} {
		l.run("ip -n " + ns + " link set v0 up")
	}
	// Nothing but the test's frames is on the cable.
	l.run("ip -n " + l.here + " neighbour replace " + thereIP + " lladdr 02:00:00:00:00:02 dev v0")
	l.run("ip -n " + l.there + " neighbour replace " + hereIP + " lladdr 02:00:00:00:00:01 dev v0")
	return l
}

// sink makes an interface here that takes pages as a network card does, and frees every frame at once: the way to 10.8.0.2.
func (l *lab) sink() {
	l.Helper()
	if err := l.try("ip -n " + l.here + " link add i0 mtu 65535 type ifb"); err != nil {
		require.Skip(l, "ifb", "the kernel has no ifb: %v", err)
	}
	l.run("ip -n " + l.here + " address add 10.8.0.1/24 dev i0")
	l.run("ip -n " + l.here + " link set i0 up")
}

// try runs a command.
func (l *lab) try(command string) error {
	args := strings.Fields(command)
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %v: %s", command, err, out)
	}
	return nil
}

func (l *lab) run(command string) {
	l.Helper()
	must(l, l.try(command))
}

// in runs f on a thread that is in a namespace.
func (l *lab) in(ns string, f func() error) {
	l.Helper()
	must(l, l.enter(ns, f))
}

// enter is in for any goroutine.
func (l *lab) enter(ns string, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		h, err := netns.GetFromName(ns)
		if err == nil {
			defer h.Close()
			err = netns.Set(h)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// device opens a device here, which the caller closes.
func (l *lab) device(options string) (d *udp.Device) {
	l.Helper()
	o, err := udp.ParseOptions(options)
	must(l, err)
	l.in(l.here, func() (err error) { d, err = udp.Open(o); return err })
	return d
}

// peer makes a tunnel of the kernel's there, or ends the test where the kernel has none of this kind.
func (l *lab) peer(kind, name string, mtu int) {
	l.Helper()
	args := map[string]string{
		"vxlan":  "id 42 local " + thereIP + " remote " + hereIP + " dstport 4789",
		"geneve": "id 42 remote " + hereIP + " dstport 6081",
	}
	if err := l.try(fmt.Sprintf("ip -n %s link add %s type %s %s", l.there, name, kind, args[kind])); err != nil {
		if kind == "geneve" {
			// Many a kernel is built without, and nothing that could be installed changes that: no part that can be required.
			l.Skipf("skipped: the kernel has no %s: %v", kind, err)
		}
		require.Skip(l, kind, "the kernel has no %s: %v", kind, err)
	}
	l.run(fmt.Sprintf("ip -n %s link set %s mtu %d up", l.there, name, mtu))
}

// bucket is how many bytes pass a held interface before frames wait.
const bucket = 20000

// hold has frames wait in the queueing discipline of an interface here once bucket bytes have passed: for minutes, if nobody releases them.
func (l *lab) hold(dev string) {
	l.Helper()
	l.run(fmt.Sprintf("tc -n %s qdisc replace dev %s root tbf rate 1kbit burst %d limit 10000000", l.here, dev, bucket))
}

// release lets the frames that wait go with the next one that is sent.
func (l *lab) release(dev string) {
	l.Helper()
	l.run("tc -n " + l.here + " qdisc change dev " + dev + " root tbf rate 10gbit burst 10000000 limit 10000000")
}

// purge drops the frames that wait.
func (l *lab) purge(dev string) {
	l.Helper()
	l.run("tc -n " + l.here + " qdisc delete dev " + dev + " root")
}

// packets is a packet socket.
type packets struct {
	testing.TB
	fd  int
	buf [1 << 17]byte
}

// packets opens a packet socket on an interface.
func (l *lab) packets(ns, dev string) *packets {
	l.Helper()
	p := &packets{TB: l}
	l.in(ns, func() error {
		proto := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
		link, err := net.InterfaceByName(dev)
		if err != nil {
			return err
		}
		if p.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		tv := unix.NsecToTimeval(patience.Nanoseconds())
		for _, err := range []error{
			unix.SetsockoptInt(p.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
			unix.SetsockoptInt(p.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 16<<20),
			unix.SetsockoptTimeval(p.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
			unix.Bind(p.fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: link.Index}),
		} {
			if err != nil {
				return err
			}
		}
		return nil
	})
	return p
}

func (p *packets) close() { unix.Close(p.fd) }

func (p *packets) send(frame []byte) {
	p.Helper()
	if _, err := unix.Write(p.fd, frame); err != nil {
		p.Fatalf("sending %d bytes: %v", len(frame), err)
	}
}

// recv returns the next frame that pick takes.
func (p *packets) recv(pick func(b []byte) bool) []byte {
	p.Helper()
	for {
		n, from, err := unix.Recvfrom(p.fd, p.buf[:], 0)
		if err == unix.EINTR {
			continue
		}
		must(p, err)
		if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		if n >= 14 && pick(p.buf[:n]) {
			return p.buf[:n]
		}
	}
}
