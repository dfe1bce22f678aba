package offload

import (
	"errors"
	"testing"

	"github.com/vhostd/vhostd/virtio"
)

// lie is a frame that is not what its headers say.
type lie struct {
	name string
	p    packet
	gso  uint8
	n    int // payload bytes
	tell func(h *virtio.NetHdr, frame []byte) []byte
	want error
}

// lies start from good frames; tell changes one thing. IPv4 is at 14, its TCP header at 34; IPv6's next header at 20.
var lies = []lie{
	{"gso_size 0", packet{}, virtio.GSOTCPv4, 3000, setSize(0), ErrGSOSize},
	{"gso_size 1", packet{}, virtio.GSOTCPv4, 60000, setSize(1), ErrSegments},
	{"gso_size 1 in UDP", packet{udp: true}, virtio.GSOUDPL4, 60000, setSize(1), ErrSegments},
	{"gso_size below 8 in UFO", packet{udp: true}, virtio.GSOUDP, 60000, setSize(7), ErrGSOSize},
	{"gso_size 65535 of as much payload", packet{}, virtio.GSOTCPv4, 65490, func(h *virtio.NetHdr, f []byte) []byte {
		h.GSOSize = 65535
		return append(f, make([]byte, 1000)...)
	}, ErrGSOSize},
	{"UFO larger than an IP packet", packet{udp: true}, virtio.GSOUDP, 65000, func(h *virtio.NetHdr, f []byte) []byte {
		return append(f, make([]byte, 1000)...)
	}, ErrGSOSize},
	{"gso_type 2", packet{}, 2, 100, keep, ErrGSOType},
	{"gso_type 0x80", packet{}, virtio.GSOECN, 100, keep, ErrGSOType},
	{"TSO6 of IPv4", packet{}, virtio.GSOTCPv6, 3000, keep, ErrProtocol},
	{"TSO4 of IPv6", packet{v6: true}, virtio.GSOTCPv4, 3000, keep, ErrProtocol},
	{"TSO4 of UDP", packet{udp: true}, virtio.GSOTCPv4, 3000, keep, ErrProtocol},
	{"USO of TCP", packet{}, virtio.GSOUDPL4, 3000, keep, ErrProtocol},
	{"ARP", packet{}, virtio.GSOTCPv4, 3000, set(13, 6), ErrProtocol},
	{"IP version 5", packet{}, virtio.GSOTCPv4, 3000, set(14, 0x55), ErrProtocol},
	{"IPv6 version 4", packet{v6: true}, virtio.GSOTCPv6, 3000, set(14, 0x40), ErrProtocol},
	{"IP header length 4", packet{}, virtio.GSOTCPv4, 3000, set(14, 0x44), ErrProtocol},
	{"IP header length beyond the frame", packet{}, virtio.GSOTCPv4, 0, set(14, 0x4f), ErrTruncated},
	{"IP header length moves TCP", packet{}, virtio.GSOTCPv4, 3000, func(_ *virtio.NetHdr, f []byte) []byte {
		f[14], f[38+12] = 0x46, 0x50
		return f
	}, ErrCsum},
	{"TCP header length 16", packet{}, virtio.GSOTCPv4, 3000, set(34+12, 0x40), ErrProtocol},
	{"TCP header length beyond the frame", packet{}, virtio.GSOTCPv4, 10, set(34+12, 0xf0), ErrTruncated},
	{"csum_start 0", packet{}, virtio.GSOTCPv4, 3000, setCsum(0, 16), ErrCsum},
	{"csum_start beyond the frame", packet{}, virtio.GSOTCPv4, 3000, setCsum(60000, 16), ErrCsum},
	{"csum_offset of UDP in TCP", packet{}, virtio.GSOTCPv4, 3000, setCsum(34, 6), ErrCsum},
	{"fragment", packet{}, virtio.GSOTCPv4, 3000, set(21, 10), ErrFragment},
	{"first fragment", packet{}, virtio.GSOTCPv4, 3000, set(20, 0x20), ErrFragment},
	{"IPv6 fragment", packet{v6: true}, virtio.GSOTCPv6, 3000, set(20, protoFragment), ErrFragment},
	{"IPv6 with ESP", packet{v6: true}, virtio.GSOTCPv6, 3000, set(20, 50), ErrExtensions},
	{"IPv6 without a next header", packet{v6: true}, virtio.GSOTCPv6, 3000, set(20, 59), ErrExtensions},
	{"IPv6 options without end", packet{v6: true}, virtio.GSOTCPv6, 3000, func(_ *virtio.NetHdr, f []byte) []byte {
		clear(f[20:]) // hop-by-hop headers of 8 bytes, up to the end
		return f
	}, ErrHeaders},
	{"IPv6 options longer than the frame", packet{v6: true, hop: true}, virtio.GSOTCPv6, 100, set(55, 255), ErrTruncated},
	{"IPv6 options longer than headers may be", packet{v6: true, hop: true}, virtio.GSOTCPv6, 9000, set(55, 255), ErrHeaders},
	{"VLAN tags without end", packet{}, virtio.GSOTCPv4, 3000, func(_ *virtio.NetHdr, f []byte) []byte {
		for i := 12; i+1 < len(f); i += 2 {
			f[i], f[i+1] = 0x81, 0
		}
		return f
	}, ErrHeaders},
	{"no room for a fragment header", packet{v6: true, udp: true, hop: true}, virtio.GSOUDP, 3000, func(h *virtio.NetHdr, f []byte) []byte {
		f[55] = 22 // the options are 184 bytes now: headers of 246
		f[54+184+4], f[54+184+5] = 0, 8
		f[54] = 17
		h.CsumStart = 54 + 184
		return f
	}, nil},
	{"still no room for a fragment header", packet{v6: true, udp: true, hop: true}, virtio.GSOUDP, 3000, func(h *virtio.NetHdr, f []byte) []byte {
		f[55] = 23 // 192 bytes: headers of 254
		h.CsumStart = 54 + 192
		return f
	}, ErrHeaders},
	{"checksum beyond the frame", packet{}, virtio.GSONone, 100, setCsum(150, 16), ErrCsum},
	{"checksum at the frame's last byte", packet{}, virtio.GSONone, 100, setCsum(153, 0), ErrCsum},
	{"checksum beyond 65535", packet{}, virtio.GSONone, 100, setCsum(65535, 65535), ErrCsum},
	{"checksum beyond 256", packet{}, virtio.GSONone, 1000, setCsum(250, 5), ErrCsum},
}

