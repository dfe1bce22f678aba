package offload

import (
	"fmt"

	"github.com/vhostd/vhostd/virtio"
)

// kind is what a Segmenter does to its frame.
type kind uint8

const (
	done kind = iota
	pass      // hand it over as it is
	csum      // complete its checksum
	tcp       // cut it into TCP segments
	udp       // cut it into UDP datagrams
	frag      // cut it into IP fragments
)

// Segmenter lowers one frame after the other for a receiver that does not take them as they are: Start, then Next until it reports
// false. It keeps its scratch memory, so that it allocates nothing once that has grown. The zero Segmenter is ready. It is not safe
// for concurrent use.
type Segmenter struct {
	kind    kind
	partial bool // segments keep NEEDS_CSUM
	hdr     virtio.NetHdr
	frame   [][]byte
	at, off int // cursor: the next payload byte is frame[at][off]
	left    int // payload bytes not handed out yet
	size    int // payload bytes of a segment; of a fragment, counting the UDP header
	index   int // segments handed out
	sent    int // payload bytes handed out; in fragments, counting the UDP header

	layout  layout
	headLen int // of the headers that each segment repeats
	base    Sum // pseudo-header without its length
	fragID  uint32
	head    [MaxHeaders]byte // private copy of the frame's first bytes
	payload [][]byte
}

// Start begins with a frame of virtio-net header hdr, whose bytes are the fragments in frame, for a receiver that handles takes. It reads the
// frame's headers, once. frame must stay as it is until Next has reported false or the next Start. An error is the frame's fault: it is to be
// dropped, and Next reports false.
func (s *Segmenter) Start(hdr virtio.NetHdr, frame [][]byte, takes Set) error {
	s.kind, s.hdr, s.frame = done, hdr, frame
	s.at, s.off, s.index, s.sent, s.left = 0, 0, 0, 0, 0
	if takes.Takes(hdr) {
		s.kind = pass
		return nil
	}
	for _, f := range frame {
		s.left += len(f)
	}
	s.partial = takes.Has(Csum)
	if hdr.GSOType == virtio.GSONone {
		return s.startCsum()
	}
	return s.startCut(takes)
}

// startCsum prepares a frame that is not to be cut, for a receiver that wants no partial checksum.
func (s *Segmenter) startCsum() error {
	if s.hdr.Flags&virtio.NetHdrNeedsCsum == 0 {
		// The flags say that the checksum was verified, or nothing that is known: a receiver without Csum gets none
		// (virtio-v1.2 §5.1.6.4.1).
		s.kind, s.hdr = pass, virtio.NetHdr{NumBuffers: s.hdr.NumBuffers}
		return nil
	}
	n := int(s.hdr.CsumStart) + int(s.hdr.CsumOffset) + 2
	if n > min(s.left, MaxHeaders) {
		return ErrCsum
	}
	s.fetch(n)
	s.kind, s.headLen = csum, n
	return nil
}

// startCut prepares a frame that is to be cut, unless it turns out that the receiver takes it.
func (s *Segmenter) startCut(takes Set) error {
	gso := s.hdr.GSO()
	switch gso {
	case virtio.GSOTCPv4, virtio.GSOTCPv6, virtio.GSOUDP, virtio.GSOUDPL4:
	default:
		return ErrGSOType
	}
	if s.hdr.GSOSize == 0 {
		return ErrGSOSize
	}
	frameLen := s.left
	s.fetch(min(frameLen, MaxHeaders))
	h := s.head[:frameLen-s.left]
	l, err := parse(h)
	if err == nil && !l.is(gso) {
		err = ErrProtocol
	}
	var l4 int
	if err == nil {
		l4, err = l.l4Len(h)
	}
	if err != nil {
		return tooLong(err, frameLen)
	}
	if s.wrongCsum(&l) {
		return ErrCsum
	}
	if gso == virtio.GSOUDPL4 && takes.Has(Csum) && (l.v6 && takes.Has(USO6) || !l.v6 && takes.Has(USO4)) {
		// The headers that were read are handed over from the private copy: nobody decides on them twice.
		s.kind, s.headLen, s.layout = pass, len(h), l
		return nil
	}
	s.layout, s.headLen = l, l.l4+l4
	s.rewind(frameLen)
	return s.plan(gso, frameLen)
}

// tooLong tells a frame that was cut short from headers that go on beyond what was looked at.
func tooLong(err error, frameLen int) error {
	if err == ErrTruncated && frameLen > MaxHeaders {
		return ErrHeaders
	}
	return err
}

// wrongCsum reports whether the header puts the partial checksum somewhere else than the l4 header does.
func (s *Segmenter) wrongCsum(l *layout) bool {
	return s.hdr.Flags&virtio.NetHdrNeedsCsum != 0 &&
		(int(s.hdr.CsumStart) != l.l4 || int(s.hdr.CsumOffset) != l.csumOffset())
}

