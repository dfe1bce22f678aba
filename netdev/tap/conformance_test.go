package tap

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev/netdevtest"
)

// TestDevice runs the suite on the forms of a tap, with a packet socket on its interface as the far end.
func TestDevice(t *testing.T) {
	for _, c := range []struct {
		name string
		open func(t *testing.T) *Device
	}{
		{"tap", func(t *testing.T) *Device { return open(t, "tap:t0,mtu=9000") }},
		{"io-uring=on", func(t *testing.T) *Device { return open(t, "tap:t0,mtu=9000,io-uring=on") }},
		{"io-uring=off", func(t *testing.T) *Device { return open(t, "tap:t0,mtu=9000,io-uring=off") }},
		{"queues=3", func(t *testing.T) *Device { return open(t, "tap:t0,mtu=9000,queues=3") }},
		{"fd", func(t *testing.T) *Device {
			up := true
			return openWith(t, Options{FDs: []int{rawTap(t, "t0", sys.TunTap|sys.TunNoPI)}, MTU: 9000, Up: &up})
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var inside *testing.T // the subtest that has its namespace
			netdevtest.Run(t, func(t *testing.T) netdevtest.Harness {
				if inside != t {
					inNetns(t)
					inside = t
				}
				d := c.open(t)
				w := newWire(t, "t0")
				w.Set(unix.PACKET_VNET_HDR, 1)
				return netdevtest.Harness{
					Device: d, MaxFrame: 9014, Capture: w.Capture, Close: w.Close,
					Inject: w.Inject,
				}
			})
		})
	}
}
