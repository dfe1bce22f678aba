package virtio

import (
	"encoding/binary"
	"fmt"
)

// Sizes of struct virtio_net_hdr in bytes (virtio-v1.2 §5.1.6): with the num_buffers field, which is there when VERSION_1 or
// MRG_RXBUF was negotiated, and the legacy form without it.
const (
	NetHdrSize       = 12
	NetHdrSizeLegacy = 10
)

// NetHdrLen is the size in bytes of the header in front of every frame under the negotiated features f.
func NetHdrLen(f Features) int {
	if f&(FVersion1|FNetMrgRxbuf) != 0 {
		return NetHdrSize
	}
	return NetHdrSizeLegacy
}

// Values of NetHdr.Flags (virtio-v1.2 §5.1.6).
const (
	NetHdrNeedsCsum = 1 // CsumStart and CsumOffset say where a checksum is to be completed
	NetHdrDataValid = 2 // checksum was verified
)

// Values of NetHdr.GSOType (virtio-v1.2 §5.1.6).
const (
	GSONone  = 0
	GSOTCPv4 = 1
	GSOUDP   = 3 // UFO: fragmentation at the IP layer
	GSOTCPv6 = 4
	GSOUDPL4 = 5    // USO: segmentation at the UDP layer
	GSOECN   = 0x80 // flag: the TCP header has ECN set
)

// MaxFrame is the longest frame that a guest may send or get, in bytes: a 64 KiB IP packet with Ethernet and VLAN headers.
const MaxFrame = 65535 + 14 + 4

// NetHdr is struct virtio_net_hdr (virtio-v1.2 §5.1.6), decoded.
type NetHdr struct {
	Flags      uint8
	GSOType    uint8
	HdrLen     uint16 // bytes of headers to replicate in each segment: a hint, never trusted
	GSOSize    uint16 // payload bytes of each segment
	CsumStart  uint16 // offset in the frame from which the checksum runs
	CsumOffset uint16 // offset from CsumStart at which it is stored
	NumBuffers uint16 // merged receive buffers; 0 or 1 for transmitted frames
}

// DecodeNetHdr reads a header of 10 or 12 bytes. It panics when b is shorter than 10 bytes.
func DecodeNetHdr(b []byte) NetHdr {
	return NetHdrOf(NetHdrWords(b))
}

// Words is the header as it lies in memory, little endian: its first 8 bytes, and the 4 behind them, of which the last two are num_buffers.
// The receiver is a pointer for speed: a copy of the fields, just stored one by one, would be loaded as a whole, which waits until they are in the cache.
func (h *NetHdr) Words() (first uint64, last uint32) {
	first = uint64(h.Flags) | uint64(h.GSOType)<<8 | uint64(h.HdrLen)<<16 | uint64(h.GSOSize)<<32 | uint64(h.CsumStart)<<48
	return first, uint32(h.CsumOffset) | uint32(h.NumBuffers)<<16
}

// NetHdrOf is the header of which Words are these.
func NetHdrOf(first uint64, last uint32) NetHdr {
	return NetHdr{
		Flags: uint8(first), GSOType: uint8(first >> 8), HdrLen: uint16(first >> 16), GSOSize: uint16(first >> 32), CsumStart: uint16(first >> 48),
		CsumOffset: uint16(last), NumBuffers: uint16(last >> 16),
	}
}

// NetHdrAsks tells from the first of a header's Words whether anything is to be done to the frame: if not, its other fields mean nothing.
func NetHdrAsks(first uint64) bool { return uint16(first) != 0 }

// NetHdrWords reads the Words of a header of 10 or 12 bytes, each part of it once. It panics when b is shorter than 10 bytes.
func NetHdrWords(b []byte) (first uint64, last uint32) {
	first = binary.LittleEndian.Uint64(b)
	if len(b) >= NetHdrSize {
		return first, binary.LittleEndian.Uint32(b[8:])
	}
	return first, uint32(binary.LittleEndian.Uint16(b[8:]))
}

// NetHdrSent is the first of the Words of a header that a driver has sent, without the flags that are not a driver's to set: a device ignores these, DATA_VALID and
// RSC_INFO too, which mean something in the other direction alone (virtio-v1.2 §5.1.6.2.2).
func NetHdrSent(first uint64) uint64 { return first &^ (0xff &^ NetHdrNeedsCsum) }

