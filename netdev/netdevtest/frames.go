package netdevtest

import (
	"encoding/binary"

	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
)

// EtherType is that of the suite's own frames (IEEE 802, local experimental 1): a Capture may pass over all others, but for IPv4 and
// IPv6 with Ports.
const EtherType = 0x88b5

// Port is the source and destination port of the suite's TCP and UDP frames.
const Port = 4711

// Source and Destination are the Ethernet addresses in the suite's frames: one is the guest's, the other nobody's.
var (
	Source      = [6]byte{0x52, 0x54, 0, 0x11, 0x22, 0x33}
	Destination = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
)

// Frame is an Ethernet frame of n bytes, at least 14, that differs from those of other seeds where n allows.
func Frame(n int, seed uint32) []byte {
	b := append(append(make([]byte, 0, max(n, 14)), Destination[:]...), Source[:]...)
	b = binary.BigEndian.AppendUint16(b, EtherType)
	for x := seed*2654435761 + 1; len(b) < n; x = x*1664525 + 1013904223 {
		b = append(b, byte(x>>24))
	}
	return b
}

// inet describes a TCP or UDP frame.
type inet struct {
	v6, udp bool
	payload int
	gso     uint8
	size    int
}

// Lengths in bytes of the headers in frames that inet builds.
const (
	etherLen = 14
	tcpLen   = 20
	udpLen   = 8
)

func (i inet) ipLen() int {
	if i.v6 {
		return 40
	}
	return 20
}

func (i inet) l4() int { return etherLen + i.ipLen() }

func (i inet) headers() int {
	if i.udp {
		return i.l4() + udpLen
	}
	return i.l4() + tcpLen
}

func (i inet) proto() byte {
	if i.udp {
		return 17
	}
	return 6
}

// build returns the frame as a driver hands it over: its checksum is the pseudo-header's.
func (i inet) build(seed uint32) (virtio.NetHdr, []byte) {
	be := binary.BigEndian
	b := Frame(i.headers()+i.payload, seed)
	ip, l4 := b[etherLen:i.l4()], b[i.l4():]
	clear(b[etherLen:i.headers()])
	if i.v6 {
		be.PutUint16(b[12:], 0x86dd)
		ip[0], ip[6], ip[7] = 0x60, i.proto(), 64
		be.PutUint16(ip[4:], uint16(len(l4)))
		copy(ip[8:], []byte{0xfd, 15: 1})
		copy(ip[24:], []byte{0xfd, 15: 2})
	} else {
		be.PutUint16(b[12:], 0x0800)
		ip[0], ip[8], ip[9] = 0x45, 64, i.proto()
		be.PutUint16(ip[2:], uint16(len(b)-etherLen))
		copy(ip[12:], []byte{198, 18, 0, 1, 198, 18, 0, 2})
		be.PutUint16(ip[10:], offload.Checksum(0, ip))
	}
	be.PutUint16(l4, Port)
	be.PutUint16(l4[2:], Port)
	off := 16
	if i.udp {
		off = 6
		be.PutUint16(l4[4:], uint16(len(l4)))
	} else {
		l4[12], l4[13] = 5<<4, 0x10
	}
	be.PutUint16(l4[off:], ^i.pseudo(b, len(l4)))
	return virtio.NetHdr{
		Flags: virtio.NetHdrNeedsCsum, GSOType: i.gso, GSOSize: uint16(i.size), HdrLen: uint16(i.headers()),
		CsumStart: uint16(i.l4()), CsumOffset: uint16(off),
	}, b
}

// pseudo is the complement of the sum of the pseudo-header of n bytes.
func (i inet) pseudo(b []byte, n int) uint16 {
	addrs := b[etherLen+12 : etherLen+20]
	if i.v6 {
		addrs = b[etherLen+8 : etherLen+40]
	}
	return offload.Checksum(uint32(i.proto())+uint32(n), addrs)
}

// good reports whether the lengths and checksums of a complete frame are right.
func (i inet) good(b []byte) bool {
	if len(b) < i.headers() {
		return false
	}
	be := binary.BigEndian
	ip, l4 := b[etherLen:i.l4()], b[i.l4():]
	if i.v6 && int(be.Uint16(ip[4:])) != len(l4) {
		return false
	}
	if !i.v6 && (int(be.Uint16(ip[2:])) != len(b)-etherLen || offload.Checksum(0, ip) != 0) {
		return false
	}
	if i.udp && int(be.Uint16(l4[4:])) != len(l4) {
		return false
	}
	return offload.Checksum(uint32(^i.pseudo(b, len(l4))), l4) == 0
}

// complete does what hdr leaves to do for a captured frame.
func complete(hdr virtio.NetHdr, frame []byte) (out [][]byte, err error) {
	var seg offload.Segmenter
	if err := seg.Start(hdr, [][]byte{frame}, 0); err != nil {
		return nil, err
	}
	var head [offload.MaxHeaders]byte
	for {
		_, n, payload, ok := seg.Next(head[:])
		if !ok {
			return out, nil
		}
		b := append([]byte(nil), head[:n]...)
		for _, p := range payload {
			b = append(b, p...)
		}
		out = append(out, b)
	}
}
