package netdevtest

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
)

// InNamespace moves the test to a network namespace of its own, in which the kernel sends nothing by itself. Subtests run on threads
// outside of it. Part is what require.Skip is told where a namespace cannot be made.
func InNamespace(t testing.TB, part string) {
	t.Helper()
	require.Root(t, part)
	runtime.LockOSThread()
	old, err := netns.Get()
	must(t, err)
	own, err := netns.New()
	if err != nil {
		require.Skip(t, part, "a network namespace cannot be made: %v", err)
	}
	own.Close()
	t.Cleanup(func() {
		if err := netns.Set(old); err != nil {
			t.Errorf("back to the old namespace: %v", err)
			return // and the thread stays locked, and ends with the test
		}
		old.Close()
		runtime.UnlockOSThread()
	})
	must(t, netlink.LinkSetUp(Link(t, "lo")))
	// Missing in a kernel without IPv6: then there is nothing to turn off.
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0)
}

// Link is the interface of a name.
func Link(t testing.TB, name string) netlink.Link {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return link
}

// AwaitRunning waits until an interface has its carrier: what is sent before goes nowhere.
func AwaitRunning(t testing.TB, name string) {
	t.Helper()
	if err := awaitRunning(name); err != nil {
		t.Fatal(err)
	}
}

func awaitRunning(name string) error {
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if link.Attrs().OperState == netlink.OperUp {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s has no carrier after %v", name, patience)
		}
	}
}

// Lab is two network namespaces with a cable between them: the device's and the peer's. Nothing but the test's frames is on the cable.
//
//	Here [v0 02:00:00:00:00:01] ---------- [v0 02:00:00:00:00:02] There
type Lab struct {
	testing.TB
	Here, There string // names for ip netns
}

var labs atomic.Int32

// NewLab makes a cable for packets of mtu bytes, with a number of queues at both ends, or the kernel's choice where that is 0. Part is
// what require.Skip is told where that is not possible.
func NewLab(t testing.TB, part string, mtu, queues int) *Lab {
	t.Helper()
	require.Root(t, part)
	require.Tool(t, part, "ip")
	name := fmt.Sprintf("vhostd-%s-%d-%d-", part, os.Getpid(), labs.Add(1))
	l := &Lab{TB: t, Here: name + "here", There: name + "there"}
	for _, ns := range []string{l.Here, l.There} {
		if err := l.Try("ip netns add " + ns); err != nil {
			require.Skip(t, part, "%v", err)
		}
		t.Cleanup(func() { l.Run("ip netns del " + ns) })
		// Missing in a kernel without IPv6: then there is nothing to turn off.
		_ = exec.Command("ip", "netns", "exec", ns, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6").Run()
		l.Run("ip -n " + ns + " link set lo up")
	}
	end := fmt.Sprintf(" mtu %d", mtu)
	if queues != 0 {
		end += fmt.Sprintf(" numtxqueues %d numrxqueues %d", queues, queues)
	}
	l.Run("ip -n " + l.Here + " link add v0" + end + " address 02:00:00:00:00:01 type veth peer name v0" + end + " address 02:00:00:00:00:02 netns " + l.There)
	l.Up()
	return l
}

// Up sets both ends up, and waits for their carriers, of which the kernel hears some time after.
func (l *Lab) Up() {
	l.Helper()
	both := []string{l.Here, l.There}
	for _, ns := range both {
		l.Run("ip -n " + ns + " link set v0 up")
	}
	for _, ns := range both {
		l.In(ns, func() error { return awaitRunning("v0") })
	}
}

// For is the lab for a subtest.
func (l *Lab) For(t testing.TB) *Lab { return &Lab{t, l.Here, l.There} }

// Try runs a command.
func (l *Lab) Try(command string) error {
	args := strings.Fields(command)
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %v: %s", command, err, out)
	}
	return nil
}

// Run is Try that ends the test.
func (l *Lab) Run(command string) {
	l.Helper()
	must(l, l.Try(command))
}

// Enter runs f on a thread that is in a namespace.
func (l *Lab) Enter(ns string, f func() error) error {
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

// In is Enter that ends the test.
func (l *Lab) In(ns string, f func() error) {
	l.Helper()
	must(l, l.Enter(ns, f))
}

// Poll waits for events of a descriptor, and reports whether there were some within the limit.
func Poll(t testing.TB, fd int, events int16, limit time.Duration) bool {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for end := time.Now().Add(limit); ; {
		n, err := unix.Poll(fds, int(max(time.Until(end), 0).Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		must(t, err)
		return n > 0
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