// Encode writes the header into b, which is 10 or 12 bytes long.
func (h NetHdr) Encode(b []byte) {
	first, last := h.Words()
	PutNetHdr(b, first, last)
}

// PutNetHdr writes a header that is given as Words into b, which is 10 or 12 bytes long.
func PutNetHdr(b []byte, first uint64, last uint32) {
	binary.LittleEndian.PutUint64(b, first)
	if len(b) >= NetHdrSize {
		binary.LittleEndian.PutUint32(b[8:], last)
	} else {
		binary.LittleEndian.PutUint16(b[8:], uint16(last))
	}
}

// EncodeInto writes the header as n bytes, 10 or 12, over the first bytes of segs, which hold as many.
func (h NetHdr) EncodeInto(segs [][]byte, n int) {
	if len(segs[0]) >= n {
		h.Encode(segs[0][:n])
		return
	}
	var b [NetHdrSize]byte
	h.Encode(b[:n])
	for rest := b[:n]; len(rest) > 0; segs = segs[1:] {
		rest = rest[copy(segs[0], rest):]
	}
}

// GSO is the segmentation type without the ECN flag.
func (h NetHdr) GSO() uint8 { return h.GSOType &^ GSOECN }

// ValidateNetHdr checks a header, given as Words, that came from a driver against a frame of frameLen bytes, and the features it negotiated:
// whatever passes can be handed to a device or to the segmentation code without further checks on these fields
// (virtio-v1.2 §5.1.6.2.2).
func ValidateNetHdr(first uint64, last uint32, frameLen int, f Features) error {
	flags, gso, gsoSize := uint8(first), uint8(first>>8), uint16(first>>32)
	if flags&NetHdrNeedsCsum != 0 {
		if f&FNetCsum == 0 {
			return fmt.Errorf("NEEDS_CSUM without VIRTIO_NET_F_CSUM")
		}
		start, offset := uint16(first>>48), uint16(last)
		if end := int(start) + int(offset) + 2; end > frameLen {
			return fmt.Errorf("checksum at %d+%d beyond a frame of %d bytes", start, offset, frameLen)
		}
	}
	if gso == GSONone {
		return nil
	}
	need := gsoFeature(gso &^ GSOECN)
	switch {
	case need == 0:
		return fmt.Errorf("unknown gso_type %#x", gso)
	case f&need != need:
		return fmt.Errorf("gso_type %#x without the feature %v", gso, need)
	case gso&GSOECN != 0 && f&FNetHostECN == 0:
		return fmt.Errorf("gso_type %#x without the feature %v", gso, FNetHostECN)
	case gsoSize == 0:
		return fmt.Errorf("gso_size 0 with gso_type %#x", gso)
	case flags&NetHdrNeedsCsum == 0:
		return fmt.Errorf("gso_type %#x without NEEDS_CSUM", gso)
	}
	return nil
}

// gsoFeature is the feature that allows a driver to send frames of a segmentation type, or 0 when there is no such type.
func gsoFeature(gso uint8) Features {
	switch gso {
	case GSOTCPv4:
		return FNetHostTSO4
	case GSOTCPv6:
		return FNetHostTSO6
	case GSOUDP:
		return FNetHostUFO
	case GSOUDPL4:
		return FNetHostUSO
	}
	return 0
}

// Values of NetConfig.Status (virtio-v1.2 §5.1.4).
const (
	NetStatusLinkUp   = 1
	NetStatusAnnounce = 2
)

// NetConfigSize is the size in bytes of struct virtio_net_config up to and including mtu.
const NetConfigSize = 12

// NetConfig is struct virtio_net_config (virtio-v1.2 §5.1.4) up to the fields of the features that vhostd offers.
type NetConfig struct {
	MAC      [6]byte
	Status   uint16
	MaxPairs uint16 // max_virtqueue_pairs, 1 to 0x8000
	MTU      uint16 // bytes
}

// Encode returns the NetConfigSize bytes of the configuration space.
func (c NetConfig) Encode() []byte {
	b := make([]byte, 0, NetConfigSize)
	b = append(b, c.MAC[:]...)
	b = binary.LittleEndian.AppendUint16(b, c.Status)
	b = binary.LittleEndian.AppendUint16(b, c.MaxPairs)
	return binary.LittleEndian.AppendUint16(b, c.MTU)
}
