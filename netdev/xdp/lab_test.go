package xdp_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/netdev/xdp"
)

const patience = 20 * time.Second

// lab is two network namespaces with a cable between them: the device's and the peer's.
//
//	here [v0] ---------- [v0] there
type lab struct {
	testing.TB
	here, there string
}

var labs atomic.Int32

// newLab makes a cable with n queues at the device's end.
func newLab(t testing.TB, mtu, n int) *lab {
	t.Helper()
	require.Root(t, "xdp")
	require.Tool(t, "xdp", "ip")
	name := fmt.Sprintf("vhostd-xdp-%d-%d-", os.Getpid(), labs.Add(1))
	l := &lab{TB: t, here: name + "here", there: name + "there"}
	for _, ns := range []string{l.here, l.there} {
		if out, err := exec.Command("ip", "netns", "add", ns).CombinedOutput(); err != nil {
			require.Skip(t, "xdp", "ip netns add: %v: %s", err, out)
		}
		t.Cleanup(func() { l.run("ip netns del " + ns) })
		// Missing in a kernel without IPv6: then there is nothing to turn off.
		_ = exec.Command("ip", "netns", "exec", ns, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6").Run()
	}
	l.run(fmt.Sprintf("ip -n %s link add v0 mtu %d address 02:00:00:00:00:01 numtxqueues %d numrxqueues %d type veth peer name v0 mtu %d address 02:00:00:00:00:02 netns %s numtxqueues %d numrxqueues %d",
		l.here, mtu, n, n, mtu, l.there, n, n))
	for _, ns := range []string{l.here, l.there} {
		l.run("ip -n " + ns + " link set v0 up")
	}
	return l
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

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// in runs f on a thread that is in a namespace.
func (l *lab) in(ns string, f func() error) error {
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

// open opens a device here.
func (l *lab) open(options string) (d *xdp.Device, err error) {
	o, err := xdp.ParseOptions(options)
	if err != nil {
		return nil, err
	}
	err = l.in(l.here, func() (err error) { d, err = xdp.Open(o); return err })
	return d, err
}

// device opens a device here, which the caller closes.
func (l *lab) device(options string) *xdp.Device {
	l.Helper()
	d, err := l.open(options)
	must(l, err)
	return d
}

// attached reports whether an XDP program is on the interface here.
func (l *lab) attached() bool {
	l.Helper()
	out, err := exec.Command("ip", "-n", l.here, "link", "show", "v0").CombinedOutput()
	must(l, err)
	return bytes.Contains(out, []byte("prog/xdp"))
}

// wire is a packet socket at the peer's end.
type wire struct {
	testing.TB
	fd  int
	buf [1 << 17]byte
}

func (l *lab) wire() *wire {
	l.Helper()
	w := &wire{TB: l}
	must(l, l.in(l.there, func() error {
		proto := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
		link, err := net.InterfaceByName("v0")
		if err != nil {
			return err
		}
		if w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		tv := unix.NsecToTimeval(patience.Nanoseconds())
		for _, err := range []error{
			unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
			unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 64<<20),
			unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
			unix.SetsockoptInt(w.fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
			unix.SetsockoptInt(w.fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
			unix.Bind(w.fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: link.Index}),
		} {
			if err != nil {
				return err
			}
		}
		return nil
	}))
	return w
}

func (w *wire) close() { unix.Close(w.fd) }

func (w *wire) send(frame []byte) {
	w.Helper()
	if err := w.trySend(frame); err != nil {
		w.Fatal(err)
	}
}

// trySend is send for any goroutine.
func (w *wire) trySend(frame []byte) error {
	if _, err := unix.Write(w.fd, frame); err != nil {
		return fmt.Errorf("sending %d bytes: %w", len(frame), err)
	}
	return nil
}

// recv returns the next frame, and whether its checksum is still to be completed.
func (w *wire) recv() (frame []byte, unfinished bool) {
	w.Helper()
	var oob [64]byte
	for {
		n, m, _, _, err := unix.Recvmsg(w.fd, w.buf[:], oob[:], 0)
		if err == unix.EINTR {
			continue
		}
		must(w, err)
		return w.buf[:n], notReady(oob[:m])
	}
}

// notReady finds TP_STATUS_CSUMNOTREADY in a packet socket's auxiliary data, which begins with the status.
func notReady(oob []byte) bool {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return false
	}
	for _, m := range msgs {
		if m.Header.Level == unix.SOL_PACKET && m.Header.Type == unix.PACKET_AUXDATA && len(m.Data) >= 4 {
			return binary.NativeEndian.Uint32(m.Data)&unix.TP_STATUS_CSUMNOTREADY != 0
		}
	}
	return false
}

// tryRecv is recv for any goroutine: no frame in time is no fault.
func (w *wire) tryRecv(timeout time.Duration) ([]byte, bool) {
	fds := []unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, int(timeout.Milliseconds())); n != 1 || err != nil {
		return nil, false
	}
	n, _, err := unix.Recvfrom(w.fd, w.buf[:], 0)
	return w.buf[:max(n, 0)], err == nil
}
