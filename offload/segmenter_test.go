package offload

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/vhostd/vhostd/virtio"
)

func TestSegmenterCompletesChecksum(t *testing.T) {
	var s Segmenter
	for _, p := range []packet{{}, {udp: true}, {v6: true}, {v6: true, udp: true}, {v6: true, hop: true}, {options: true, vlans: []uint16{2}}} {
		for _, n := range []int{0, 1, 2, 63, 1400, 1401, 9000} {
			t.Run(fmt.Sprintf("%+v/%d", p, n), func(t *testing.T) {
				payload := randomBytes(n, 11)
				hdr, frame := p.guestFrame(t, payload, virtio.GSONone, 0)
				want := p.build(t, payload)
				for _, frags := range [][][]byte{{frame}, scatter(frame, 1), randomScatter(frame, uint64(n))} {
					got := lower(t, &s, hdr, frags, All&^Csum)
					if len(got) != 1 || got[0].hdr != (virtio.NetHdr{}) || !bytes.Equal(got[0].bytes, want) {
						t.Fatalf("got %+v\nwant %x", got, want)
					}
				}
			})
		}
	}
}

func TestSegmenterNeverSendsZeroUDPChecksum(t *testing.T) {
	p := packet{udp: true}
	payload := []byte{0, 0}
	hdr, frame := p.guestFrame(t, payload, virtio.GSONone, 0)
	// Choose the payload so that the sum is all ones.
	first := lower(t, new(Segmenter), hdr, [][]byte{frame}, 0)[0].bytes
	at := int(hdr.CsumStart + hdr.CsumOffset)
	copy(frame[len(frame)-2:], first[at:at+2])
	got := lower(t, new(Segmenter), hdr, [][]byte{frame}, 0)[0].bytes
	if got[at] != 0xff || got[at+1] != 0xff {
		t.Fatalf("checksum field is %x, want ffff", got[at:at+2])
	}
}

func TestSegmenterPassesWhatIsTaken(t *testing.T) {
	frame := randomBytes(100, 1)
	cases := []struct {
		hdr   virtio.NetHdr
		takes Set
		want  virtio.NetHdr
	}{
		{virtio.NetHdr{}, 0, virtio.NetHdr{}},
		{virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, CsumStart: 34, CsumOffset: 16}, Csum,
			virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, CsumStart: 34, CsumOffset: 16}},
		{virtio.NetHdr{Flags: virtio.NetHdrDataValid}, Csum, virtio.NetHdr{Flags: virtio.NetHdrDataValid}},
		{virtio.NetHdr{Flags: virtio.NetHdrDataValid, NumBuffers: 1}, 0, virtio.NetHdr{NumBuffers: 1}},
		{virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, GSOType: virtio.GSOTCPv4 | virtio.GSOECN, GSOSize: 9}, Csum | TSO4 | ECN,
			virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, GSOType: virtio.GSOTCPv4 | virtio.GSOECN, GSOSize: 9}},
	}
	var s Segmenter
	for _, c := range cases {
		got := lower(t, &s, c.hdr, scatter(frame, 40), c.takes)
		if diff := cmp.Diff([]lowered{{c.want, 0, frame}}, got, cmp.AllowUnexported(lowered{})); diff != "" {
			t.Errorf("%+v for %b (-want +got):\n%s", c.hdr, c.takes, diff)
		}
	}
}

func TestSegmenterUSOByVersion(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		p := packet{udp: true, v6: v6}
		hdr, frame := p.guestFrame(t, randomBytes(3000, 3), virtio.GSOUDPL4, 1000)
		for takes, whole := range map[Set]bool{Csum | USO4: !v6, Csum | USO6: v6, Csum | USO4 | USO6: true, USO4 | USO6: false} {
			got := lower(t, new(Segmenter), hdr, scatter(frame, 17), takes)
			if whole && (len(got) != 1 || got[0].hdr != hdr || !bytes.Equal(got[0].bytes, frame)) || !whole && len(got) != 3 {
				t.Errorf("v6 %v for %b: %d frames, first %+v", v6, takes, len(got), got[0].hdr)
			}
		}
	}
}

func TestSegmenterReadsHeadersOnce(t *testing.T) {
	p := packet{id: 7, options: true}
	payload := randomBytes(3000, 1)
	for _, takes := range []Set{0, Csum} {
		hdr, frame := p.guestFrame(t, payload, virtio.GSOTCPv4, 1000)
		_, _, head := p.where(t, frame)
		want := lower(t, new(Segmenter), hdr, [][]byte{frame}, takes)
		var s Segmenter
		if err := s.Start(hdr, scatter(frame, 13), takes); err != nil {
			t.Fatal(err)
		}
		clear(frame[:head]) // the guest rewrites its headers
		if diff := cmp.Diff(want, drain(&s), cmp.AllowUnexported(lowered{})); diff != "" {
			t.Errorf("the segments changed with the frame's headers (-want +got):\n%s", diff)
		}
	}
}

func TestSegmenterDoesNotCopyPayload(t *testing.T) {
	hdr, frame := packet{}.guestFrame(t, randomBytes(3000, 1), virtio.GSOTCPv4, 1000)
	var s Segmenter
	if err := s.Start(hdr, [][]byte{frame}, 0); err != nil {
		t.Fatal(err)
	}
	var head [MaxHeaders]byte
	for at := 54; ; at += 1000 {
		_, n, payload, ok := s.Next(head[:])
		if !ok {
			break
		}
		if n != 54 || len(payload) != 1 || &payload[0][0] != &frame[at] || cap(payload[0]) != 1000 {
			t.Fatalf("at %d: %d header bytes, %d fragments, capacity %d", at, n, len(payload), cap(payload[0]))
		}
	}
}

func TestSegmenterAllocatesNothing(t *testing.T) {
	var s Segmenter
	var head [MaxHeaders]byte
	for _, c := range cutCases {
		hdr, frame := c.p.guestFrame(t, c.payload(), c.gso, c.size)
		frags := scatter(frame, 4096)
		run := func() {
			if err := s.Start(hdr, frags, 0); err != nil {
				t.Fatal(err)
			}
			for {
				if _, _, _, ok := s.Next(head[:]); !ok {
					return
				}
			}
		}
		run()
		if n := testing.AllocsPerRun(10, run); n != 0 {
			t.Errorf("%s: %v allocations per frame", c.name, n)
		}
		if n := testing.AllocsPerRun(10, func() { s.Start(hdr, frags[:1], 0); s.Start(hdr, nil, 0) }); n != 0 {
			t.Errorf("%s: %v allocations per frame at fault", c.name, n)
		}
	}
}

func BenchmarkSegmenter(b *testing.B) {
	for _, takes := range []Set{0, Csum} {
		b.Run(fmt.Sprintf("tso4/size=1460/bytes=64000/takes=%d", takes), func(b *testing.B) {
			hdr, frame := packet{}.guestFrame(b, randomBytes(64000, 1), virtio.GSOTCPv4, 1460)
			frags := scatter(frame, 4096)
			var s Segmenter
			var head [MaxHeaders]byte
			b.SetBytes(int64(len(frame)))
			n := 0
			for b.Loop() {
				if err := s.Start(hdr, frags, takes); err != nil {
					b.Fatal(err)
				}
				for ok := true; ok; n++ {
					_, _, _, ok = s.Next(head[:])
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/segment")
		})
	}
}
