package offload

import (
	"encoding/binary"
	"math/rand/v2"
	"net"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/vhostd/vhostd/virtio"
)

// packet describes a frame, to be built by a library that knows nothing of this package.
type packet struct {
	vlans    []uint16
	v6       bool
	hop, dst bool // IPv6 extension headers
	options  bool // IPv4 and TCP options
	udp      bool
	id       uint16
	seq      uint32
	dontFrag bool
	setTCP   func(*layers.TCP)
}

var (
	src4, dst4 = net.IP{192, 168, 7, 1}, net.IP{10, 0, 255, 254}
	src6, dst6 = net.ParseIP("fe80::1:2"), net.ParseIP("2001:db8::ffff:9")
)

func (p packet) proto() layers.IPProtocol {
	if p.udp {
		return layers.IPProtocolUDP
	}
	return layers.IPProtocolTCP
}

// build returns the frame with all lengths and checksums as they should be.
func (p packet) build(t testing.TB, payload []byte) []byte {
	t.Helper()
	ls, network := p.network()
	if p.udp {
		u := &layers.UDP{SrcPort: 4000, DstPort: 9999}
		must(t, u.SetNetworkLayerForChecksum(network))
		ls = append(ls, u)
	} else {
		ls = append(ls, p.tcp(t, network))
	}
	return append(p.ethernet(), serialize(t, append(ls, gopacket.Payload(payload))...)...)
}

// ethernet is the frame's beginning; the library would pad short frames.
func (p packet) ethernet() []byte {
	b := []byte{2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1}
	for _, id := range p.vlans {
		b = append(b, 0x81, 0, byte(id>>8), byte(id))
	}
	if p.v6 {
		return append(b, 0x86, 0xdd)
	}
	return append(b, 0x08, 0x00)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func serialize(t testing.TB, ls ...gopacket.SerializableLayer) []byte {
	t.Helper()
	b := gopacket.NewSerializeBuffer()
	must(t, gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ls...))
	return b.Bytes()
}

func (p packet) tcp(t testing.TB, network gopacket.NetworkLayer) *layers.TCP {
	l := &layers.TCP{SrcPort: 80, DstPort: 49152, Seq: p.seq, Ack: 77, ACK: true, Window: 512}
	if p.options {
		l.Options = []layers.TCPOption{
			{OptionType: layers.TCPOptionKindNop}, {OptionType: layers.TCPOptionKindNop},
			{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: []byte{1, 2, 3, 4, 5, 6, 7, 8}},
		}
	}
	if p.setTCP != nil {
		p.setTCP(l)
	}
	must(t, l.SetNetworkLayerForChecksum(network))
	return l
}

// network returns the IP header with its extension headers.
func (p packet) network() ([]gopacket.SerializableLayer, gopacket.NetworkLayer) {
	if !p.v6 {
		ip := &layers.IPv4{Version: 4, IHL: 5, TTL: 64, Id: p.id, Protocol: p.proto(), SrcIP: src4, DstIP: dst4}
		if p.dontFrag {
			ip.Flags = layers.IPv4DontFragment
		}
		if p.options {
			ip.Options = []layers.IPv4Option{{OptionType: 148, OptionLength: 4, OptionData: []byte{0, 0}}} // router alert
		}
		return []gopacket.SerializableLayer{ip}, ip
	}
	ip := &layers.IPv6{Version: 6, TrafficClass: 1, FlowLabel: 0x12345, HopLimit: 64, NextHeader: p.proto(), SrcIP: src6, DstIP: dst6}
	ls := []gopacket.SerializableLayer{ip}
	next := &ip.NextHeader
	if p.hop {
		h := &layers.IPv6HopByHop{Options: []*layers.IPv6HopByHopOption{{OptionType: 30, OptionData: []byte{1, 2, 3, 4}}}}
		*next, next = layers.IPProtocolIPv6HopByHop, &h.NextHeader
		ls = append(ls, h)
	}
	if p.dst {
		d := &layers.IPv6Destination{Options: []*layers.IPv6DestinationOption{{OptionType: 30, OptionData: make([]byte, 12)}}}
		*next, next = layers.IPProtocolIPv6Destination, &d.NextHeader
		ls = append(ls, d)
	}
	*next = p.proto()
	return ls, ip
}

