//go:build linux

package vm

import (
	"net"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/test/vm/machine"
	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/test/vm/rpc"
	"github.com/vhostd/vhostd/test/vm/stream"
	"github.com/vhostd/vhostd/virtio"
)

// The tunnel of TestVXLAN: vhostd in a namespace of its own, the kernel's vxlan in that of the servers, a cable between.
//
//	guest -- vhostd [v0 10.9.0.1] ---- cable ---- [v0 10.9.0.2] kernel's vxlan [tun0 10.88.0.1] -- servers
const (
	underlayMTU = 9100
	tunnelMTU   = 9000 // longer than the least size of a frame that leaves by page
	nearIP      = "10.9.0.1"
	farIP       = "10.9.0.2"
)

// run runs a program inside a namespace.
func run(t *testing.T, n *netlab.Namespace, argv ...string) {
	t.Helper()
	var out strings.Builder
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, n.Start(cmd))
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, out.String())
	}
}

// cable joins two namespaces.
func cable(t *testing.T, a, b *netlab.Namespace) {
	t.Helper()
	var there netns.NsHandle
	must(t, b.Do(func() (err error) { there, err = netns.Get(); return err }))
	defer there.Close()
	must(t, a.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v0", MTU: underlayMTU}, PeerName: "v0", PeerMTU: underlayMTU,
			PeerNamespace: netlink.NsFd(there)})
	}))
	must(t, a.SetLink(netlab.Link{Name: "v0", Addrs: []string{nearIP + "/24"}}))
	must(t, b.SetLink(netlab.Link{Name: "v0", Addrs: []string{farIP + "/24"}}))
}

// kernelTunnel makes the kernel's vxlan beside the servers.
func kernelTunnel(t *testing.T, r *rig) {
	t.Helper()
	tun := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "tun0", MTU: tunnelMTU}, VxlanId: 42, SrcAddr: net.ParseIP(farIP),
		Group: net.ParseIP(nearIP), Port: 4789, Learning: true}
	if err := r.ns.Do(func() error { return netlink.LinkAdd(tun) }); err != nil {
		require.Skip(t, "vxlan", "the kernel has no vxlan: %v", err)
	}
	// A cable between namespaces carries inner checksums that are not computed: a network card would have done it.
	run(t, r.ns, require.Tool(t, part, "ethtool"), "-K", "tun0", "tx", "off")
	must(t, r.ns.SetLink(netlab.Link{Name: "tun0", MTU: tunnelMTU, Addrs: []string{hostIP + "/24"}}))
}

// outcomes are what became of the frames that the guest sent.
func (r *rig) outcomes() map[string]uint64 {
	r.t.Helper()
	s, err := r.vhostd.Stats(r.ctx)
	must(r.t, err)
	return s.Queues[1].Outcomes
}

// TestVXLAN: a guest with every offload on, through the kernel's own vxlan. Its frames leave by page, and the daemon's counters say what the
// kernel made of that: copied where they are delivered on this host, zero-copy where they leave through a network card.
func TestVXLAN(t *testing.T) {
	needVhostd(t)
	r := newRig(t, "vxlan:vni=42,zerocopy=on,local="+nearIP+",remote="+farIP)
	near, err := netlab.New()
	must(t, err)
	t.Cleanup(near.Close)
	r.dopts.Namespace = near
	cable(t, near, r.ns)
	kernelTunnel(t, r)
	r.startVhostd()
	r.boot()
	r.configureGuest()
	r.link(rpc.LinkArgs{Name: "eth0", MTU: tunnelMTU})
	r.features(virtio.FNetHostTSO4|virtio.FNetCsum, 0)
	r.ping(hostIP, 56)
	r.ping(hostIP, tunnelMTU-28)
	r.tcp(hostIP, transferSize)
	r.healthy()
	o := r.outcomes()
	const most = 1 << 16 // bytes in a frame of the guest's, which is cut after
	if o["copied_anyway"] < transferSize/most || o["zerocopied"]+o["dropped"] != 0 {
		t.Errorf("outcomes %v, want all sent by page and copied by their receiver", o)
	}
	r.throughCard(near)
}

