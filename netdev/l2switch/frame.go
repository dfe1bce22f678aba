package l2switch

import (
	"encoding/binary"

	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// Lengths in bytes.
const (
	addrsLen  = 12
	etherLen  = 14
	tagLen    = 4
	plainHead = etherLen + tagLen // what decides on a frame of a port without a Guard
	deepHead  = 256               // and with one
)

// Ethernet types.
const (
	typeIPv4 = 0x0800
	typeARP  = 0x0806
	typeTag  = 0x8100
	typeRARP = 0x8035
	typeIPv6 = 0x86dd
	typeQinQ = 0x88a8
)

// A broadcast's address, and the bit of addresses of several stations.
const (
	broadcast = macMask
	groupBit  = 1 << 40
)

// frame is one that is being forwarded. Its first bytes were read once, into head: they are what is decided on, and what arrives.
type frame struct {
	buf    *zerocopy.Buffer
	first  uint64 // the virtio-net header, as virtio.NetHdr.Words
	last   uint32
	head   []byte
	length int
	dst    uint64
	src    uint64
	vid    uint16
	prio   uint16 // priority bits of the tag
	tag    int    // bytes of tag that it came with
	inner  uint16 // Ethernet type behind the tag
	to     *Port  // nil: all
	lost   bool   // dropped, for whatever reason
}

// hdr is the virtio-net header.
func (f *frame) hdr() virtio.NetHdr { return virtio.NetHdrOf(f.first, f.last) }

// parse reads the frame's Ethernet header from the first plainHead bytes of head, which may have less; what is behind its end is anything. It sets lost for a
// frame that ends in its header.
func (f *frame) parse(head *[plainHead]byte) {
	f.parseWords(binary.BigEndian.Uint64(head[:]), binary.BigEndian.Uint64(head[8:]), binary.BigEndian.Uint16(head[16:]))
	f.lost = len(f.head) < etherLen+f.tag
}

// parseWords reads the Ethernet header from its bytes, big endian. They may be in registers: what is loaded from there in other pieces than it was stored
// in waits for the stores.
func (f *frame) parseWords(a, b uint64, c uint16) {
	f.dst, f.src = a>>16, a&0xffff<<32|b>>32
	f.tag, f.vid, f.prio, f.inner = 0, 0, 0, uint16(b>>16)
	if f.inner == typeTag {
		f.tag, f.vid, f.prio, f.inner = tagLen, uint16(b)&0xfff, uint16(b)&0xf000, c
	}
}

// isTag tells an Ethernet type that another tag begins with.
func isTag(t uint16) bool { return t == typeTag || t == typeQinQ || t == 0x9100 }

// admit puts the frame into its VLAN, at a port with rules r.
func (f *frame) admit(r *rules) bool {
	switch {
	case f.vid == 0: // untagged, or a tag that only says a priority
		f.vid = r.pvid
		// A tag behind a tag that is about to go would become the frame's.
		return f.vid != 0 && !isTag(f.inner)
	case r.trunk == nil, !r.carries(f.vid):
		return false
	}
	return true
}

// fits tells whether the frame is within the MTU, or will be when it is cut into segments. maxLen is an MTU and an Ethernet header.
func (f *frame) fits(maxLen int) bool {
	if f.length-f.tag <= maxLen {
		return true
	}
	hdr := f.hdr()
	if hdr.GSOType == virtio.GSONone {
		return false
	}
	return f.headers(hdr)+int(hdr.GSOSize)-f.tag <= maxLen
}

// headers is the length in bytes of the headers that each segment of the frame gets.
func (f *frame) headers(hdr virtio.NetHdr) int {
	l4 := int(hdr.CsumStart)
	switch hdr.GSO() {
	case virtio.GSOTCPv4, virtio.GSOTCPv6:
		var off [1]byte
		if f.buf.CopyTo(off[:], l4+12) == 1 {
			return l4 + int(off[0]>>4)*4
		}
	case virtio.GSOUDPL4:
		return l4 + 8
	}
	return l4 // GSOUDP: fragments, each with the IP header
}

// shape appends the pieces of the frame's head as a port with rules r sees it, with or without a tag, and returns the virtio-net header. scratch has
// room for the addresses and a tag. It reports false when the frame cannot be shown there without its tag.
func (f *frame) shape(r *rules, to [][]byte, scratch []byte) (hdr virtio.NetHdr, frags [][]byte, ok bool) {
	hdr = f.hdr()
	tagged := r.tagged(f.vid)
	switch {
	case tagged && f.tag > 0:
		// The same VLAN: but a priority tag said none.
		binary.BigEndian.PutUint16(f.head[etherLen:], f.prio|f.vid)
		to = append(to, f.head)
	case tagged:
		n := copy(scratch, f.head[:addrsLen])
		binary.BigEndian.PutUint16(scratch[n:], typeTag)
		binary.BigEndian.PutUint16(scratch[n+2:], f.vid)
		to = append(to, scratch[:n+tagLen], f.head[addrsLen:])
		if ok = shift(&hdr, tagLen); !ok {
			return hdr, to, false
		}
	case f.tag > 0:
		if isTag(f.inner) {
			return hdr, to, false
		}
		to = append(to, f.head[:addrsLen], f.head[addrsLen+tagLen:])
		if ok = shift(&hdr, -tagLen); !ok {
			return hdr, to, false
		}
	default:
		to = append(to, f.head)
	}
	return hdr, to, true
}

// shift moves the offsets of a header by n bytes. It reports false when they would be outside of the frame.
func shift(h *virtio.NetHdr, n int) bool {
	if h.Flags&virtio.NetHdrNeedsCsum != 0 {
		at := int(h.CsumStart) + n
		if at < etherLen || at > maxMTU {
			return false
		}
		h.CsumStart = uint16(at)
	}
	if h.HdrLen != 0 {
		h.HdrLen = uint16(max(int(h.HdrLen)+n, 0))
	}
	return true
}
