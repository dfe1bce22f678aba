//go:build linux

package soak

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
)

// Sizes in bytes.
const (
	ethLen, ipLen, tcpLen = 14, 20, 20
	headers               = ethLen + ipLen + tcpLen
	mss                   = 1400 // fits every link, tunnels included
	maxPayload            = 60000
)

// stream is one direction of a link: TCP segments without a connection, whose payload depends on the stream and on the place in it alone. Whoever
// cuts segments on the way, or puts some together, changes nothing of that.
type stream struct {
	id       uint32 // of this stream among all that ever were
	end      byte   // of the link, that it begins at
	large    bool   // segments that the device has to cut
	partial  bool   // checksums that the device has to complete
	sent     uint64 // bytes
	expected atomic.Uint64
	frames   uint64
	lost     uint64
	missing  uint64   // frames at least that these bytes were
	gaps     []string // the first of them
	begin    time.Time
	buf      []byte
	want     []byte
}

// The frames under way are bounded, so that no queue of the host runs over, be they cut or not; and given up for lost is what has not come for patience, in
// which this process has looked for it many times: where somebody else has the processors for seconds, daemons have done nothing meanwhile either.
const (
	window      = 100
	windowBytes = 256 << 10
	patience    = 3 * time.Second
	looks       = 250
	look        = 10 * time.Millisecond
)

// fill writes the payload at a place of the stream.
func (s *stream) fill(p []byte, off uint64) {
	var word [8]byte
	for len(p) > 0 {
		x := (off/8 + uint64(s.id)<<32) * 0x9e3779b97f4a7c15
		x ^= x >> 29
		binary.LittleEndian.PutUint64(word[:], x*0xbf58476d1ce4e5b9)
		n := copy(p, word[off%8:])
		p, off = p[n:], off+uint64(n)
	}
}

// next makes the next frame, of n bytes of payload.
func (s *stream) next(n int, r *rand.Rand) (virtio.NetHdr, []byte) {
	f := append(s.buf[:0], make([]byte, headers+n)...)
	s.buf = f
	copy(f, []byte{2, 0, 0, 0, 1, 1 - s.end, 2, 0, 0, 0, 1, s.end, 8, 0})
	ip := f[ethLen:]
	ip[0], ip[8], ip[9] = 0x45, 64, 6
	binary.BigEndian.PutUint16(ip[2:], uint16(ipLen+tcpLen+n))
	ip[6] = 0x40 // do not fragment
	copy(ip[12:], []byte{192, 0, 2, 1 + s.end, 192, 0, 2, 2 - s.end})
	binary.BigEndian.PutUint16(ip[10:], offload.Checksum(0, ip[:ipLen]))
	tcp := ip[ipLen:]
	binary.BigEndian.PutUint32(tcp, s.id) // both ports
	binary.BigEndian.PutUint32(tcp[4:], uint32(s.sent))
	tcp[12], tcp[13] = 0x50, 0x10 // header of 20 bytes, ACK
	s.fill(tcp[tcpLen:], s.sent)
	s.sent += uint64(n)
	sum := pseudo(ip, tcpLen+n)
	if s.partial && (n > mss || r.IntN(2) == 0) {
		binary.BigEndian.PutUint16(tcp[16:], sum.Fold())
		h := virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, CsumStart: ethLen + ipLen, CsumOffset: 16}
		if n > mss {
			h.GSOType, h.GSOSize, h.HdrLen = virtio.GSOTCPv4, mss, headers
		}
		return h, f
	}
	sum.Add(tcp)
	binary.BigEndian.PutUint16(tcp[16:], ^sum.Fold())
	return virtio.NetHdr{}, f
}

// pseudo is the sum of TCP's pseudo header.
func pseudo(ip []byte, n int) (s offload.Sum) {
	s.Add(ip[12:20])
	s.AddWord(6)
	s.AddWord(uint16(n))
	return s
}

// errForeign is a frame that is none of this stream's: the host's own, or one of an earlier round that was late.
var errForeign = errors.New("another stream's")

// take checks a frame that has come.
func (s *stream) take(h virtio.NetHdr, f []byte) error {
	if len(f) < headers || f[12] != 8 || f[13] != 0 || f[ethLen] != 0x45 || f[ethLen+9] != 6 {
		return errForeign
	}
	ip := f[ethLen:]
	tcp := ip[ipLen:]
	if binary.BigEndian.Uint32(tcp) != s.id {
		return errForeign
	}
	total := int(binary.BigEndian.Uint16(ip[2:]))
	if total < ipLen+tcpLen || total > len(ip) {
		return fmt.Errorf("a packet of %d bytes in a frame of %d", total, len(f))
	}
	ip, tcp = ip[:total], ip[ipLen:total] // short frames are padded
	if offload.Checksum(0, ip[:ipLen]) != 0 {
		return errors.New("wrong checksum of the IP header")
	}
	if err := checkTCP(h, ip, tcp); err != nil {
		return err
	}
	return s.place(binary.BigEndian.Uint32(tcp[4:]), tcp[tcpLen:])
}

