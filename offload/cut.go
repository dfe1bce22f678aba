package offload

import (
	"math/rand/v2"

	"github.com/vhostd/vhostd/virtio"
)

// Flags of the TCP header's byte 13.
const (
	tcpFIN = 0x01
	tcpPSH = 0x08
	tcpCWR = 0x80
)

func (l *layout) csumOffset() int {
	if l.proto == protoUDP {
		return udpCsum
	}
	return tcpCsum
}

// nextSegment cuts the next TCP segment or UDP datagram off.
func (s *Segmenter) nextSegment(head []byte) (virtio.NetHdr, int, [][]byte, bool) {
	n := min(s.size, s.left)
	head = head[:copy(head, s.head[:s.headLen])]
	payload := s.take(n)
	s.setIPLen(head, len(head)-s.layout.l3+n)
	if s.kind == tcp {
		s.setTCP(head[s.layout.l4:])
	} else {
		be.PutUint16(head[s.layout.l4+4:], uint16(udpLen+n))
	}
	s.index++
	s.sent += n
	if s.left == 0 {
		s.kind = done
	}
	return s.finish(head, payload, len(head)-s.layout.l4+n), len(head), payload, true
}

// setIPLen writes what differs from segment to segment in the IP header, for a packet of n bytes.
func (s *Segmenter) setIPLen(head []byte, n int) {
	ip := head[s.layout.l3:s.layout.l4]
	if s.layout.v6 {
		be.PutUint16(ip[4:], uint16(n-ip6Len))
		return
	}
	be.PutUint16(ip[2:], uint16(n))
	be.PutUint16(ip[4:], be.Uint16(s.head[s.layout.l3+4:])+uint16(s.index))
	sumIPv4(ip)
}

// sumIPv4 computes the checksum of an IPv4 header.
func sumIPv4(ip []byte) {
	be.PutUint16(ip[10:], 0)
	be.PutUint16(ip[10:], Checksum(0, ip))
}

// setTCP writes the sequence number, and leaves FIN and PSH to the last segment, CWR to the first (RFC 3168 §6.1.2: it answers one
// mark, once).
func (s *Segmenter) setTCP(h []byte) {
	be.PutUint32(h[4:], be.Uint32(h[4:])+uint32(s.sent))
	if s.left > 0 {
		h[13] &^= tcpFIN | tcpPSH
	}
	if s.index > 0 {
		h[13] &^= tcpCWR
	}
}

// finish writes the checksum of a segment whose l4 header and payload are n bytes: completed, or the pseudo-header's sum alone for a
// receiver that does the rest.
func (s *Segmenter) finish(head []byte, payload [][]byte, n int) (hdr virtio.NetHdr) {
	l4, at := s.layout.l4, s.layout.l4+s.layout.csumOffset()
	pseudo := s.base
	pseudo.AddWord(uint16(n))
	be.PutUint16(head[at:], pseudo.Fold())
	if s.partial {
		hdr.Flags = virtio.NetHdrNeedsCsum
		hdr.CsumStart, hdr.CsumOffset = uint16(l4), uint16(at-l4)
		return hdr
	}
	putChecksum(head[at:], sumOf(head[l4:], payload))
	return hdr
}

// ip6FragLen is the length of an IPv6 fragment header in bytes (RFC 8200 §4.5).
const ip6FragLen = 8

// planFragments prepares a datagram of total bytes, its UDP header included, for fragments of s.size bytes of it each. The checksum covers
// the whole datagram and is completed now, whatever the receiver does: nobody can do it later.
func (s *Segmenter) planFragments(total int) error {
	s.size &^= 7 // all fragments but the last are multiples of 8 bytes
	switch {
	case s.size == 0, s.layout.l4-s.layout.l3+total > maxPacket:
		return ErrGSOSize
	case s.layout.l4+s.size > maxPacket:
		return ErrGSOSize
	case s.headLen+ip6FragLen > MaxHeaders:
		return ErrHeaders
	case total > s.size*MaxSegments:
		return ErrSegments
	}
	s.kind = frag
	s.fragID = rand.Uint32() // not to be guessed, lest others inject their fragments (RFC 7739)
	be.PutUint16(s.head[s.layout.l4+4:], uint16(total))
	if s.hdr.Flags&virtio.NetHdrNeedsCsum != 0 {
		s.sumDatagram(total)
	}
	return nil
}

func (s *Segmenter) sumDatagram(total int) {
	udp := s.head[s.layout.l4:s.headLen]
	pseudo := s.base
	pseudo.AddWord(uint16(total))
	be.PutUint16(udp[udpCsum:], pseudo.Fold())
	sum := sumOf(udp, nil)
	off := s.off
	for _, f := range s.frame[min(s.at, len(s.frame)):] {
		sum.Add(f[off:])
		off = 0
	}
	putChecksum(udp[udpCsum:], sum)
}

// nextFragment cuts the next IP fragment off: the first carries the UDP header.
func (s *Segmenter) nextFragment(head []byte) (virtio.NetHdr, int, [][]byte, bool) {
	headers, at := s.layout.l4, s.sent // of this fragment, and in the datagram
	n := copy(head, s.head[:headers])
	if s.layout.v6 {
		n += ip6FragLen
	}
	body := s.size
	if at == 0 {
		n += copy(head[n:], s.head[headers:s.headLen])
		body -= udpLen
	}
	payload := s.take(min(body, s.left))
	body = n - headers
	for _, p := range payload {
		body += len(p)
	}
	s.setFragment(head[:n], at, headers-s.layout.l3+body)
	s.index++
	s.sent += s.size
	if s.left == 0 {
		s.kind = done
	}
	return virtio.NetHdr{}, n, payload, true
}

// setFragment writes the IP header of the fragment at offset at of the datagram, for a packet of n bytes.
func (s *Segmenter) setFragment(head []byte, at, n int) {
	l := &s.layout
	if l.v6 {
		be.PutUint16(head[l.l3+4:], uint16(n-ip6Len))
		head[l.next] = protoFragment
		h := head[l.l4 : l.l4+ip6FragLen]
		h[0], h[1] = protoUDP, 0
		be.PutUint16(h[2:], uint16(at)|s.more(1))
		be.PutUint32(h[4:], s.fragID)
		return
	}
	ip := head[l.l3:l.l4]
	be.PutUint16(ip[2:], uint16(n))
	be.PutUint16(ip[6:], uint16(at/8)|s.more(0x2000)) // and no DF: these are fragments
	sumIPv4(ip)
}

// more is flag, unless this is the last fragment.
func (s *Segmenter) more(flag uint16) uint16 {
	if s.left == 0 {
		return 0
	}
	return flag
}
