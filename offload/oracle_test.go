package offload

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/vhostd/vhostd/virtio"
)

// oracle judges what became of a frame: it reads the frame's headers in its own way, puts the pieces together again, and sums everything
// a byte at a time.
type oracle struct {
	testing.TB
	hdr          virtio.NetHdr
	frame        []byte
	got          []lowered
	l3, l4, head int // where the IP header, the header behind it, and the payload begin
	next         int // the byte that names the protocol at l4
	v6, tcp      bool
	routed       bool // the last destination is not the one in the IPv6 header, so no sum can be checked
}

// judge checks what a Segmenter made of a good frame.
func judge(t testing.TB, hdr virtio.NetHdr, frame []byte, takes Set, got []lowered) {
	t.Helper()
	o := &oracle{TB: t, hdr: hdr, frame: frame, got: got}
	only := got[0]
	switch gso := hdr.GSO(); {
	case len(got) == 1 && only.hdr == hdr: // as it was, which is right if it is taken, and nothing else is
		o.same(only.bytes, frame, "a frame that is handed over as it is")
	case hdr.GSOType == virtio.GSONone:
		o.summed(only)
	default:
		o.parse()
		if gso == virtio.GSOUDP && len(got) > 1 {
			o.fragments()
		} else {
			o.segments(takes)
		}
	}
}

func (o *oracle) same(got, want []byte, what string) {
	o.Helper()
	if !bytes.Equal(got, want) {
		o.Fatalf("%s differs:\n%x, want\n%x", what, got, want)
	}
}

// summed is a frame that is not cut: only its checksum was completed, if at all.
func (o *oracle) summed(got lowered) {
	want := slices.Clone(o.frame)
	if o.hdr.Flags&virtio.NetHdrNeedsCsum != 0 {
		start := int(o.hdr.CsumStart)
		field := want[start+int(o.hdr.CsumOffset):][:2]
		copy(field, got.bytes[start+int(o.hdr.CsumOffset):])
		// What the field held was part of the sum and has gone; what it holds makes up for the rest.
		sum := naiveSum(o.frame[start:])
		if !sameSum(^sum, binary.BigEndian.Uint16(field)) {
			o.Fatalf("checksum %x, want %x", field, ^sum)
		}
	}
	o.same(got.bytes, want, "a frame whose checksum was completed")
	if got.hdr != (virtio.NetHdr{NumBuffers: o.hdr.NumBuffers}) {
		o.Fatalf("header %+v", got.hdr)
	}
}

// parse finds the headers. The frame was taken, so they are there.
func (o *oracle) parse() {
	word := func(at int) uint16 { return binary.BigEndian.Uint16(o.frame[at:]) }
	at := 12
	for word(at) == 0x8100 || word(at) == 0x88a8 {
		at += 4
	}
	o.v6 = word(at) == 0x86dd
	o.l3 = at + 2
	proto := o.frame[o.l3+9]
	o.next, o.l4 = o.l3+9, o.l3+int(o.frame[o.l3]&15)*4
	if o.v6 {
		o.next, o.l4 = o.l3+6, o.l3+40
		for proto = o.frame[o.next]; proto != 6 && proto != 17; proto = o.frame[o.next] {
			o.routed = o.routed || proto == 43 && o.frame[o.l4+3] != 0
			o.next, o.l4 = o.l4, o.l4+8*(1+int(o.frame[o.l4+1]))
		}
	}
	o.tcp = proto == 6
	o.head = o.l4 + 8
	if o.tcp {
		o.head = o.l4 + int(o.frame[o.l4+12]>>4)*4
	}
}

// segments is a frame that was cut into TCP segments or UDP datagrams.
func (o *oracle) segments(takes Set) {
	size := int(o.hdr.GSOSize)
	if o.hdr.GSO() == virtio.GSOUDP {
		size = len(o.frame) // it was short enough
	}
	var payload []byte
	for i, g := range o.got {
		want := slices.Clone(o.frame[:o.head])
		body := g.bytes[g.head:]
		last := i == len(o.got)-1
		if g.head != o.head || len(body) > size || !last && len(body) != size || len(body) == 0 && len(o.frame) > o.head {
			o.Fatalf("segment %d of %d: %d bytes of headers and %d of payload, want %d and %d", i, len(o.got), g.head, len(body), o.head, size)
		}
		o.network(want, g.bytes, i, len(g.bytes)-o.l3)
		if o.tcp {
			l4 := want[o.l4:]
			binary.BigEndian.PutUint32(l4[4:], binary.BigEndian.Uint32(l4[4:])+uint32(len(payload)))
			if !last {
				l4[13] &^= 1 | 8
			}
			if i > 0 {
				l4[13] &^= 0x80
			}
		} else {
			binary.BigEndian.PutUint16(want[o.l4+4:], uint16(8+len(body)))
		}
		o.transport(want, g, takes)
		o.same(g.bytes[:g.head], want, "headers of a segment")
		payload = append(payload, body...)
	}
	o.same(payload, o.frame[o.head:], "the payload")
}

