// Package virtio holds the words of the virtio 1.2 specification as Go values: feature bits, the virtio-net header and
// device configuration, and the layouts of split virtqueues in memory. It imports nothing of vhostd and does no I/O.
//
// All multi-byte fields are little-endian, as for every VIRTIO_F_VERSION_1 device (virtio-v1.2 §2.4). A legacy driver uses
// the guest's own byte order, which on the hosts that vhostd runs on (amd64, arm64) is little-endian as well.
package virtio

import (
	"fmt"
	"math/bits"
	"strings"
)

// Features is a set of virtio feature bits (virtio-v1.2 §2.2): bit n of the value is feature n.
type Features uint64

// Device-independent and virtio-net feature bits (virtio-v1.2 §6 and §5.1.3).
const (
	FNetCsum          Features = 1 << 0  // device handles frames with a partial checksum
	FNetGuestCsum     Features = 1 << 1  // driver handles frames with a partial checksum
	FNetCtrlOffloads  Features = 1 << 2  // driver can change its offloads at run time
	FNetMTU           Features = 1 << 3  // config field mtu is valid
	FNetMAC           Features = 1 << 5  // config field mac is valid
	FNetGuestTSO4     Features = 1 << 7  // driver can receive TSOv4
	FNetGuestTSO6     Features = 1 << 8  // driver can receive TSOv6
	FNetGuestECN      Features = 1 << 9  // driver can receive TSO with ECN
	FNetGuestUFO      Features = 1 << 10 // driver can receive UFO
	FNetHostTSO4      Features = 1 << 11 // device can receive TSOv4
	FNetHostTSO6      Features = 1 << 12 // device can receive TSOv6
	FNetHostECN       Features = 1 << 13 // device can receive TSO with ECN
	FNetHostUFO       Features = 1 << 14 // device can receive UFO
	FNetMrgRxbuf      Features = 1 << 15 // driver can merge receive buffers
	FNetStatus        Features = 1 << 16 // config field status is valid
	FNetCtrlVQ        Features = 1 << 17 // control channel is available
	FNetCtrlRX        Features = 1 << 18 // control channel: receive modes
	FNetCtrlVLAN      Features = 1 << 19 // control channel: VLAN filtering
	FNetGuestAnnounce Features = 1 << 21 // driver can send gratuitous packets
	FNetMQ            Features = 1 << 22 // device supports several queue pairs
	FNetCtrlMACAddr   Features = 1 << 23 // control channel: MAC address
	FNotifyOnEmpty    Features = 1 << 24 // legacy: notify when the available ring runs empty
	FLogAll           Features = 1 << 26 // vhost: log all writes to guest memory
	FAnyLayout        Features = 1 << 27 // legacy: arbitrary descriptor layouts
	FIndirectDesc     Features = 1 << 28 // VIRTIO_F_INDIRECT_DESC
	FEventIdx         Features = 1 << 29 // VIRTIO_F_EVENT_IDX
	FProtocolFeatures Features = 1 << 30 // VHOST_USER_F_PROTOCOL_FEATURES
	FVersion1         Features = 1 << 32 // VIRTIO_F_VERSION_1
	FAccessPlatform   Features = 1 << 33 // VIRTIO_F_ACCESS_PLATFORM
	FRingPacked       Features = 1 << 34 // VIRTIO_F_RING_PACKED
	FInOrder          Features = 1 << 35 // VIRTIO_F_IN_ORDER
	FNetGuestUSO4     Features = 1 << 54 // driver can receive USOv4
	FNetGuestUSO6     Features = 1 << 55 // driver can receive USOv6
	FNetHostUSO       Features = 1 << 56 // device can receive USO
)

var featureNames = map[Features]string{
	FNetCtrlOffloads: "CTRL_GUEST_OFFLOADS", FNetCtrlRX: "CTRL_RX", FNetCtrlVLAN: "CTRL_VLAN", FNetCtrlMACAddr: "CTRL_MAC_ADDR",
	FNetCsum: "CSUM", FNetGuestCsum: "GUEST_CSUM", FNetMTU: "MTU", FNetMAC: "MAC",
	FNetGuestTSO4: "GUEST_TSO4", FNetGuestTSO6: "GUEST_TSO6", FNetGuestECN: "GUEST_ECN", FNetGuestUFO: "GUEST_UFO",
	FNetHostTSO4: "HOST_TSO4", FNetHostTSO6: "HOST_TSO6", FNetHostECN: "HOST_ECN", FNetHostUFO: "HOST_UFO",
	FNetMrgRxbuf: "MRG_RXBUF", FNetStatus: "STATUS", FNetCtrlVQ: "CTRL_VQ", FNetGuestAnnounce: "GUEST_ANNOUNCE",
	FNetMQ: "MQ", FNotifyOnEmpty: "NOTIFY_ON_EMPTY", FLogAll: "LOG_ALL", FAnyLayout: "ANY_LAYOUT",
	FIndirectDesc: "INDIRECT_DESC", FEventIdx: "EVENT_IDX", FProtocolFeatures: "PROTOCOL_FEATURES",
	FVersion1: "VERSION_1", FAccessPlatform: "ACCESS_PLATFORM", FRingPacked: "RING_PACKED", FInOrder: "IN_ORDER",
	FNetGuestUSO4: "GUEST_USO4", FNetGuestUSO6: "GUEST_USO6", FNetHostUSO: "HOST_USO",
}

// Has reports whether every bit of want is in f.
func (f Features) Has(want Features) bool { return f&want == want }

// String lists the feature names in bit order; a bit without a name shows as "bit N".
func (f Features) String() string {
	var names []string
	for rest := uint64(f); rest != 0; rest &= rest - 1 {
		n := bits.TrailingZeros64(rest)
		name, ok := featureNames[1<<n]
		if !ok {
			name = fmt.Sprintf("bit %d", n)
		}
		names = append(names, name)
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ",")
}