func keep(_ *virtio.NetHdr, f []byte) []byte { return f }

func set(at int, v byte) func(*virtio.NetHdr, []byte) []byte {
	return func(_ *virtio.NetHdr, f []byte) []byte {
		f[at] = v
		return f
	}
}

func setSize(n uint16) func(*virtio.NetHdr, []byte) []byte {
	return func(h *virtio.NetHdr, f []byte) []byte {
		h.GSOSize = n
		return f
	}
}

func setCsum(start, offset uint16) func(*virtio.NetHdr, []byte) []byte {
	return func(h *virtio.NetHdr, f []byte) []byte {
		h.CsumStart, h.CsumOffset = start, offset
		return f
	}
}

func TestSegmenterRefuses(t *testing.T) {
	var s Segmenter
	for _, l := range lies {
		t.Run(l.name, func(t *testing.T) {
			hdr, frame := l.p.guestFrame(t, randomBytes(l.n, 1), l.gso, 1000)
			frame = l.tell(&hdr, frame)
			for _, frags := range [][][]byte{{frame}, scatter(frame, 1)} {
				if err := s.Start(hdr, frags, 0); !errors.Is(err, l.want) {
					t.Fatalf("Start: %v, want %v", err, l.want)
				}
				checkFrames(t, &s, hdr, frame, 0, l.want != nil)
			}
		})
	}
}

