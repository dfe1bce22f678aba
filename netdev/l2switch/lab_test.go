package l2switch_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/l2switch"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// lab is a switch whose ports have no back-end: frames go in by Send and come out by Recv.
type lab struct {
	*testing.T
	s     *l2switch.Switch
	ports map[string]netdev.Device
	peers map[string]*netdevtest.Peer
}

func newLab(t *testing.T, c l2switch.Config, ports ...l2switch.PortConfig) *lab {
	t.Helper()
	l := &lab{T: t, s: newSwitch(t, c), ports: map[string]netdev.Device{}, peers: map[string]*netdevtest.Peer{}}
	for _, p := range ports {
		l.add(p)
	}
	return l
}

func (l *lab) add(c l2switch.PortConfig) {
	l.Helper()
	d := addPort(l, l.s, c)
	l.ports[c.Name], l.peers[c.Name] = d, netdevtest.NewPeer(l, d)
	l.Cleanup(func() {
		if err := d.Close(); err != nil {
			l.Error(err)
		}
	})
}

// send has a port's guest send a frame.
func (l *lab) send(port string, hdr virtio.NetHdr, f []byte) {
	l.Helper()
	if n := l.ports[port].Queue(0).Send([]*zerocopy.Buffer{zerocopy.NewBuffer(hdr, f)}); n != 1 {
		l.Fatalf("port %s took %d frames of 1", port, n)
	}
}

// stats are those of a port.
func (l *lab) stats(port string) l2switch.PortStats {
	l.Helper()
	for _, p := range l.s.Stats().Ports {
		if p.Name == port {
			return p
		}
	}
	l.Fatalf("no port %s", port)
	return l2switch.PortStats{}
}

// drops is how many frames a port has dropped for a reason.
func (l *lab) drops(port string, why l2switch.Reason) uint64 {
	return l.stats(port).Drops[why.String()]
}

// expect takes the next frame that comes to a port; it must be f.
func (l *lab) expect(port string, f []byte) {
	l.Helper()
	if _, got := l.peers[port].Capture(); !bytes.Equal(got, f) {
		l.Fatalf("port %s got\n%x, want\n%x", port, got, f)
	}
}

// nothing checks that nothing waits for a port.
func (l *lab) nothing(port string) {
	l.Helper()
	if n := l.stats(port).Waiting; n != 0 {
		_, f := l.peers[port].Capture()
		l.Fatalf("port %s got a frame that it should not have: %x", port, f)
	}
}

// passes checks that a frame from one port arrives at another as want; nil is as it was sent.
func (l *lab) passes(from, to string, f, want []byte) {
	l.Helper()
	if want == nil {
		want = f
	}
	l.send(from, virtio.NetHdr{}, f)
	l.expect(to, want)
}

// dropped checks that a frame is dropped at a port for a reason, and reaches none of others.
func (l *lab) dropped(from string, f []byte, at string, why l2switch.Reason, others ...string) {
	l.Helper()
	l.droppedHdr(from, virtio.NetHdr{}, f, at, why, others...)
}

func (l *lab) droppedHdr(from string, hdr virtio.NetHdr, f []byte, at string, why l2switch.Reason, others ...string) {
	l.Helper()
	before := l.drops(at, why)
	l.send(from, hdr, f)
	if n := l.drops(at, why) - before; n != 1 {
		l.Fatalf("%d frames were dropped for %v, want 1: port %s has %v\n%x", n, why, at, l.stats(at).Drops, f)
	}
	for _, o := range others {
		l.nothing(o)
	}
}

// ether is an Ethernet frame, of at least 60 bytes.
func ether(dst, src l2switch.MAC, kind uint16, payload ...[]byte) []byte {
	f := append(append([]byte{}, dst[:]...), src[:]...)
	f = binary.BigEndian.AppendUint16(f, kind)
	for _, p := range payload {
		f = append(f, p...)
	}
	for len(f) < 60 {
		f = append(f, 0)
	}
	return f
}

// tag inserts a VLAN tag.
func tag(f []byte, vid uint16) []byte {
	out := append([]byte{}, f[:12]...)
	out = binary.BigEndian.AppendUint16(out, 0x8100)
	out = binary.BigEndian.AppendUint16(out, vid)
	return append(out, f[12:]...)
}

func addr(s string) []byte {
	a := netip.MustParseAddr(s)
	return a.AsSlice()
}

// ip4 is an IPv4 packet; frag is its flags and offset.
func ip4(src, dst string, proto byte, frag uint16, payload ...byte) []byte {
	h := make([]byte, 20)
	h[0], h[8], h[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(h[2:], uint16(20+len(payload)))
	binary.BigEndian.PutUint16(h[6:], frag)
	copy(h[12:], addr(src))
	copy(h[16:], addr(dst))
	return append(h, payload...)
}

// ip6 is an IPv6 packet.
func ip6(src, dst string, next byte, payload ...byte) []byte {
	h := make([]byte, 40)
	h[0], h[6], h[7] = 0x60, next, 255
	binary.BigEndian.PutUint16(h[4:], uint16(len(payload)))
	copy(h[8:], addr(src))
	copy(h[24:], addr(dst))
	return append(h, payload...)
}

// udp is a datagram.
func udp(src, dst uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, src)
	b = binary.BigEndian.AppendUint16(b, dst)
	return append(b, 0, 16, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8)
}

// arp is a message that says who has which address.
func arp(op uint16, sha l2switch.MAC, spa string, tpa string) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, byte(op >> 8), byte(op)}
	b = append(append(b, sha[:]...), addr(spa)...)
	return append(append(b, 0, 0, 0, 0, 0, 0), addr(tpa)...)
}

// nd is a message of neighbour discovery: its fixed part is n bytes, then come options.
func nd(kind byte, n int, target string, options ...[]byte) []byte {
	b := make([]byte, n)
	b[0] = kind
	if target != "" {
		copy(b[8:], addr(target))
	}
	for _, o := range options {
		b = append(b, o...)
	}
	return b
}

// link is an option of neighbour discovery with a link-layer address.
func link(kind byte, m l2switch.MAC) []byte { return append([]byte{kind, 1}, m[:]...) }

// ext is an IPv6 extension header of 8 bytes.
func ext(next byte) []byte { return []byte{next, 0, 1, 4, 0, 0, 0, 0} }

// fragment is the IPv6 fragment header, of a piece at an offset of 8 bytes' units.
func fragment(next byte, offset uint16) []byte {
	return []byte{next, 0, byte(offset >> 5), byte(offset<<3) | 1, 0, 0, 0, 9}
}

func cat(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func TestLabFrames(t *testing.T) {
	if f := tag(ether(mac(1), mac(2), 0x0800), 5); fmt.Sprintf("%x", f[:18]) != "0200000000010200000000028100000508"+"00" {
		t.Fatalf("%x", f[:18])
	}
}

func prefixes(all ...string) (p []netip.Prefix) {
	for _, s := range all {
		p = append(p, netip.MustParsePrefix(s))
	}
	return p
}