// checkTCP checks the TCP checksum: a whole one, or the pseudo header's that is to be completed.
func checkTCP(h virtio.NetHdr, ip, tcp []byte) error {
	sum := pseudo(ip, len(tcp))
	if h.Flags&virtio.NetHdrNeedsCsum != 0 {
		if got := binary.BigEndian.Uint16(tcp[16:]); got != sum.Fold() {
			return fmt.Errorf("partial checksum %#x, want %#x", got, sum.Fold())
		}
		return nil
	}
	if sum.Add(tcp); sum.Fold() != 0xffff {
		return fmt.Errorf("wrong TCP checksum of a segment of %d bytes, flags %#x", len(tcp), h.Flags)
	}
	return nil
}

// place checks the payload and its place in the stream.
func (s *stream) place(seq uint32, p []byte) error {
	expected := s.expected.Load()
	off := expected + uint64(seq-uint32(expected))
	if seq-uint32(expected) > 1<<31 {
		return fmt.Errorf("byte %d of the stream came twice or late: %d were here", seq, expected)
	}
	s.want = append(s.want[:0], make([]byte, len(p))...)
	if s.fill(s.want, off); !bytes.Equal(p, s.want) {
		return fmt.Errorf("%d bytes at %d of the stream are not what was sent", len(p), off)
	}
	s.gap(expected, off)
	s.frames++
	s.expected.Store(off + uint64(len(p)))
	return nil
}

// gap takes note of bytes that are missing.
func (s *stream) gap(from, to uint64) {
	if from == to {
		return
	}
	s.missing += (to - from + maxPayload - 1) / maxPayload
	if s.lost += to - from; len(s.gaps) < 5 {
		s.gaps = append(s.gaps, fmt.Sprintf("%d bytes from %d on, noticed after %v", to-from, from, time.Since(s.begin).Round(time.Millisecond)))
	}
}

// send sends frames until stop is closed.
func (s *stream) send(e *vhosttest.Guest, gate *gate, l vhosttest.Layout, r *rand.Rand, stop chan struct{}) error {
	var ends [window]uint64 // of the last frames
	for i := 0; ; i++ {
		if !s.await(max(ends[i%window], max(s.sent, windowBytes)-windowBytes), stop) {
			return nil
		}
		n := 1 + r.IntN(mss)
		if s.large && r.IntN(4) == 0 {
			n = 1 + r.IntN(maxPayload)
		}
		if r.IntN(3) == 0 {
			n = 1 + r.IntN(64)
		}
		h, f := s.next(n, r)
		ends[i%window] = s.sent
		if err := gate.through(func() error { return e.Send(0, h, f, l) }); err != nil {
			return fmt.Errorf("sending byte %d: %w", s.sent, err)
		}
	}
}

// await waits until the stream has arrived up to a byte, or has not moved for so long that it will not. It reports false when stop is closed.
func (s *stream) await(end uint64, stop chan struct{}) bool {
	last, since := s.expected.Load(), time.Now()
	for looked := 0; ; looked++ {
		select {
		case <-stop:
			return false
		default:
		}
		now := s.expected.Load()
		if now >= end {
			return true
		}
		if now != last {
			last, since, looked = now, time.Now(), 0
		} else if time.Since(since) > patience && looked > looks {
			return true
		}
		time.Sleep(100 * time.Microsecond)
	}
}

// receive takes frames until all that was sent has come, or nothing has come for patience. sent is closed when the sender has ended.
func (s *stream) receive(e *vhosttest.Guest, gate *gate, sent chan struct{}) error {
	last := time.Now()
	for looked := 0; ; looked++ {
		err := gate.through(func() error {
			h, f, err := e.Recv(0, look)
			if err != nil {
				return err
			}
			return s.take(h, f)
		})
		switch {
		case err == nil:
			last, looked = time.Now(), 0
		case !errors.Is(err, errForeign) && !errors.Is(err, vhosttest.ErrTimeout):
			return fmt.Errorf("after %d bytes: %w", s.expected.Load(), err)
		}
		select {
		case <-sent:
			if missing := s.sent - s.expected.Load(); missing == 0 || time.Since(last) > patience && looked > looks {
				s.gap(s.expected.Load(), s.sent)
				return nil
			}
		default:
			last, looked = time.Now(), 0
		}
	}
}
