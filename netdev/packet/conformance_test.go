package packet

import (
	"testing"

	"github.com/vhostd/vhostd/netdev/netdevtest"
)

// TestDevice runs the suite on the forms of the device, with an ordinary packet socket at the other end of a veth pair.
func TestDevice(t *testing.T) {
	for _, options := range []string{"", ",vnet-hdr=off", ",queues=3,qdisc-bypass=on,promisc=off"} {
		t.Run("packet"+options, func(t *testing.T) {
			var inside *testing.T // the subtest that has its namespace
			netdevtest.Run(t, func(t *testing.T) netdevtest.Harness {
				if inside != t {
					inNetns(t)
					inside = t
				}
				d := open(t, "packet:"+devName+options)
				w := newWire(t)
				return netdevtest.Harness{
					Device: d, MaxFrame: testMTU + 14, Capture: w.Capture, Inject: w.Inject, Close: w.Close,
				}
			})
		})
	}
}