// TestSegmenterSurvivesTruncation cuts good frames off at every byte.
func TestSegmenterSurvivesTruncation(t *testing.T) {
	var s Segmenter
	for _, c := range append(cutCases, cutCase{"ufo6", packet{udp: true, v6: true, hop: true}, virtio.GSOUDP, 64, 0}) {
		hdr, frame := c.p.guestFrame(t, randomBytes(100, 1), c.gso, 40)
		_, _, head := c.p.where(t, frame)
		for n := 0; n <= len(frame); n++ {
			err := s.Start(hdr, scatter(frame[:n], 7), 0)
			if (err != nil) != (n < head) {
				t.Fatalf("%s, %d bytes of which %d headers: %v", c.name, n, head, err)
			}
			checkFrames(t, &s, hdr, frame[:n], 0, err != nil)
		}
	}
}

// checkFrames takes all that s makes of a frame, and checks what must hold for any.
func checkFrames(t *testing.T, s *Segmenter, hdr virtio.NetHdr, frame []byte, takes Set, failed bool) {
	t.Helper()
	got := drain(s)
	if failed != (len(got) == 0) {
		t.Fatalf("failed: %v, and yet there are %d frames", failed, len(got))
	}
	if len(got) > MaxSegments {
		t.Fatalf("%d segments", len(got))
	}
	if len(got) > 0 {
		judge(t, hdr, frame, takes, got)
	}
	payload := 0
	for i, g := range got {
		if !takes.Takes(g.hdr) && !(g.hdr.GSO() == virtio.GSOUDPL4 && takes&(USO4|USO6) != 0) {
			t.Fatalf("segment %d has the header %+v, which %b does not take", i, g.hdr, takes)
		}
		if g.head > MaxHeaders || len(g.bytes) > max(len(frame), MaxHeaders) {
			t.Fatalf("segment %d: %d bytes, %d of headers, from a frame of %d", i, len(g.bytes), g.head, len(frame))
		}
		payload += len(g.bytes) - g.head
	}
	if len(got) == 0 {
		return
	}
	headers := got[0].head
	if hdr.GSO() == virtio.GSOUDP && len(got) > 1 && s.layout.v6 {
		headers -= ip6FragLen
	}
	if payload+headers != len(frame) {
		t.Fatalf("%d frames with %d payload bytes and %d of headers, from a frame of %d", len(got), payload, headers, len(frame))
	}
}

func FuzzSegmenter(f *testing.F) {
	for _, c := range cutCases {
		hdr, frame := c.p.guestFrame(f, randomBytes(min(c.n, 100), 1), c.gso, 33)
		f.Add(encode(hdr), byte(0), uint64(1), frame)
		f.Add(encode(hdr), byte(Csum), uint64(2), frame)
	}
	for _, l := range lies {
		hdr, frame := l.p.guestFrame(f, randomBytes(min(l.n, 400), 1), l.gso, 100)
		frame = l.tell(&hdr, frame)
		f.Add(encode(hdr), byte(0), uint64(3), frame)
	}
	hdr, frame := packet{udp: true, v6: true}.guestFrame(f, randomBytes(100, 1), virtio.GSOUDP, 40)
	f.Add(encode(hdr), byte(0), uint64(4), frame)
	f.Fuzz(func(t *testing.T, header []byte, takes byte, cuts uint64, frame []byte) {
		var s Segmenter // each its own: what it did before is not to change the coverage
		var full [virtio.NetHdrSize]byte
		copy(full[:], header)
		hdr := virtio.DecodeNetHdr(full[:])
		set := Set(takes) & All
		err := s.Start(hdr, randomScatter(frame, cuts), set)
		checkFrames(t, &s, hdr, frame, set, err != nil)
		if again := drain(&s); len(again) != 0 {
			t.Fatalf("%d frames after the last", len(again))
		}
	})
}

func encode(h virtio.NetHdr) []byte {
	b := make([]byte, virtio.NetHdrSize)
	h.Encode(b)
	return b
}
