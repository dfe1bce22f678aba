package user

import (
	"testing"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/netdev/netdevtest"
)

// TestDevice: the far end is no Ethernet, but a router that frames can be made to come from.
func TestDevice(t *testing.T) {
	netdevtest.Run(t, func(t *testing.T) netdevtest.Harness {
		o, err := ParseOptions("ipv6=off,restrict=on")
		must(t, err)
		d, err := open(o)
		must(t, err)
		must(t, d.SetPairs(1))
		// Recv frees into pools, which grow when more is freed than was taken.
		return netdevtest.Harness{Device: d, Inject: d.link.sendFrame, RecvAllocates: true, SendAllocates: require.Race}
	})
}
