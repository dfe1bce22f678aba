package virtio

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestNetHdrGolden: the bytes of struct virtio_net_hdr, both ways.
func TestNetHdrGolden(t *testing.T) {
	h := NetHdr{
		Flags: NetHdrNeedsCsum, GSOType: GSOTCPv6 | GSOECN, HdrLen: 0x1234, GSOSize: 1448, CsumStart: 54, CsumOffset: 16,
		NumBuffers: 0xabcd,
	}
	golden := []byte{0x01, 0x84, 0x34, 0x12, 0xa8, 0x05, 54, 0, 16, 0, 0xcd, 0xab}
	for _, n := range []int{NetHdrSize, NetHdrSizeLegacy} {
		want := h
		if n == NetHdrSizeLegacy {
			want.NumBuffers = 0
		}
		b := make([]byte, n)
		h.Encode(b)
		if diff := cmp.Diff(golden[:n], b); diff != "" {
			t.Errorf("Encode of %d bytes:\n%s", n, diff)
		}
		if diff := cmp.Diff(want, DecodeNetHdr(golden[:n])); diff != "" {
			t.Errorf("DecodeNetHdr of %d bytes:\n%s", n, diff)
		}
	}
	defer func() {
		if recover() == nil {
			t.Error("DecodeNetHdr of 9 bytes does not panic")
		}
	}()
	DecodeNetHdr(golden[:9])
}

// TestNetHdrEncodeInto: however the bytes are cut into pieces, they are the same, and what lies behind is left alone.
func TestNetHdrEncodeInto(t *testing.T) {
	h := NetHdr{Flags: NetHdrNeedsCsum, GSOType: GSOTCPv4, HdrLen: 66, GSOSize: 1448, CsumStart: 34, CsumOffset: 16, NumBuffers: 3}
	for _, n := range []int{NetHdrSize, NetHdrSizeLegacy} {
		want := append(make([]byte, n), bytes.Repeat([]byte{0xee}, 20-n)...)
		h.Encode(want[:n])
		for a := range 20 {
			for b := a; b <= 20; b++ {
				got := bytes.Repeat([]byte{0xee}, 20)
				h.EncodeInto([][]byte{got[:a], got[a:b], got[b:]}, n)
				if !bytes.Equal(got, want) {
					t.Errorf("%d bytes, cut at %d and %d: %x, want %x", n, a, b, got, want)
				}
			}
		}
	}
}

func TestNetHdrLen(t *testing.T) {
	for f, want := range map[Features]int{
		0: 10, FNetCsum | FNetMQ: 10, FVersion1: 12, FNetMrgRxbuf: 12, FVersion1 | FNetMrgRxbuf: 12,
	} {
		if got := NetHdrLen(f); got != want {
			t.Errorf("%v: header of %d bytes, want %d", f, got, want)
		}
	}
}

