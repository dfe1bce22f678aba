package udp_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/udp"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// groupPeer makes a tunnel of the kernel's there that finds its peers through a group.
func (l *lab) groupPeer(group string, mtu int) {
	l.Helper()
	if err := l.Try(fmt.Sprintf("ip -n %s link add tun0 type vxlan id 42 group %s dev v0 dstport 4789", l.There, group)); err != nil {
		require.Skip(l, "vxlan", "the kernel has no vxlan: %v", err)
	}
	l.Run(fmt.Sprintf("ip -n %s link set tun0 mtu %d up", l.There, mtu))
	l.Run(fmt.Sprintf("ip netns exec %s %s -K tun0 gro off", l.There, require.Tool(l, "netns", "ethtool"))) // as in peer
}

// TestKernelGroup has the device find the kernel's vxlan through a group, and talk to it.
func TestKernelGroup(t *testing.T) {
	for _, c := range []struct{ name, group, options string }{
		{"local", "239.1.1.1", ",local=" + hereIP},
		{"dev", "239.1.1.1", ",dev=v0"},
		{"route", "239.1.1.1", ""},
		{"both", "239.1.1.1", ",zerocopy=on,ttl=4,dev=v0,local=" + hereIP},
		{"link-local", "224.0.0.77", ",local=" + hereIP},
		{"IPv6", "ff15::42", ",dev=v0"},
		{"IPv6 link-local", "ff02::42", ",dev=v0,zerocopy=on"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t, 20000)
			if netip.MustParseAddr(c.group).Is6() {
				l.v6()
			}
			if c.options == "" {
				l.Run("ip -n " + l.Here + " route add 239.0.0.0/8 dev v0")
			}
			l.groupPeer(c.group, 16000)
			netdevtest.Run(t, func(t *testing.T) netdevtest.Harness {
				l := &lab{l.For(t)}
				p := l.Wire(l.There, "tun0")
				d := l.device("vxlan:vni=42,remote=" + c.group + c.options)
				if mtu := d.Capabilities().MTU; mtu != 20000-50 && mtu != 20000-70 {
					t.Errorf("MTU %d over a cable of 20000 bytes", mtu)
				}
				return netdevtest.Harness{
					Device: d, MaxFrame: 16000 + etherLen,
					Capture: func() (virtio.NetHdr, []byte) { return virtio.NetHdr{}, p.Recv(suite) },
					Inject:  p.Send,
					Close:   p.Close,
				}
			})
		})
	}
}

// v6 gives both ends IPv6 addresses, of their own link too.
func (l *lab) v6() {
	l.Helper()
	for ns, ip := range map[string]string{l.Here: "fd00:9::1/64", l.There: "fd00:9::2/64"} {
		if err := l.Try("ip netns exec " + ns + " sysctl -qw net.ipv6.conf.v0.disable_ipv6=0 net.ipv6.conf.v0.accept_dad=0"); err != nil {
			require.Skip(l, "netns", "the kernel has no IPv6: %v", err)
		}
		l.Run("ip -n " + ns + " link set v0 down") // it takes an address of its own link when it is up again
		l.Run("ip -n " + ns + " address add " + ip + " dev v0 nodad")
	}
	l.Up()
}

