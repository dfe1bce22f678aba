package udp

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev/netdevtest"
)

// FuzzFrame: what is found in a datagram from outside is what its header says, read a second time bit by bit; a flow is told by the bytes that
// are copied for it; and the table of addresses keeps its bounds and counts.
func FuzzFrame(f *testing.F) {
	for _, m := range []Mode{VXLAN, Geneve, Dgram} {
		f.Add(append(m.header(42), netdevtest.Frame(60, 1)...))
	}
	f.Add([]byte{0x3f, 0, 0x65, 0x58, 0, 0, 42, 0})
	peer := sys.NewSockaddr(netip.MustParseAddrPort("10.0.0.2:5"), 0)
	tbl := newTable(4789, nil)
	f.Fuzz(func(t *testing.T, d []byte) {
		for _, m := range []Mode{VXLAN, Geneve, Dgram} {
			frame, v := m.frame(d, 42)
			if (v == good) != (len(frame) >= etherHdr) || !bytes.HasSuffix(d, frame) {
				t.Errorf("%v: verdict %d, %d bytes of %d", m, v, len(frame), len(d))
			}
			if want := oracle(m, d, 42); v != want {
				t.Errorf("%v: verdict %d on %x, want %d", m, v, d, want)
			}
			if v == good {
				tbl.learn(mac(frame[6:]), &peer, time.Now())
			}
		}
		head := d[:min(len(d), headLen)]
		if n := flowLen(head); n > headLen || flowHash(head) != flowHash(head[:min(n, len(head))]) {
			t.Errorf("the flow of %x is told by more than %d bytes", head, n)
		}
		behind := 0
		for _, n := range tbl.behind {
			behind += n
		}
		if len(tbl.m) > maxLearnt || behind != len(tbl.m) || behind > maxFromOne || tbl.strangers != behind {
			t.Errorf("%d addresses, %d behind peers, %d strangers", len(tbl.m), behind, tbl.strangers)
		}
	})
}

// oracle is the verdict on a datagram by RFC 7348 §5 and RFC 8926 §3.4.
func oracle(m Mode, d []byte, vni uint32) verdict {
	bit := func(i int) bool { return d[i/8]>>(7-i%8)&1 != 0 }
	number := func(from, n int) (v uint32) {
		for i := range n {
			if v <<= 1; bit(from + i) {
				v |= 1
			}
		}
		return v
	}
	need := 14
	switch {
	case m == Dgram:
	case len(d) < 8:
		return malformed
	case m == VXLAN && !bit(4), m == Geneve && (number(0, 2) != 0 || bit(8) || bit(9) || number(16, 16) != 0x6558):
		return malformed
	case number(32, 24) != vni:
		return otherVNI
	case m == Geneve:
		need += 8 + 4*int(number(2, 6))
	default:
		need += 8
	}
	if len(d) < need {
		return malformed
	}
	return good
}
