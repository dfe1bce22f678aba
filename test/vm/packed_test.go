//go:build linux

package vm

import (
	"testing"

	"github.com/vhostd/vhostd/virtio"
)

// TestTapPacked: packed rings, which QEMU offers its guest only when asked to.
func TestTapPacked(t *testing.T) {
	for _, tt := range []struct {
		name  string
		props []string
		off   virtio.Features
	}{
		{"packed=on", []string{"packed=on"}, 0},
		{"packed=on, plain", []string{"packed=on", "mrg_rxbuf=off", "event_idx=off", "indirect_desc=off"},
			virtio.FNetMrgRxbuf | virtio.FEventIdx | virtio.FIndirectDesc},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newTapRig(t, func(r *rig) { r.mopts.DeviceProps = tt.props })
			r.features(virtio.FVersion1|virtio.FRingPacked, tt.off)
			r.everything(smallSize)
			r.guestServes()
		})
	}
}
