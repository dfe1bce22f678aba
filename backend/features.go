package backend

import (
	"fmt"

	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
)

// Limits of the MTU in bytes: the least that IPv4 allows (virtio-v1.2 §5.1.4.1), and the largest IP packet.
const (
	minMTU = 68
	maxMTU = 65535
)

// always are the features of every device: what its netdev lacks of the offloads is done in software.
const always = virtio.FVersion1 | virtio.FAnyLayout | virtio.FNotifyOnEmpty | virtio.FIndirectDesc | virtio.FEventIdx |
	virtio.FInOrder | virtio.FRingPacked | virtio.FProtocolFeatures |
	virtio.FNetMrgRxbuf | virtio.FNetStatus | virtio.FNetGuestAnnounce |
	virtio.FNetCsum | virtio.FNetHostTSO4 | virtio.FNetHostTSO6 | virtio.FNetHostECN | virtio.FNetHostUFO | virtio.FNetHostUSO |
	virtio.FNetGuestCsum | virtio.FNetGuestTSO4 | virtio.FNetGuestTSO6 | virtio.FNetGuestECN | virtio.FNetGuestUFO |
	virtio.FNetGuestUSO4 | virtio.FNetGuestUSO6

// offered are the features that a backend with options o offers.
func offered(o Options) (virtio.Features, vhostuser.ProtocolFeatures) {
	f := always
	if o.MAC != [6]byte{} {
		f |= virtio.FNetMAC
	}
	if o.MTU != 0 {
		f |= virtio.FNetMTU
	}
	if o.MaxPairs > 1 {
		f |= virtio.FNetMQ
	}
	p := vhostuser.ProtocolMQ | vhostuser.ProtocolRARP | vhostuser.ProtocolReplyAck | vhostuser.ProtocolNetMTU |
		vhostuser.ProtocolBackendReq | vhostuser.ProtocolBackendSendFD | vhostuser.ProtocolConfig |
		vhostuser.ProtocolResetDevice | vhostuser.ProtocolConfigureMemSlots | vhostuser.ProtocolStatus
	return f &^ (o.Disable &^ virtio.FProtocolFeatures), p
}

// requires lists, for features that only make sense with others, what they need (virtio-v1.2 §5.1.3.1).
var requires = []struct{ feature, anyOf virtio.Features }{
	{virtio.FNetGuestTSO4, virtio.FNetGuestCsum},
	{virtio.FNetGuestTSO6, virtio.FNetGuestCsum},
	{virtio.FNetGuestUFO, virtio.FNetGuestCsum},
	{virtio.FNetGuestUSO4, virtio.FNetGuestCsum},
	{virtio.FNetGuestUSO6, virtio.FNetGuestCsum},
	{virtio.FNetGuestECN, virtio.FNetGuestTSO4 | virtio.FNetGuestTSO6},
	{virtio.FNetHostTSO4, virtio.FNetCsum},
	{virtio.FNetHostTSO6, virtio.FNetCsum},
	{virtio.FNetHostUFO, virtio.FNetCsum},
	{virtio.FNetHostUSO, virtio.FNetCsum},
	{virtio.FNetHostECN, virtio.FNetHostTSO4 | virtio.FNetHostTSO6},
}

// usable drops the offloads whose requirements the driver did not accept: a driver must not accept such a set, but a front-end may
// pass it on before the driver has chosen.
func usable(f virtio.Features) virtio.Features {
	for _, r := range requires {
		if f&r.feature != 0 && f&r.anyOf == 0 {
			f &^= r.feature
		}
	}
	return f
}

// netConfig is the device configuration space.
func (s *session) netConfig() virtio.NetConfig {
	o := s.b.opts
	mtu := o.MTU
	if s.mtu != 0 {
		mtu = int(s.mtu)
	}
	return virtio.NetConfig{MAC: o.MAC, Status: virtio.NetStatusLinkUp, MaxPairs: uint16(o.MaxPairs), MTU: uint16(mtu)}
}

// GetConfig implements vhostuser.Handler. Fields behind those of the offered features read as zero.
func (s *session) GetConfig(offset, size uint32) ([]byte, error) {
	if size == 0 {
		return nil, fmt.Errorf("configuration space: size 0")
	}
	space := make([]byte, vhostuser.MaxConfigSize)
	copy(space, s.netConfig().Encode())
	return space[offset : offset+size], nil
}

// SetConfig implements vhostuser.Handler: every field is read-only for the driver (virtio-v1.2 §5.1.4), and a front-end that restores a
// device after a migration may only restore what it is.
func (s *session) SetConfig(c vhostuser.DeviceConfig) error {
	have, _ := s.GetConfig(c.Offset, uint32(len(c.Data)))
	if c.Flags == vhostuser.ConfigMigration && string(have) == string(c.Data) {
		return nil
	}
	return fmt.Errorf("configuration space: bytes %d to %d are read-only", c.Offset, int(c.Offset)+len(c.Data))
}

// NetSetMTU implements vhostuser.Handler.
func (s *session) NetSetMTU(mtu uint16) error {
	caps := s.b.dev.Capabilities()
	if mtu < minMTU || (caps.MTU != 0 && int(mtu) > caps.MTU) {
		return fmt.Errorf("MTU %d: %s %s carries %d to %d bytes", mtu, caps.Kind, caps.Name, minMTU, caps.MTU)
	}
	s.mtu = mtu
	return nil
}