// network makes want the IP header of a packet of n bytes that is the i-th of the frame; IPv4's sum is checked in what came out.
func (o *oracle) network(want, got []byte, i, n int) {
	ip := want[o.l3:]
	if o.v6 {
		binary.BigEndian.PutUint16(ip[4:], uint16(n-40))
		return
	}
	binary.BigEndian.PutUint16(ip[2:], uint16(n))
	binary.BigEndian.PutUint16(ip[4:], binary.BigEndian.Uint16(ip[4:])+uint16(i))
	if !sameSum(naiveSum(got[o.l3:o.l4]), 0) {
		o.Fatalf("IPv4 header with a wrong sum: %x", got[o.l3:o.l4])
	}
	copy(ip[10:12], got[o.l3+10:])
}

// transport checks the checksum of a segment, and takes it over into want.
func (o *oracle) transport(want []byte, g lowered, takes Set) {
	off := 6
	if o.tcp {
		off = 16
	}
	sum := pseudoSum(g.bytes, o.l3, o.v6, o.frame[o.next], len(g.bytes)-o.l4)
	field := g.bytes[o.l4+off:][:2]
	copy(want[o.l4+off:], field)
	hdr := virtio.NetHdr{}
	good := sameSum(naiveSum(append(binary.BigEndian.AppendUint16(nil, sum), g.bytes[o.l4:]...)), 0)
	if takes.Has(Csum) {
		hdr = virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, CsumStart: uint16(o.l4), CsumOffset: uint16(off)}
		good = sameSum(binary.BigEndian.Uint16(field), sum)
	}
	if g.hdr != hdr || !good && !o.routed {
		o.Fatalf("checksum %x with header %+v, want the sum of %x and %+v", field, g.hdr, sum, hdr)
	}
}

// fragments is a UDP datagram that was cut into IP fragments: together they are the datagram.
func (o *oracle) fragments() {
	want := slices.Clone(o.frame[o.l4:])
	binary.BigEndian.PutUint16(want[4:], uint16(len(want)))
	var all, id []byte
	for i, g := range o.got {
		last := i == len(o.got)-1
		from := o.l4
		ip := slices.Clone(o.frame[:o.l4])
		flags := uint16(len(all) / 8)
		if o.v6 {
			f := g.bytes[o.l4:]
			if from += 8; i == 0 {
				id = f[4:8]
			}
			ip[o.next] = 44
			flags = uint16(len(all)) | bit16(!last, 1)
			o.same(f[:8], slices.Concat([]byte{17, 0}, binary.BigEndian.AppendUint16(nil, flags), id), "a fragment header")
		} else {
			flags |= bit16(!last, 0x2000)
		}
		o.network(ip, g.bytes, 0, len(g.bytes)-o.l3)
		if !o.v6 {
			binary.BigEndian.PutUint16(ip[o.l3+6:], flags)
		}
		o.same(g.bytes[:o.l4], ip, "the IP header of a fragment")
		body := g.bytes[from:]
		if n := len(body); n > int(o.hdr.GSOSize) || !last && (n == 0 || n%8 != 0) || g.hdr != (virtio.NetHdr{}) {
			o.Fatalf("fragment %d of %d bytes at %d with header %+v", i, n, len(all), g.hdr)
		}
		all = append(all, body...)
	}
	if o.hdr.Flags&virtio.NetHdrNeedsCsum != 0 {
		copy(want[6:8], all[6:])
		sum := pseudoSum(o.frame, o.l3, o.v6, 17, len(all))
		if !o.routed && !sameSum(naiveSum(append(binary.BigEndian.AppendUint16(nil, sum), all...)), 0) {
			o.Fatalf("checksum %x of the datagram is wrong", all[6:8])
		}
	}
	o.same(all, want, "the datagram")
}

func bit16(on bool, bit uint16) uint16 {
	if on {
		return bit
	}
	return 0
}