// throughCard has the tunnel leave through an interface that takes pages as a network card does, and whatever it is given vanishes.
func (r *rig) throughCard(near *netlab.Namespace) {
	r.t.Helper()
	if err := near.Do(func() error {
		return netlink.LinkAdd(&netlink.Ifb{LinkAttrs: netlink.LinkAttrs{Name: "card", MTU: underlayMTU}})
	}); err != nil {
		require.Skip(r.t, "ifb", "the kernel has no ifb: %v", err)
	}
	run(r.t, near, "ip", "link", "set", "card", "up")
	run(r.t, near, "ip", "route", "add", farIP+"/32", "dev", "card")
	before := r.outcomes()
	_, err := r.vm.Traffic(r.ctx, rpc.TrafficArgs{Action: "start", Addr: netlab.At(hostIP, r.servers.Echo), Size: tunnelMTU - 28, Interval: 2 * time.Millisecond})
	must(r.t, err)
	eventually(r.t, 20*time.Second, "frames that leave without a copy", func() bool {
		return r.outcomes()["zerocopied"] >= before["zerocopied"]+100
	})
	c, err := r.vm.Traffic(r.ctx, rpc.TrafficArgs{Action: "stop"})
	must(r.t, err)
	after := r.outcomes()
	r.logf("through a card: %d datagrams sent, %d back, outcomes %v", c.Sent, c.Received, after)
	if after["dropped"] != 0 || after["copied_anyway"] != before["copied_anyway"] {
		r.t.Errorf("outcomes %v, and before %v", after, before)
	}
}

// TestQEMUDgram: two guests, one of vhostd and one of QEMU's own dgram network, over UDP; and once more with vhostd started anew, without
// io_uring and with longer frames.
func TestQEMUDgram(t *testing.T) {
	needVhostd(t)
	const spec = "dgram:local=127.0.0.1:7001,remote=127.0.0.1:7002"
	r := newRig(t, spec)
	r.mopts.Reconnect = true
	other := &rig{t: t, ctx: r.ctx, ns: r.ns, mopts: machine.Options{Assets: r.mopts.Assets, Name: "other", MAC: "52:54:00:12:34:0b",
		Netdev: "dgram,id=n0,local.type=inet,local.host=127.0.0.1,local.port=7002,remote.type=inet,remote.host=127.0.0.1,remote.port=7001"}}
	t.Cleanup(other.close)
	r.startVhostd()
	r.startMachine()
	must(t, r.ns.Do(func() (err error) { other.vm, err = machine.Start(r.ctx, other.mopts); return err }))
	r.waitBoot()
	other.waitBoot()
	r.configureGuest()
	other.link(rpc.LinkArgs{Name: "eth0", Wait: 20 * time.Second, Up: true, Addrs: []string{hostIP + "/24", hostIP6 + "/64"}})
	r.ping(hostIP, 1472)
	r.ping(hostIP6, 1452)
	other.ping(guestIP, 56)
	r.exchange(other, 7001)
	r.healthy()
	if o := r.outcomes(); o["copied_small"] == 0 || o["dropped"] != 0 {
		t.Errorf("outcomes %v", o)
	}

	must(t, r.vhostd.Stop(r.ctx))
	r.dopts.Net = spec + ",zerocopy=on,zerocopy-engine=msg_zerocopy"
	r.startVhostd()
	for _, e := range []*rig{r, other} {
		e.link(rpc.LinkArgs{Name: "eth0", MTU: tunnelMTU})
	}
	eventually(t, 20*time.Second, "the guest's network", func() bool {
		p, err := r.vm.Ping(r.ctx, rpc.PingArgs{Addr: hostIP, Size: tunnelMTU - 28, Count: 1, DF: true, Timeout: time.Second})
		must(t, err)
		return p.Received == 1
	})
	other.ping(guestIP, tunnelMTU-28)
	r.exchange(other, 7002)
	r.healthy()
	if o := r.outcomes(); o["copied_anyway"] == 0 || o["zerocopied"]+o["dropped"] != 0 {
		t.Errorf("outcomes %v", o)
	}
}

// exchange moves 16 MiB from each guest to the other, checked at both ends.
func (r *rig) exchange(other *rig, port int) {
	r.t.Helper()
	must(r.t, other.vm.Serve(r.ctx, rpc.ServeArgs{Stream: port}))
	for i, mode := range []stream.Mode{stream.Sink, stream.Source} {
		res, err := r.vm.TCP(r.ctx, rpc.TCPArgs{Addr: net.JoinHostPort(hostIP, strconv.Itoa(port)), Mode: mode, Bytes: smallSize / 2, Seed: uint64(i)})
		must(r.t, err)
		r.logf("TCP %s: %v", []string{"to QEMU's guest", "from QEMU's guest"}[i], res)
	}
}
