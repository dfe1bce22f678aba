package offload

import (
	"math"
	"testing"

	"github.com/vhostd/vhostd/virtio"
)

func TestSetOfFeatures(t *testing.T) {
	host := map[virtio.Features]Set{
		virtio.FNetCsum: Csum, virtio.FNetHostTSO4: TSO4, virtio.FNetHostTSO6: TSO6, virtio.FNetHostECN: ECN,
		virtio.FNetHostUFO: UFO, virtio.FNetHostUSO: USO4 | USO6, virtio.FNetGuestCsum: 0, virtio.FVersion1: 0,
	}
	guest := map[virtio.Features]Set{
		virtio.FNetGuestCsum: Csum, virtio.FNetGuestTSO4: TSO4, virtio.FNetGuestTSO6: TSO6, virtio.FNetGuestECN: ECN,
		virtio.FNetGuestUFO: UFO, virtio.FNetGuestUSO4: USO4, virtio.FNetGuestUSO6: USO6, virtio.FNetCsum: 0,
	}
	for name, dir := range map[string]struct {
		of   func(virtio.Features) Set
		want map[virtio.Features]Set
	}{"FromGuest": {FromGuest, host}, "ToGuest": {ToGuest, guest}} {
		var all virtio.Features
		for f, want := range dir.want {
			if got := dir.of(f); got != want {
				t.Errorf("%s(%v) = %b, want %b", name, f, got, want)
			}
			all |= f
		}
		if got := dir.of(all); got != All {
			t.Errorf("%s of all = %b", name, got)
		}
	}
}

func TestSetTakes(t *testing.T) {
	needs := func(gso uint8) virtio.NetHdr {
		return virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, GSOType: gso, GSOSize: 1}
	}
	cases := []struct {
		h    virtio.NetHdr
		need Set
	}{
		{virtio.NetHdr{}, 0},
		{virtio.NetHdr{HdrLen: 9, GSOSize: 9, CsumStart: 9}, 0},
		{virtio.NetHdr{Flags: virtio.NetHdrDataValid}, Csum},
		{needs(virtio.GSONone), Csum},
		{needs(virtio.GSOTCPv4), Csum | TSO4},
		{needs(virtio.GSOTCPv6), Csum | TSO6},
		{needs(virtio.GSOTCPv4 | virtio.GSOECN), Csum | TSO4 | ECN},
		{needs(virtio.GSOUDP), Csum | UFO},
		{needs(virtio.GSOUDPL4), Csum | USO4 | USO6},
	}
	for _, c := range cases {
		if !c.need.Takes(c.h) || !All.Takes(c.h) {
			t.Errorf("%b does not take %+v", c.need, c.h)
		}
		for bit := Set(1); bit <= USO6; bit <<= 1 {
			if c.need&bit != 0 && (All &^ bit).Takes(c.h) {
				t.Errorf("%b takes %+v", All&^bit, c.h)
			}
		}
	}
	for _, gso := range []uint8{2, 6, 0x7f, virtio.GSOECN} {
		if All.Takes(needs(gso)) {
			t.Errorf("gso_type %#x is taken", gso)
		}
	}
	for set := range All {
		for asks := range uint16(math.MaxUint16) {
			h := virtio.NetHdr{Flags: uint8(asks), GSOType: uint8(asks >> 8), HdrLen: 9}
			if first, _ := h.Words(); set.Takes(h) != set.TakesWords(first) {
				t.Fatalf("%b: %v and %v of one header, %+v", set, set.Takes(h), set.TakesWords(first), h)
			}
		}
	}
}
