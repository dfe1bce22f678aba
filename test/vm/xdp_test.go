//go:build linux

package vm

import (
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/virtio"
)

// The cable of the AF_XDP tests: vhostd has one end, in a namespace of its own, the servers the other.
const (
	cableNear = "xdp0"
	cableFar  = "xdp1"
)

// newXDPRig is a rig whose guest has one end of a cable and whose servers have the other, with addresses on both.
func newXDPRig(t *testing.T, options string) *rig {
	t.Helper()
	needVhostd(t)
	r := newRig(t, "xdp:"+cableNear+options)
	near, err := netlab.New()
	must(t, err)
	t.Cleanup(near.Close)
	r.dopts.Namespace = near
	var there netns.NsHandle
	must(t, r.ns.Do(func() (err error) { there, err = netns.Get(); return err }))
	defer there.Close()
	must(t, near.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: cableNear}, PeerName: cableFar, PeerNamespace: netlink.NsFd(there)})
	}))
	// XDP sees frames as the peer's stack sends them: with checksums, and no longer than the MTU, only where it is told to do that itself.
	run(t, r.ns, require.Tool(t, part, "ethtool"), "-K", cableFar, "tx", "off", "tso", "off", "gso", "off")
	must(t, r.ns.SetLink(netlab.Link{Name: cableFar, Addrs: []string{hostIP + "/24", hostIP6 + "/64"}}))
	r.startVhostd()
	r.boot()
	r.configureGuest()
	return r
}

// TestXDP: a guest over AF_XDP, by way of private memory and over its own as the socket's.
func TestXDP(t *testing.T) {
	for _, c := range []struct {
		name, options, outcome string
		size                   uint64
	}{
		{"private", "", "copied", smallSize},
		{"registered", ",no-balloon=on,zerocopy=on", "copied_anyway", transferSize},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newXDPRig(t, c.options)
			r.features(virtio.FVersion1|virtio.FNetMrgRxbuf|virtio.FNetCsum|virtio.FNetHostTSO4, 0)
			r.ping(hostIP, 1472)
			r.ping(hostIP6, 1452)
			r.udp(hostIP, 8, 1472)
			r.tcp(hostIP, c.size)
			r.healthy()
			o := r.outcomes()
			r.logf("outcomes %v", o)
			for name, n := range o {
				if name != c.outcome && n > 0 && name != "copied_fallback" || o[c.outcome] < 50*o["copied_fallback"] {
					t.Errorf("outcomes %v, want nearly all %s", o, c.outcome)
				}
			}
		})
	}
}