func TestNetHdrValidate(t *testing.T) {
	const all = FNetCsum | FNetHostTSO4 | FNetHostTSO6 | FNetHostECN | FNetHostUFO | FNetHostUSO
	tso := NetHdr{Flags: NetHdrNeedsCsum, GSOType: GSOTCPv4, GSOSize: 1448, CsumStart: 34, CsumOffset: 16}
	with := func(change func(*NetHdr)) NetHdr {
		h := tso
		change(&h)
		return h
	}
	for _, c := range []struct {
		name string
		h    NetHdr
		f    Features
		want string // of the error; "" for none
	}{
		{"plain", NetHdr{}, 0, ""},
		{"plain, all fields but flags and type garbage", NetHdr{HdrLen: 9999, GSOSize: 1, CsumStart: 0xffff, CsumOffset: 0xffff}, 0, ""},
		{"data valid", NetHdr{Flags: NetHdrDataValid}, 0, ""},
		{"checksum", NetHdr{Flags: NetHdrNeedsCsum, CsumStart: 34, CsumOffset: 16}, FNetCsum, ""},
		{"checksum at the very end", NetHdr{Flags: NetHdrNeedsCsum, CsumStart: 1500, CsumOffset: 12}, FNetCsum, ""},
		{"checksum one byte beyond", NetHdr{Flags: NetHdrNeedsCsum, CsumStart: 1500, CsumOffset: 13}, FNetCsum, "1500+13 beyond a frame of 1514"},
		{"checksum far beyond", NetHdr{Flags: NetHdrNeedsCsum, CsumStart: 0xffff, CsumOffset: 0xffff}, FNetCsum, "beyond"},
		{"checksum not negotiated", NetHdr{Flags: NetHdrNeedsCsum}, all &^ FNetCsum, "VIRTIO_NET_F_CSUM"},
		{"TSO4", tso, FNetCsum | FNetHostTSO4, ""},
		{"TSO6", with(func(h *NetHdr) { h.GSOType = GSOTCPv6 }), FNetCsum | FNetHostTSO6, ""},
		{"UFO", with(func(h *NetHdr) { h.GSOType = GSOUDP }), FNetCsum | FNetHostUFO, ""},
		{"USO", with(func(h *NetHdr) { h.GSOType = GSOUDPL4 }), FNetCsum | FNetHostUSO, ""},
		{"TSO4 ECN", with(func(h *NetHdr) { h.GSOType |= GSOECN }), all, ""},
		{"TSO4 not negotiated", tso, all &^ FNetHostTSO4, "HOST_TSO4"},
		{"TSO6 not negotiated", with(func(h *NetHdr) { h.GSOType = GSOTCPv6 }), all &^ FNetHostTSO6, "HOST_TSO6"},
		{"UFO not negotiated", with(func(h *NetHdr) { h.GSOType = GSOUDP }), all &^ FNetHostUFO, "HOST_UFO"},
		{"USO not negotiated", with(func(h *NetHdr) { h.GSOType = GSOUDPL4 }), all &^ FNetHostUSO, "HOST_USO"},
		{"ECN not negotiated", with(func(h *NetHdr) { h.GSOType |= GSOECN }), all &^ FNetHostECN, "HOST_ECN"},
		{"ECN alone", NetHdr{GSOType: GSOECN}, all, "unknown gso_type 0x80"},
		{"unknown type", with(func(h *NetHdr) { h.GSOType = 2 }), all, "unknown gso_type 0x2"},
		{"gso_size 0", with(func(h *NetHdr) { h.GSOSize = 0 }), all, "gso_size 0"},
		{"GSO without checksum", with(func(h *NetHdr) { h.Flags = 0 }), all, "without NEEDS_CSUM"},
	} {
		first, last := c.h.Words()
		err := ValidateNetHdr(first, last, 1514, c.f)
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
	first, last := tso.Words()
	if n := testing.AllocsPerRun(100, func() { _ = ValidateNetHdr(first, last, 1514, all) }); n != 0 {
		t.Errorf("Validate allocates %v times", n)
	}
}

func TestFeaturesString(t *testing.T) {
	for f, want := range map[Features]string{
		0:                     "none",
		FNetCsum:              "CSUM",
		FVersion1 | FNetMAC:   "MAC,VERSION_1",
		1<<63 | 1<<4 | FNetMQ: "bit 4,MQ,bit 63",
		FNetHostUSO | FInOrder | FEventIdx | FNotifyOnEmpty: "NOTIFY_ON_EMPTY,EVENT_IDX,IN_ORDER,HOST_USO",
	} {
		if got := f.String(); got != want {
			t.Errorf("%#x is %q, want %q", uint64(f), got, want)
		}
	}
	seen := map[string]bool{}
	for f, name := range featureNames {
		if f&(f-1) != 0 || f == 0 || seen[name] {
			t.Errorf("%q is not the name of one bit: %#x", name, uint64(f))
		}
		seen[name] = true
	}
}

func TestFeaturesHas(t *testing.T) {
	f := FVersion1 | FEventIdx
	if !f.Has(FVersion1) || !f.Has(f) || !f.Has(0) || f.Has(FVersion1|FInOrder) {
		t.Error("Has is not \"all bits of\"")
	}
}

// TestSplitLayout: sizes of virtio-v1.2 §2.7, which the ring's memory is checked against.
func TestSplitLayout(t *testing.T) {
	if n := binary.Size(Desc{}); n != DescSize {
		t.Errorf("Desc has %d bytes", n)
	}
	if n := binary.Size(UsedElem{}); n != 8 {
		t.Errorf("UsedElem has %d bytes", n)
	}
	for n, want := range map[int][3]int{
		1: {16, 8, 14}, 256: {4096, 518, 2054}, MaxQueueSize: {524288, 65542, 262150},
	} {
		if got := [3]int{DescTableLen(n), AvailLen(n), UsedLen(n)}; got != want {
			t.Errorf("queue size %d: %v bytes, want %v", n, got, want)
		}
	}
}

func TestNetConfigGolden(t *testing.T) {
	c := NetConfig{MAC: [6]byte{0x52, 0x54, 0, 0x12, 0x34, 0x56}, Status: NetStatusLinkUp | NetStatusAnnounce, MaxPairs: 0x102, MTU: 9000}
	want := []byte{0x52, 0x54, 0, 0x12, 0x34, 0x56, 3, 0, 2, 1, 0x28, 0x23}
	if diff := cmp.Diff(want, c.Encode()); diff != "" || len(want) != NetConfigSize {
		t.Error(diff)
	}
}