// where finds the l4 header by the library's own parse.
func (p packet) where(t testing.TB, frame []byte) (l3, l4, payload int) {
	t.Helper()
	pkt := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	at := 0
	for _, l := range pkt.Layers() {
		switch l.(type) {
		case *layers.IPv4, *layers.IPv6:
			l3 = at
		case *layers.TCP, *layers.UDP:
			return l3, at, at + len(l.LayerContents())
		}
		at += len(l.LayerContents())
	}
	t.Fatalf("no l4 header in %v", pkt)
	return
}

// guestFrame is the frame as a driver sends it: a pseudo-header's sum in the checksum field, and a header that says so.
func (p packet) guestFrame(t testing.TB, payload []byte, gso uint8, size int) (virtio.NetHdr, []byte) {
	t.Helper()
	frame := p.build(t, payload)
	l3, l4, head := p.where(t, frame)
	off := 16
	if p.udp {
		off = 6
	}
	binary.BigEndian.PutUint16(frame[l4+off:], pseudoSum(frame, l3, p.v6, uint8(p.proto()), len(frame)-l4))
	return virtio.NetHdr{
		Flags: virtio.NetHdrNeedsCsum, GSOType: gso, GSOSize: uint16(size), HdrLen: uint16(head),
		CsumStart: uint16(l4), CsumOffset: uint16(off),
	}, frame
}

// pseudoSum is the sum of the pseudo-header, a word at a time.
func pseudoSum(frame []byte, l3 int, v6 bool, proto uint8, n int) uint16 {
	ph := append([]byte(nil), frame[l3+12:l3+20]...)
	if v6 {
		ph = append([]byte(nil), frame[l3+8:l3+40]...)
	}
	ph = append(ph, byte(n>>24), byte(n>>16), byte(n>>8), byte(n), 0, 0, 0, proto)
	return naiveSum(ph)
}

// scatter cuts b into fragments of the given lengths, the last of which repeats; 0 gives an empty fragment, once.
func scatter(b []byte, lengths ...int) (frags [][]byte) {
	for i := 0; len(b) > 0; i++ {
		n := min(max(lengths[min(i, len(lengths)-1)], 0), len(b))
		if n == 0 && i >= len(lengths)-1 {
			n = len(b)
		}
		frags = append(frags, b[:n:n])
		b = b[n:]
	}
	return frags
}

func randomScatter(b []byte, seed uint64) (frags [][]byte) {
	r := rand.New(rand.NewPCG(seed, 2))
	for len(b) > 0 {
		n := min(r.IntN(1+r.IntN(200)), len(b))
		frags = append(frags, b[:n:n])
		b = b[n:]
	}
	return append(frags, nil)
}

// lowered is a frame that came out of a Segmenter.
type lowered struct {
	hdr   virtio.NetHdr
	head  int
	bytes []byte
}

func lower(t testing.TB, s *Segmenter, hdr virtio.NetHdr, frags [][]byte, takes Set) (out []lowered) {
	t.Helper()
	if err := s.Start(hdr, frags, takes); err != nil {
		t.Fatalf("Start: %v", err)
	}
	return drain(s)
}

func drain(s *Segmenter) (out []lowered) {
	var head [MaxHeaders]byte
	for {
		h, n, payload, ok := s.Next(head[:])
		if !ok {
			return out
		}
		b := append([]byte(nil), head[:n]...)
		for _, p := range payload {
			b = append(b, p...)
		}
		out = append(out, lowered{h, n, b})
	}
}

// verify has the library check every length and checksum of a complete frame.
func verify(t testing.TB, frame []byte) gopacket.Packet {
	t.Helper()
	pkt := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	if e := pkt.ErrorLayer(); e != nil {
		t.Fatalf("segment does not parse: %v\n%x", e.Error(), frame)
	}
	var network gopacket.NetworkLayer
	for _, l := range pkt.Layers() {
		if n, ok := l.(gopacket.NetworkLayer); ok {
			network = n
		}
		if l4, ok := l.(interface {
			SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
		}); ok {
			must(t, l4.SetNetworkLayerForChecksum(network))
		}
		if sum, ok := l.(gopacket.LayerWithChecksum); ok {
			if err, got := sum.VerifyChecksum(); err != nil || !got.Valid {
				t.Fatalf("checksum of %v is %#x, should be %#x (%v)\n%x", l.LayerType(), got.Actual, got.Correct, err, frame)
			}
		}
	}
	if meta := pkt.Metadata(); meta.Truncated {
		t.Fatalf("segment is shorter than its lengths say\n%x", frame)
	}
	return pkt
}
