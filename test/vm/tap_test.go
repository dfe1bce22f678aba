//go:build linux

package vm

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/test/vm/rpc"
	"github.com/vhostd/vhostd/test/vm/stream"
	"github.com/vhostd/vhostd/virtio"
)

// The link between the guest and its namespace.
const (
	tapName  = "vtap0"
	hostIP   = "10.88.0.1"
	guestIP  = "10.88.0.2"
	hostIP6  = "fd88::1"
	guestIP6 = "fd88::2"
	// transferSize is what each TCP direction carries.
	transferSize = 256 << 20
)

// newTapRig is a rig whose guest hangs on a tap device in the namespace, booted and with addresses on both ends.
func newTapRig(t *testing.T, change func(*rig)) *rig {
	t.Helper()
	r := newRig(t, "tap:"+tapName)
	if qemuBackend() {
		r.mopts.Netdev = "tap,id=n0,script=no,downscript=no,ifname=" + tapName
	}
	if change != nil {
		change(r)
	}
	if qemuBackend() && r.mopts.QueuePairs > 1 {
		r.mopts.Netdev += fmt.Sprintf(",queues=%d", r.mopts.QueuePairs)
	}
	r.startVhostd()
	r.startMachine()
	r.configureHost()
	r.waitBoot()
	r.configureGuest()
	return r
}

// configureHost sets up the namespace's end, once the device is there.
func (r *rig) configureHost() {
	r.t.Helper()
	must(r.t, r.ns.SetLink(netlab.Link{Name: tapName, Wait: 20 * time.Second,
		Addrs: []string{hostIP + "/24", hostIP6 + "/64"}}))
}

// configureGuest sets up the guest's end.
func (r *rig) configureGuest() {
	r.t.Helper()
	l := r.link(rpc.LinkArgs{Name: "eth0", Wait: 20 * time.Second, Up: true,
		Addrs: []string{guestIP + "/24", guestIP6 + "/64"}})
	r.logf("guest eth0: %s, mtu %d, %v", l.MAC, l.MTU, l.Addrs)
}

// setMTU sets both ends.
func (r *rig) setMTU(mtu int) {
	r.t.Helper()
	must(r.t, r.ns.SetLink(netlab.Link{Name: tapName, MTU: mtu}))
	r.link(rpc.LinkArgs{Name: "eth0", MTU: mtu})
}

// ping sends three echo requests that must not be fragmented, and wants three answers.
func (r *rig) ping(addr string, size int) {
	r.t.Helper()
	p, err := r.vm.Ping(r.ctx, rpc.PingArgs{Addr: addr, Size: size, Count: 3, DF: true})
	must(r.t, err)
	r.logf("ping %s, %d bytes: %d of %d answered, fastest %v", addr, size, p.Received, p.Sent, p.Fastest)
	if p.Received != p.Sent || p.Bad != 0 {
		r.t.Errorf("ping %s with %d bytes: %+v, want every reply and none bad", addr, size, p)
	}
}

// tcp moves n bytes each way over one connection after the other, checked at both ends.
func (r *rig) tcp(host string, n uint64) {
	r.t.Helper()
	r.tcpArgs(rpc.TCPArgs{Addr: netlab.At(host, r.servers.Stream), Bytes: n})
}

func (r *rig) tcpArgs(a rpc.TCPArgs) {
	r.t.Helper()
	for _, way := range []struct {
		name string
		mode stream.Mode
	}{{"guest to host", stream.Sink}, {"host to guest", stream.Source}} {
		a.Mode, a.Seed = way.mode, a.Seed+100
		res, err := r.vm.TCP(r.ctx, a)
		if err != nil {
			r.t.Fatalf("TCP %s: %v", way.name, err)
		}
		r.logf("TCP %s via %s: %v", way.name, a.Addr, res)
		r.checkServed(max(a.Streams, 1), a.Bytes)
	}
}

// checkServed holds the server's view of the last transfers against what was asked for. Connections of other transfers, which
// a reboot has cut, may end meanwhile and do not count.
func (r *rig) checkServed(streams int, bytes uint64) {
	r.t.Helper()
	each, n := bytes/uint64(streams), 0
	var sum uint64
	eventually(r.t, 20*time.Second, "the server's end of the transfer", func() bool {
		for _, s := range r.servers.Served() {
			if s.Header.Bytes != each {
				continue
			}
			n++
			sum += s.Result.Bytes
			if s.Err != nil {
				r.t.Errorf("server: %v", s.Err)
			}
		}
		return n >= streams
	})
	if sum != each*uint64(streams) {
		r.t.Errorf("server saw %d bytes in %d connections, want %d", sum, n, each*uint64(streams))
	}
}

// udp sends datagrams of each size to the echo server. Losing one in a hundred is allowed to UDP, damage never.
func (r *rig) udp(host string, sizes ...int) {
	r.t.Helper()
	const count = 200
	for _, size := range sizes {
		c, err := r.vm.UDP(r.ctx, rpc.UDPArgs{Addr: netlab.At(host, r.servers.Echo), Size: size, Count: count, Seed: 5})
		must(r.t, err)
		r.logf("UDP echo %s, %d bytes: %d sent, %d back", host, size, c.Sent, c.Received)
		if c.Bad != 0 || c.Repeated != 0 || c.Received < count-count/100 {
			r.t.Errorf("UDP echo with %d bytes: %+v, want at least %d back, none bad or repeated", size, c, count-count/100)
		}
	}
}

