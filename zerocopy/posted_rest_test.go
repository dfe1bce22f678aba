package zerocopy

import (
	"bytes"
	"testing"

	"github.com/vhostd/vhostd/virtio"
)

// A frame that the guest's driver cannot take as it is is cut; what finds no room waits, and nothing is lost or doubled, also when memory changes meanwhile.
func TestPostedLowers(t *testing.T) {
	g := newPosts(t, 8)
	p := NewPosted(g.ring, features) // accepts no offload
	data := tcpFrame(4000)
	hdr := virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, GSOType: virtio.GSOTCPv4, GSOSize: 1000, HdrLen: 54, CsumStart: 34, CsumOffset: 16}
	if r := p.Write(hdr, [][]byte{data}); r != NoRoom {
		t.Fatalf("result %v with nothing posted", r)
	}
	g.add(2000)
	if r := p.Write(hdr, [][]byte{data}); r != Written {
		t.Fatalf("result %v", r)
	}
	if r := p.Write(virtio.NetHdr{}, [][]byte{frame(60, 1)}); r != NoRoom {
		t.Error("a frame overtook the rest of the one before")
	}
	var got []byte
	for i := range 4 {
		h, b, ok := g.received(virtio.NetHdrSize)
		if !ok || h.Flags|h.GSOType != 0 || len(b) != 54+1000 {
			t.Fatalf("segment %d: %v, header %+v, %d bytes", i, ok, h, len(b))
		}
		got = append(got, b[54:]...)
		p.GiveBack()
		g.add(2000)
		if done := p.Flush(); done != (i >= 2) {
			t.Errorf("segment %d: flushed %v", i, done)
		}
	}
	if !bytes.Equal(got, data[54:]) {
		t.Error("the segments do not make up the frame")
	}
	if r := p.Write(virtio.NetHdr{}, [][]byte{frame(60, 1)}); r != Written || p.Stats.TooBig != 0 {
		t.Error(r, p.Stats)
	}
}

// TestPostedRestStaysInPlace: a guest that posts one buffer at a time does not have the list of what is left of a large frame copied for each of them.
func TestPostedRestStaysInPlace(t *testing.T) {
	const segments = 60
	g := newPosts(t, 8)
	p := NewPosted(g.ring, features)
	hdr := virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, GSOType: virtio.GSOTCPv4, GSOSize: 1000, HdrLen: 54, CsumStart: 34, CsumOffset: 16}
	data := tcpFrame(1000 * segments)
	var got []byte
	next := func() {
		if _, b, ok := g.received(virtio.NetHdrSize); ok {
			got = append(got, b[54:]...)
		}
		g.next = ramBase + ramSize/2
		g.add(2000)
	}
	next()
	if r := p.Write(hdr, [][]byte{data}); r != Written || p.Waiting() != segments-1 {
		t.Fatalf("%v, %d segments wait", r, p.Waiting())
	}
	first := &p.pending[0]
	for left := segments - 2; left >= 0; left-- {
		next()
		if done := p.Flush(); done != (left == 0) || p.Waiting() != left || &p.pending[:1][0] != first {
			t.Fatalf("flushed %v; %d segments wait, want %d, in the place where they were: %v", done, p.Waiting(), left, &p.pending[:1][0] == first)
		}
	}
	next()
	if !bytes.Equal(got, data[54:]) {
		t.Error("the segments do not make up the frame")
	}
}

// TestPostedInherits: what is left of a frame that was cut outlives the queue, for a driver with the same offloads; for another one it is lost, and counted.
func TestPostedInherits(t *testing.T) {
	hdr := virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, GSOType: virtio.GSOTCPv4, GSOSize: 1000, HdrLen: 54, CsumStart: 34, CsumOffset: 16}
	for f, lost := range map[virtio.Features]uint64{features: 0, features | virtio.FNetGuestCsum: 3} {
		g := newPosts(t, 8)
		p := NewPosted(g.ring, features)
		g.add(2000)
		if r := p.Write(hdr, [][]byte{tcpFrame(4000)}); r != Written {
			t.Fatalf("result %v", r)
		}
		rest := p.Close()
		if !p.Flush() {
			t.Error("a queue that was closed has frames all the same")
		}
		next := NewPosted(g.ring, f)
		next.Inherit(rest)
		for range 4 {
			g.add(2000)
		}
		if !next.Flush() {
			t.Error("the rest found no room")
		}
		if got := next.Stats; got.TooBig != lost || got.Frames != 3-lost {
			t.Errorf("features %v: %d segments arrived and %d count as lost, want %d and %d", f, got.Frames, got.TooBig, 3-lost, lost)
		}
	}
}

// tcpFrame is an IPv4 TCP frame with n bytes of payload.
func tcpFrame(n int) []byte {
	f := append(make([]byte, 54), frame(n, 1)...)
	f[12], f[13] = 0x08, 0x00
	ip := f[14:]
	ip[0], ip[8], ip[9] = 0x45, 64, 6
	ip[2], ip[3] = byte((40+n)>>8), byte(40+n)
	copy(ip[12:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
	f[14+20+12] = 5 << 4
	return f
}
