//go:build linux

package soak

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/test/vm/daemon"
	"github.com/vhostd/vhostd/test/vm/netlab"
)

// link is a network with a guest at each end, or one that returns what it gets.
type link struct {
	name    string
	daemons []*daemonOf
	echo    bool
	host    bool // the host's sockets stay for a while after the guest has gone
	traffic func(t *testing.T, rd *round, g *vhosttest.Guest)
}

// daemonOf is a vhostd under test.
type daemonOf struct {
	*daemon.Daemon
	socket, control string
	net, metrics    string
	ns              *netlab.Namespace
}

// links are the networks, each with a namespace or two of its own.
var links = []struct {
	name string
	open func(t *testing.T) *link
}{
	{"null", func(t *testing.T) *link {
		return &link{echo: true, daemons: []*daemonOf{run(t, newNamespace(t), "null,echo=on")}}
	}},
	{"user", openUser},
	{"tap", func(t *testing.T) *link {
		ns := newNamespace(t)
		off := false // a bridge that snoops sends frames of its own
		in(t, ns, func() error {
			return add(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}, MulticastSnooping: &off})
		})
		return between(run(t, ns, "tap:t0,bridge=br0"), run(t, ns, "tap:t1,bridge=br0"))
	}},
	{"packet", func(t *testing.T) *link {
		ns := newNamespace(t)
		in(t, ns, cable)
		return between(run(t, ns, "packet:v0"), run(t, ns, "packet:v1"))
	}},
	{"xdp", func(t *testing.T) *link {
		ns := newNamespace(t)
		in(t, ns, cable)
		in(t, ns, completed) // XDP sees frames before the kernel would complete their checksums
		return between(run(t, ns, "xdp:v0"), run(t, ns, "xdp:v1"))
	}},
	{"vxlan", func(t *testing.T) *link {
		here, there := joined(t)
		return between(run(t, here, "vxlan:vni=42,local=10.97.2.1,remote=10.97.2.2"), run(t, there, "vxlan:vni=42,local=10.97.2.2,remote=10.97.2.1"))
	}},
	{"dgram", func(t *testing.T) *link {
		here, there := joined(t)
		return between(
			run(t, here, "dgram:local=10.97.2.1:7001,remote=10.97.2.2:7002", "--zerocopy", "on"),
			run(t, there, "dgram:local=10.97.2.2:7002,remote=10.97.2.1:7001", "--no-balloon"))
	}},
}

func chosen(name string) bool {
	return *only == "" || slices.Contains(strings.Split(*only, ","), name)
}

func between(a, b *daemonOf) *link { return &link{daemons: []*daemonOf{a, b}} }

func newNamespace(t *testing.T) *netlab.Namespace {
	t.Helper()
	ns, err := netlab.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ns.Close)
	// Missing in a kernel without IPv6: then there is nothing to turn off.
	in(t, ns, func() error {
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0)
		return nil
	})
	return ns
}

func in(t *testing.T, ns *netlab.Namespace, f func() error) {
	t.Helper()
	if err := ns.Do(f); err != nil {
		t.Fatal(err)
	}
}

// add makes an interface and sets it up.
func add(l netlink.Link) error {
	if err := netlink.LinkAdd(l); err != nil {
		return fmt.Errorf("%s: %w", l.Attrs().Name, err)
	}
	return netlink.LinkSetUp(l)
}

// cable joins v0 and v1 in one namespace.
func cable() error {
	if err := add(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v0", MTU: 1500}, PeerName: "v1"}); err != nil {
		return err
	}
	peer, err := netlink.LinkByName("v1")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(peer)
}

// completed has both ends of the cable carry frames that are whole.
func completed() error {
	for _, name := range []string{"v0", "v1"} {
		if out, err := exec.Command("ethtool", "-K", name, "tx", "off").CombinedOutput(); err != nil {
			return fmt.Errorf("ethtool: %w: %s", err, out)
		}
	}
	return nil
}

// joined makes two namespaces with a cable between them.
func joined(t *testing.T) (here, there *netlab.Namespace) {
	t.Helper()
	here, there = newNamespace(t), newNamespace(t)
	var peer netns.NsHandle
	in(t, there, func() (err error) {
		peer, err = netns.Get()
		return err
	})
	defer peer.Close()
	in(t, here, func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v0", MTU: 9000}, PeerName: "v0", PeerNamespace: netlink.NsFd(peer)})
	})
	for ns, addr := range map[*netlab.Namespace]string{here: "10.97.2.1/24", there: "10.97.2.2/24"} {
		if err := ns.SetLink(netlab.Link{Name: "v0", MTU: 9000, Addrs: []string{addr}}); err != nil {
			t.Fatal(err)
		}
	}
	return here, there
}

// lastPort numbers the ports on which daemons tell their metrics: two may be in one namespace.
var lastPort atomic.Int32

// run starts a vhostd that ends with the test, in good order.
func run(t *testing.T, ns *netlab.Namespace, net string, args ...string) *daemonOf {
	t.Helper()
	o := daemon.Options{Binary: program, Dir: vhosttest.ShortDir(t), Net: net, Namespace: ns, Args: append(args, "--pprof")}
	o.Metrics = fmt.Sprintf("127.0.0.1:%d", 9100+lastPort.Add(1))
	ctx, cancel := context.WithTimeout(context.Background(), vhosttest.Patience)
	defer cancel()
	d, err := daemon.Start(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), vhosttest.Patience)
		defer cancel()
		if err := d.Stop(ctx); err != nil {
			t.Error(err)
		}
		for _, line := range d.Log() {
			if strings.Contains(line, "panic") || strings.Contains(line, "bug:") || strings.Contains(line, "level=ERROR") {
				t.Errorf("%s logged: %s", net, line)
			}
		}
	})
	return &daemonOf{d, o.Socket(), o.Control(), net, o.Metrics, ns}
}