// TestGroupAndPeers: a frame for all goes to the group and to each host; whoever answers is sent to alone, and group or not he is heard.
func TestGroupAndPeers(t *testing.T) {
	l := newLab(t, 1500)
	wire := l.Wire(l.There, "v0")
	defer wire.Close()
	d := l.device("vxlan:vni=42,local=" + hereIP + ",remote=239.1.1.1;10.9.0.2,ttl=7,zerocopy=off")
	defer func() { must(t, d.Close()) }()
	q, s := d.Queue(0), newSent()
	frame := netdevtest.Frame(100, 1)
	sends := func(dst string) {
		t.Helper()
		if q.Send([]*zerocopy.Buffer{s.buffer(frame)}) != 1 {
			t.Fatal("not taken")
		}
		s.want(t, zerocopy.Copied)
		packet := wire.Recv(func(b []byte) bool { // IPv4 and UDP, to the tunnel's port
			return binary.BigEndian.Uint16(b[12:]) == 0x0800 && b[23] == 17 && binary.BigEndian.Uint16(b[36:]) == 4789
		})
		if got := net.IP(packet[30:34]).String(); got != dst || packet[22] != 7 || !bytes.Equal(packet[50:], frame) {
			t.Errorf("to %s with %d hops, want %s with 7", got, packet[22], dst)
		}
	}
	hears := func(from net.IP, to string, src byte) {
		t.Helper()
		const f = virtio.FVersion1 | virtio.FNetMrgRxbuf
		g := netdevtest.NewGuest(t, 16, f)
		g.Post(2, 2000)
		p := zerocopy.NewPosted(g.Ring, f)
		var conn *net.UDPConn
		l.In(l.There, func() (err error) {
			conn, err = net.DialUDP("udp4", &net.UDPAddr{IP: from}, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to)))
			return err
		})
		defer conn.Close()
		answer := netdevtest.Frame(60, 2)
		answer[6], answer[11] = 2, src
		if _, err := conn.Write(append([]byte{8, 0, 0, 0, 0, 0, 42, 0}, answer...)); err != nil {
			t.Fatal(err)
		}
		vhosttest.Eventually(t, "the answer", func() bool {
			_, _, err := q.Recv(p, 1)
			must(t, err)
			_, b := g.Take()
			return bytes.Equal(b, answer)
		})
		copy(frame, answer[6:12]) // from now on, to whom it came from
	}
	l.Run("ip -n " + l.There + " address add 10.9.0.3/24 dev v0")
	l.Run("ip -n " + l.Here + " neighbour replace 10.9.0.3 lladdr 02:00:00:00:00:02 dev v0")
	sends("239.1.1.1")
	wire.Recv(func(b []byte) bool { return bytes.Equal(b[30:34], []byte{10, 9, 0, 2}) })
	hears(net.IPv4(10, 9, 0, 3), hereIP+":4789", 1)
	sends("10.9.0.3")
	hears(net.IPv4(10, 9, 0, 2), hereIP+":4789", 2)
	sends("10.9.0.2")
	l.Run("ip -n " + l.There + " route add 239.0.0.0/8 dev v0")
	hears(net.IPv4(10, 9, 0, 3), "239.1.1.1:4789", 3)
	sends("10.9.0.3")
	if n := d.Stats().Flooded; n != 1 {
		t.Errorf("%d frames went to several peers", n)
	}
}

// TestGroupByPage: what goes to a group leaves once, and so without a copy.
func TestGroupByPage(t *testing.T) {
	eachEngine(t, func(t *testing.T, engine string) {
		l := newLab(t, 1500)
		l.sink()
		d := l.device("vxlan:vni=42,remote=239.1.1.1,dev=i0,zerocopy=on" + engine)
		defer func() { must(t, d.Close()) }()
		s := newSent()
		for i := range 10 {
			if d.Queue(0).Send([]*zerocopy.Buffer{s.buffer(netdevtest.Frame(big, uint32(i)))}) != 1 {
				t.Fatal("not taken")
			}
			s.want(t, zerocopy.ZeroCopied)
		}
	})
}

// TestGroupNowhere: what a group lacks is said.
func TestGroupNowhere(t *testing.T) {
	l := newLab(t, 1500)
	for options, want := range map[string]string{
		"remote=239.1.1.1": "no route", "remote=239.1.1.1,mtu=1400": "name one with dev=", "remote=239.1.1.1,dev=v9": "is there such an interface",
	} {
		o, err := udp.ParseOptions("vxlan:vni=42," + options)
		must(t, err)
		must(t, l.Enter(l.Here, func() error {
			if d, err := udp.Open(o); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, %v, want %q", options, d, err, want)
			}
			return nil
		}))
	}
}
