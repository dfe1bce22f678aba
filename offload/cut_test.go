package offload

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/gopacket/gopacket/layers"

	"github.com/vhostd/vhostd/virtio"
)

type cutCase struct {
	name string
	p    packet
	gso  uint8
	size int
	n    int // payload bytes
}

var cutCases = []cutCase{
	{"tso4", packet{id: 0xfffe, seq: 0xffffff00}, virtio.GSOTCPv4, 1460, 65000},
	{"tso4 exact", packet{id: 1, seq: 1}, virtio.GSOTCPv4, 1000, 3000},
	{"tso4 one segment", packet{id: 1}, virtio.GSOTCPv4, 1460, 1460},
	{"tso4 no payload", packet{id: 1}, virtio.GSOTCPv4, 1460, 0},
	{"tso4 one byte", packet{id: 1}, virtio.GSOTCPv4, 1460, 1},
	{"tso4 odd size", packet{id: 9}, virtio.GSOTCPv4, 537, 10001},
	{"tso4 smallest size", packet{}, virtio.GSOTCPv4, 8, 8 * MaxSegments},
	{"tso4 options", packet{options: true, seq: 5}, virtio.GSOTCPv4, 1448, 20000},
	{"tso4 vlan", packet{vlans: []uint16{7}}, virtio.GSOTCPv4, 1460, 9999},
	{"tso4 two vlans", packet{vlans: []uint16{7, 4094}}, virtio.GSOTCPv4, 1460, 9999},
	{"tso6", packet{v6: true, seq: 0xfffffff0}, virtio.GSOTCPv6, 1440, 65000},
	{"tso6 options", packet{v6: true, options: true}, virtio.GSOTCPv6, 1428, 9001},
	{"tso6 hop-by-hop", packet{v6: true, hop: true}, virtio.GSOTCPv6, 1400, 9001},
	{"tso6 two extension headers and vlan", packet{v6: true, hop: true, dst: true, vlans: []uint16{3}}, virtio.GSOTCPv6, 1400, 9001},
	{"uso4", packet{udp: true, id: 4}, virtio.GSOUDPL4, 1472, 60000},
	{"uso4 odd", packet{udp: true, options: true}, virtio.GSOUDPL4, 33, 1000},
	{"uso6", packet{udp: true, v6: true}, virtio.GSOUDPL4, 1452, 60000},
	{"uso6 extension", packet{udp: true, v6: true, dst: true}, virtio.GSOUDPL4, 1000, 4001},
}

func (c cutCase) payload() []byte { return randomBytes(c.n, uint64(c.n)) }

// want builds the segments one by one.
func (c cutCase) want(t *testing.T) (segs [][]byte) {
	rest := c.payload()
	for i := 0; i == 0 || len(rest) > 0; i++ {
		p := c.p
		p.id += uint16(i)
		p.seq += uint32(c.size * i)
		n := min(c.size, len(rest))
		segs = append(segs, p.build(t, rest[:n]))
		rest = rest[n:]
	}
	return segs
}

func TestSegmenterCutsInto(t *testing.T) {
	var s Segmenter
	for _, c := range cutCases {
		t.Run(c.name, func(t *testing.T) {
			hdr, frame := c.p.guestFrame(t, c.payload(), c.gso, c.size)
			want := c.want(t)
			for _, frags := range [][][]byte{{frame}, scatter(frame, 1), scatter(frame, 54, 0, 4096), randomScatter(frame, 1)} {
				got := lower(t, &s, hdr, frags, 0)
				if len(got) != len(want) {
					t.Fatalf("%d segments, want %d", len(got), len(want))
				}
				for i, g := range got {
					if !bytes.Equal(want[i], g.bytes) {
						t.Fatalf("segment %d of %d (-want +got):\n%s", i, len(want), cmp.Diff(want[i], g.bytes))
					}
					if g.hdr != (virtio.NetHdr{}) {
						t.Fatalf("segment %d has the header %+v", i, g.hdr)
					}
				}
				verify(t, got[0].bytes)
				verify(t, got[len(got)-1].bytes)
			}
		})
	}
}

func TestSegmenterLeavesChecksumsToReceiver(t *testing.T) {
	var s Segmenter
	for _, c := range cutCases {
		t.Run(c.name, func(t *testing.T) {
			hdr, frame := c.p.guestFrame(t, c.payload(), c.gso, c.size)
			want := c.want(t)
			for i, g := range lower(t, &s, hdr, randomScatter(frame, 5), Csum) {
				if g.hdr.Flags != virtio.NetHdrNeedsCsum || !Csum.Takes(g.hdr) {
					t.Fatalf("segment %d has the header %+v", i, g.hdr)
				}
				// Completed by the other half of the package, the segment is the one that is wanted.
				done := lower(t, new(Segmenter), g.hdr, [][]byte{g.bytes}, 0)
				if !bytes.Equal(want[i], done[0].bytes) {
					t.Fatalf("segment %d (-want +got):\n%s", i, cmp.Diff(want[i], done[0].bytes))
				}
			}
		})
	}
}

func TestSegmenterTCPFlags(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		gso := uint8(virtio.GSOTCPv4)
		if v6 {
			gso = virtio.GSOTCPv6
		}
		t.Run(fmt.Sprintf("v6=%v", v6), func(t *testing.T) {
			p := packet{v6: v6, setTCP: func(l *layers.TCP) { l.FIN, l.PSH, l.CWR, l.ECE, l.URG = true, true, true, true, true }}
			hdr, frame := p.guestFrame(t, randomBytes(3000, 1), gso|virtio.GSOECN, 1000)
			segs := lower(t, new(Segmenter), hdr, [][]byte{frame}, TSO4|TSO6) // no ECN: to be cut
			if len(segs) != 3 {
				t.Fatalf("%d segments, want 3", len(segs))
			}
			for i, s := range segs {
				l := verify(t, s.bytes).Layer(layers.LayerTypeTCP).(*layers.TCP)
				first, last := i == 0, i == 2
				if l.FIN != last || l.PSH != last || l.CWR != first || !l.ECE || !l.ACK || !l.URG {
					t.Errorf("segment %d: FIN %v PSH %v CWR %v ECE %v ACK %v URG %v", i, l.FIN, l.PSH, l.CWR, l.ECE, l.ACK, l.URG)
				}
			}
		})
	}
}