// offloads switches the guest's and returns how ethtool shows them.
func (r *rig) offloads(settings ...string) {
	r.t.Helper()
	r.exec(append([]string{"ethtool", "-K", "eth0"}, settings...)...)
	var shown []string
	for line := range strings.Lines(r.exec("ethtool", "-k", "eth0")) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch name {
		case "rx-checksumming", "tx-checksumming", "tcp-segmentation-offload", "generic-segmentation-offload":
			shown = append(shown, name+" "+value)
		}
	}
	r.logf("guest: ethtool -K eth0 %s: %s", strings.Join(settings, " "), strings.Join(shown, ", "))
}

// features checks negotiated bits against what the test asked QEMU for.
func (r *rig) features(on, off virtio.Features) {
	r.t.Helper()
	f, err := r.vm.Features(r.ctx, "eth0")
	must(r.t, err)
	r.logf("negotiated: %v", f)
	if !f.Has(on) {
		r.t.Errorf("not negotiated: %v", on&^f)
	}
	if f&off != 0 {
		r.t.Errorf("negotiated although QEMU was told off: %v", f&off)
	}
}

// everything is the traffic that each form of the device must carry; size is that of a TCP transfer.
func (r *rig) everything(size uint64) {
	r.t.Helper()
	r.ping(hostIP, 56)
	r.ping(hostIP, 1472)
	r.ping(hostIP6, 1452)
	r.udp(hostIP, 8, 1472)
	r.udp(hostIP6, 1452)
	r.tcp(hostIP, size)
	r.setMTU(9000)
	r.ping(hostIP, 8972)
	r.ping(hostIP6, 8952)
	r.udp(hostIP, 8972, 32768)
	r.setMTU(1500)
	r.healthy()
}

// TestTap: a guest with every offload on, through tap.
func TestTap(t *testing.T) {
	r := newTapRig(t, nil)
	r.features(virtio.FVersion1|virtio.FNetMrgRxbuf|virtio.FEventIdx|virtio.FIndirectDesc|virtio.FNetCsum|virtio.FNetGuestCsum|
		virtio.FNetHostTSO4|virtio.FNetHostTSO6|virtio.FNetGuestTSO4|virtio.FNetGuestTSO6, 0)
	r.everything(transferSize)
	r.tcp(hostIP6, transferSize)
	r.guestServes()
}

// guestServes: connections and datagrams that the host begins.
func (r *rig) guestServes() {
	r.t.Helper()
	must(r.t, r.vm.Serve(r.ctx, rpc.ServeArgs{Stream: 7001}))
	for _, ip := range []string{guestIP, guestIP6} {
		var conn net.Conn
		must(r.t, r.ns.Do(func() (err error) {
			conn, err = net.DialTimeout("tcp", net.JoinHostPort(ip, "7001"), 20*time.Second)
			return err
		}))
		_ = conn.SetDeadline(time.Now().Add(3 * time.Minute))
		res, err := stream.Transfer(conn, stream.Header{Mode: stream.Source, Seed: 77, Bytes: 16 << 20})
		conn.Close()
		must(r.t, err)
		r.logf("TCP that the host began, from %s: %v", ip, res)
	}
}

// TestTapOffloads: with checksum and segmentation done by the guest instead of by the device.
func TestTapOffloads(t *testing.T) {
	r := newTapRig(t, nil)
	for _, settings := range [][]string{
		{"tx", "off", "gso", "off"},              // guest: checksum and MTU-sized segments
		{"tx", "on", "tso", "off", "gso", "off"}, // guest: MTU-sized segments; device: checksum
		{"tx", "on", "tso", "on", "gso", "on"},   // device: both
	} {
		r.offloads(settings...)
		r.ping(hostIP, 1472)
		r.udp(hostIP, 1472)
		r.tcp(hostIP, transferSize)
	}
	r.healthy()
}

// TestTapNoOffloads: a guest whose device does nothing for it: vhostd, or the kernel for it, makes checksums and segments.
func TestTapNoOffloads(t *testing.T) {
	r := newTapRig(t, func(r *rig) { r.mopts.DeviceProps = noOffloads })
	r.features(virtio.FVersion1, offloadBits)
	r.everything(smallSize)
	r.tcp(hostIP6, smallSize)
	r.guestServes()
}

// TestTapDevice: forms of the device that a user may ask QEMU for.
func TestTapDevice(t *testing.T) {
	for _, tt := range []struct {
		name  string
		props []string
		off   virtio.Features
		rings int // entries, as ethtool shows them
	}{
		{"mrg_rxbuf=off", []string{"mrg_rxbuf=off"}, virtio.FNetMrgRxbuf, 256},
		{"event_idx=off", []string{"event_idx=off"}, virtio.FEventIdx, 256},
		{"indirect_desc=off", []string{"indirect_desc=off"}, virtio.FIndirectDesc, 256},
		// QEMU makes no ring of fewer than 256 entries.
		{"queue_size=1024", []string{"rx_queue_size=1024", "tx_queue_size=1024"}, 0, 1024},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newTapRig(t, func(r *rig) { r.mopts.DeviceProps = tt.props })
			r.features(virtio.FVersion1, tt.off)
			r.rings(tt.rings)
			r.everything(transferSize)
		})
	}
}

// rings checks the size of the transmitq against what the test asked QEMU for.
func (r *rig) rings(want int) {
	r.t.Helper()
	out := r.exec("ethtool", "-g", "eth0")
	_, current, _ := strings.Cut(out, "Current hardware settings:")
	r.logf("guest's rings: %s", strings.Join(strings.Fields(current), " "))
	if !strings.Contains(strings.Join(strings.Fields(current), " "), fmt.Sprintf("TX: %d", want)) {
		r.t.Errorf("ethtool -g shows %q, want TX %d", current, want)
	}
}