// plan decides how the frame is cut, now that its headers are known, and checks that every segment will be a legal packet.
func (s *Segmenter) plan(gso uint8, frameLen int) error {
	s.size = int(s.hdr.GSOSize)
	s.kind = tcp
	if s.layout.proto == protoUDP {
		s.kind = udp
	}
	total := frameLen - s.layout.l4
	s.base = s.layout.pseudo(s.head[:], s.layout.l4+s.layout.csumOffset(), total)
	headers := s.headLen - s.layout.l3 // in an IP packet
	err := error(nil)
	switch {
	case gso == virtio.GSOUDP && total > s.size:
		err = s.planFragments(total)
	case gso == virtio.GSOUDP:
		s.size = max(s.left, 1)
		fallthrough
	default:
		if headers+min(s.size, s.left) > maxPacket {
			err = ErrGSOSize
		} else if s.left > s.size*MaxSegments {
			err = ErrSegments
		}
	}
	if err != nil {
		s.kind = done
	}
	return err
}

// maxPacket is the longest IP packet in bytes: IPv4's limit, and IPv6's without its own header.
const maxPacket = 65535

// Next returns the next frame: its virtio-net header, the number of bytes of its headers, which it has written to head, and its payload,
// which are slices of the frame's fragments. The payload's slice is good until the next call; ok is false when the frame is done. head must
// hold MaxHeaders bytes.
func (s *Segmenter) Next(head []byte) (hdr virtio.NetHdr, headLen int, payload [][]byte, ok bool) {
	if len(head) < MaxHeaders {
		panic(fmt.Sprintf("bug: %d bytes for headers, %d are needed", len(head), MaxHeaders))
	}
	switch s.kind {
	case done:
		return hdr, 0, nil, false
	case pass:
		s.kind = done
		return s.passed(head)
	case csum:
		s.kind = done
		return s.checksummed(head)
	case frag:
		return s.nextFragment(head)
	default:
		return s.nextSegment(head)
	}
}

// passed hands the frame over, with as many bytes of it as were read from the private copy.
func (s *Segmenter) passed(head []byte) (virtio.NetHdr, int, [][]byte, bool) {
	if s.at == 0 && s.off == 0 {
		return s.hdr, 0, s.frame, true
	}
	copy(head, s.head[:s.headLen])
	return s.hdr, s.headLen, s.take(s.left), true
}

func (s *Segmenter) checksummed(head []byte) (virtio.NetHdr, int, [][]byte, bool) {
	start := int(s.hdr.CsumStart)
	head = head[:copy(head, s.head[:s.headLen])]
	payload := s.take(s.left)
	putChecksum(head[start+int(s.hdr.CsumOffset):], sumOf(head[start:], payload))
	return virtio.NetHdr{NumBuffers: s.hdr.NumBuffers}, len(head), payload, true
}

func sumOf(head []byte, payload [][]byte) (s Sum) {
	s.Add(head)
	for _, p := range payload {
		s.Add(p)
	}
	return s
}

// putChecksum stores the complement of a sum. 0 becomes 0xffff, which UDP demands, and which is the same to all others.
func putChecksum(field []byte, s Sum) {
	c := ^s.Fold()
	if c == 0 {
		c = 0xffff
	}
	be.PutUint16(field, c)
}

// fetch reads the next n bytes of the frame into the private copy.
func (s *Segmenter) fetch(n int) {
	s.left -= n
	for got := 0; got < n; {
		m := copy(s.head[got:n], s.frame[s.at][s.off:])
		got += m
		s.advance(m)
	}
}

// rewind sets the cursor to the end of the headers, of which fetch had to read more than there are.
func (s *Segmenter) rewind(frameLen int) {
	s.at, s.off, s.left = 0, 0, frameLen-s.headLen
	for n := s.headLen; n > 0; {
		m := min(n, len(s.frame[s.at])-s.off)
		n -= m
		s.advance(m)
	}
}

// advance moves the cursor by n bytes, which lie in one fragment.
func (s *Segmenter) advance(n int) {
	s.off += n
	if s.off == len(s.frame[s.at]) {
		s.at, s.off = s.at+1, 0
	}
}

// take returns the next n bytes of the frame as slices of its fragments.
func (s *Segmenter) take(n int) [][]byte {
	s.left -= n
	s.payload = s.payload[:0]
	for n > 0 {
		p := s.frame[s.at][s.off:]
		p = p[:min(n, len(p)):min(n, len(p))]
		if len(p) > 0 {
			s.payload = append(s.payload, p)
		}
		n -= len(p)
		s.advance(len(p))
	}
	return s.payload
}