func TestSegmenterRoutedIPv6UsesDriversSum(t *testing.T) {
	p := packet{v6: true, hop: true}
	hdr, frame := p.guestFrame(t, randomBytes(2500, 1), virtio.GSOTCPv6, 1000)
	// A routing header of type 2 with a segment left: its 24 bytes go in place of the hop-by-hop header's 8.
	final := dst6.To16()
	routing := append([]byte{6, 2, 2, 1, 0, 0, 0, 0}, final...)
	routed := append(append(append([]byte(nil), frame[:54]...), routing...), frame[62:]...)
	routed[20] = 43
	routed[54+24-1-16] = 0
	copy(routed[14+24:], src6.To16()) // the first hop: not what the pseudo-header has
	hdr.CsumStart += 16
	l4 := int(hdr.CsumStart)
	for i, s := range lower(t, new(Segmenter), hdr, [][]byte{routed}, 0) {
		ph := append([]byte(nil), s.bytes[14+8:14+24]...)
		ph = append(ph, final...)
		n := len(s.bytes) - l4
		ph = append(ph, 0, 0, byte(n>>8), byte(n), 0, 0, 0, 6)
		if sum := naiveSum(append(ph, s.bytes[l4:]...)); sum != 0xffff {
			t.Errorf("segment %d: sum with the final destination is %#x", i, sum)
		}
	}
}

func TestSegmenterFragmentsUFO(t *testing.T) {
	cases := []struct {
		name string
		p    packet
		size int
		n    int
	}{
		{"v4", packet{udp: true, id: 99}, 1480, 60000},
		{"v4 DF and options", packet{udp: true, dontFrag: true, options: true}, 1481, 5000},
		{"v4 smallest", packet{udp: true}, 8, 100},
		{"v4 vlan", packet{udp: true, vlans: []uint16{5}}, 1480, 3333},
		{"v6", packet{udp: true, v6: true}, 1448, 60000},
		{"v6 extension header", packet{udp: true, v6: true, hop: true, dst: true}, 1400, 2801},
	}
	var s Segmenter
	for _, c := range cases {
		for _, takes := range []Set{0, Csum, All &^ UFO} {
			t.Run(fmt.Sprintf("%s/takes=%b", c.name, takes), func(t *testing.T) {
				payload := randomBytes(c.n, 5)
				hdr, frame := c.p.guestFrame(t, payload, virtio.GSOUDP, c.size)
				got := lower(t, &s, hdr, randomScatter(frame, 3), takes)
				_, l4, _ := c.p.where(t, frame)
				checkFragments(t, c.p, got, c.p.build(t, payload)[l4:], c.size&^7)
			})
		}
	}
}

// checkFragments puts the datagram together again.
func checkFragments(t *testing.T, p packet, got []lowered, datagram []byte, size int) {
	t.Helper()
	if want := (len(datagram) + size - 1) / size; len(got) != want {
		t.Fatalf("%d fragments, want %d", len(got), want)
	}
	var sum []byte
	var id uint32
	for i, g := range got {
		if g.hdr != (virtio.NetHdr{}) {
			t.Fatalf("fragment %d has the header %+v", i, g.hdr)
		}
		var off int
		var more bool
		var body []byte
		var thisID uint32
		pkt := verify(t, g.bytes)
		if p.v6 {
			f := pkt.Layer(layers.LayerTypeIPv6Fragment).(*layers.IPv6Fragment)
			off, more, body, thisID = int(f.FragmentOffset)*8, f.MoreFragments, f.Payload, f.Identification
			if f.NextHeader != layers.IPProtocolUDP || f.Reserved1 != 0 || f.Reserved2 != 0 {
				t.Fatalf("fragment header %+v", f)
			}
		} else {
			ip := pkt.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
			off, more, body, thisID = int(ip.FragOffset)*8, ip.Flags&layers.IPv4MoreFragments != 0, ip.Payload, uint32(ip.Id)
			if ip.Flags&layers.IPv4DontFragment != 0 {
				t.Fatalf("fragment %d has DF", i)
			}
		}
		if i == 0 {
			id = thisID
		}
		if off != len(sum) || more != (i < len(got)-1) || thisID != id || len(body) > size {
			t.Fatalf("fragment %d: offset %d, want %d; more %v, id %d (first %d), %d bytes", i, off, len(sum), more, thisID, id, len(body))
		}
		sum = append(sum, body...)
	}
	if diff := cmp.Diff(datagram, sum); diff != "" {
		t.Fatalf("datagram (-want +got):\n%s", diff)
	}
}

func TestSegmenterUFOThatFitsIsNoFragment(t *testing.T) {
	p := packet{udp: true, v6: true}
	payload := randomBytes(1000, 2)
	hdr, frame := p.guestFrame(t, payload, virtio.GSOUDP, 1008)
	got := lower(t, new(Segmenter), hdr, [][]byte{frame}, 0)
	if len(got) != 1 {
		t.Fatalf("%d frames", len(got))
	}
	if diff := cmp.Diff(p.build(t, payload), got[0].bytes); diff != "" {
		t.Fatalf("(-want +got):\n%s", diff)
	}
}
