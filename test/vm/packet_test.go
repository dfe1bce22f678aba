//go:build linux

package vm

import (
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/virtio"
)

// The ends of the wire: vhostd's, and the servers' with the host's addresses.
const (
	packetName = "vpkt0"
	packetFar  = "vpkt1"
	packetSize = 64 << 20
)

// TestPacket: a guest on one end of a veth pair, through packet sockets; the other end is in another namespace.
func TestPacket(t *testing.T) {
	needVhostd(t)
	r := newRig(t, "packet:"+packetName)
	mine, err := netlab.New()
	must(t, err)
	t.Cleanup(mine.Close)
	r.dopts.Namespace = mine
	must(t, veth(mine, r.ns))
	r.startVhostd()
	r.startMachine()
	r.waitBoot()
	r.configureGuest()
	r.features(virtio.FVersion1|virtio.FNetMrgRxbuf|virtio.FNetCsum|virtio.FNetGuestCsum|virtio.FNetHostTSO4|virtio.FNetGuestTSO4, 0)
	r.ping(hostIP, 1472)
	r.ping(hostIP6, 1452)
	r.udp(hostIP, 1472)
	r.tcp(hostIP, packetSize)
	r.guestServes()
	r.healthy()
}

// veth joins two namespaces.
func veth(near, far *netlab.Namespace) error {
	var other netns.NsHandle
	if err := far.Do(func() (err error) { other, err = netns.Get(); return err }); err != nil {
		return err
	}
	defer other.Close()
	err := near.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = packetName
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: packetFar, PeerNamespace: netlink.NsFd(other)})
	})
	if err != nil {
		return err
	}
	if err := near.SetLink(netlab.Link{Name: packetName}); err != nil {
		return err
	}
	return far.SetLink(netlab.Link{Name: packetFar, Wait: 20 * time.Second, Addrs: []string{hostIP + "/24", hostIP6 + "/64"}})
}
