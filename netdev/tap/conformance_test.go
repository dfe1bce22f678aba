package tap

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/virtio"
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
				must(t, unix.SetsockoptInt(w.fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1))
				return netdevtest.Harness{
					Device: d, MaxFrame: 9014, Capture: w.capture, Close: w.close,
					Inject: func(f []byte) { w.send(append(make([]byte, virtio.NetHdrSizeLegacy), f...)) },
				}
			})
		})
	}
}

// capture returns the next frame of the suite's with what is left to do for it, from a socket with PACKET_VNET_HDR.
func (w *wire) capture() (virtio.NetHdr, []byte) {
	w.Helper()
	b := make([]byte, 1<<17)
	for {
		n, err := unix.Read(w.fd, b)
		if err == unix.EINVAL {
			continue // a frame that lied, of a kind for which the socket has no header
		}
		must(w, err)
		hdr, f := virtio.DecodeNetHdr(b[:virtio.NetHdrSizeLegacy]), b[virtio.NetHdrSizeLegacy:n]
		switch binary.BigEndian.Uint16(f[12:]) {
		case netdevtest.EtherType, unix.ETH_P_IP, unix.ETH_P_IPV6:
			if hdr.Flags&virtio.NetHdrNeedsCsum == 0 {
				hdr = virtio.NetHdr{}
			}
			return hdr, f
		}
	}
}
