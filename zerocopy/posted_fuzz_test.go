package zerocopy

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// FuzzPosted has a device hand over frames, whole ones and such that have to be cut, to a guest that posts buffers of all shapes, too few of them, and bad
// ones, while memory changes and the queue stops and starts. Whatever way a frame takes into the buffers: the guest gets each that was taken, once, in
// order and unchanged; of one that was cut, segments are missing that count as too big and no others; and not a byte is written beyond what the used
// element says.
func FuzzPosted(f *testing.F) {
	f.Add([]byte{0, 0, 9, 9, 9, 1, 40, 1, 200, 6})
	f.Add([]byte{1, 0, 255, 0, 255, 2, 255, 0, 255, 3, 4, 6, 5, 6})
	f.Add([]byte{7, 0, 3, 1, 200, 0, 80, 7, 7, 3, 100, 6, 0, 255, 6, 6})
	f.Fuzz(func(t *testing.T, program []byte) {
		if len(program) < 2 {
			return
		}
		p := newPostedProgram(t, program[0], program[1:])
		for len(p.left) > 0 {
			p.step()
		}
		p.drain()
	})
}

const (
	slotLen   = 4096
	untouched = 0xee
)

// postedProgram is a guest and a device that do what the fuzzer says.
type postedProgram struct {
	*guest
	left   []byte // of the program
	f      virtio.Features
	p      *Posted
	slots  [][2]guestmem.GPA // free ones: from, to
	out    map[uint16]chainOf
	tooBig uint64 // of Posteds before this one
	number uint32
	taken  []takenFrame
	missed uint64 // segments
}

// chainOf is a chain that the device has.
type chainOf struct {
	slot  [2]guestmem.GPA
	parts []vring.Buf
	bad   bool
}

// takenFrame is one that the guest has to get.
type takenFrame struct {
	number uint32
	data   []byte
	gso    int // bytes of payload in a segment, 0: it is not to be cut
	off    int // bytes of payload that have arrived, or are missed
}

func newPostedProgram(t *testing.T, how byte, program []byte) *postedProgram {
	f := virtio.FVersion1
	for bit, feature := range []virtio.Features{virtio.FNetMrgRxbuf, virtio.FInOrder, virtio.FRingPacked, virtio.FNetGuestCsum, virtio.FNetGuestCsum | virtio.FNetGuestTSO4} {
		if how&(1<<bit) != 0 {
			f |= feature
		}
	}
	size := 4 << (how >> 6)
	p := &postedProgram{guest: newGuest(t, size, f), left: program, f: f, out: map[uint16]chainOf{}}
	for range size {
		a := p.alloc(slotLen)
		p.slots = append(p.slots, [2]guestmem.GPA{a, a + slotLen})
	}
	p.p = NewPosted(p.ring, f)
	return p
}

// next is the next byte of the program, which ends with zeros.
func (p *postedProgram) next() int {
	if len(p.left) == 0 {
		return 0
	}
	b := p.left[0]
	p.left = p.left[1:]
	return int(b)
}

func (p *postedProgram) step() {
	switch p.next() % 8 {
	case 0:
		n := p.next()
		p.add(1+n%3, 1+p.next()*16, n > 250)
	case 1:
		p.whole(14+p.next()*p.next()/16, 1+p.next()%3)
	case 2:
		p.large(1+p.next()*256, 100+p.next()*8)
	case 3:
		p.kernel(p.next() * 16)
	case 4:
		p.p.GiveBack()
	case 5:
		p.restart()
	case 6:
		p.receive()
	case 7:
		p.p.Flush()
	}
}

// add posts a chain of so many parts, n bytes in all, or a bad one.
func (p *postedProgram) add(parts, n int, bad bool) {
	if len(p.slots) == 0 {
		return
	}
	n = min(max(n, parts), slotLen)
	c := chainOf{slot: p.slots[0], bad: bad || n <= virtio.NetHdrSize}
	at := c.slot[0]
	for i := range parts {
		m := n / parts
		if i == parts-1 {
			m = n - m*i
		}
		c.parts = append(c.parts, vring.Buf{GPA: at, Len: uint32(m)})
		at += guestmem.GPA(m)
	}
	mem := p.mem(c.slot[0], slotLen)
	for i := range mem {
		mem[i] = untouched
	}
	var readable []vring.Buf
	writable := c.parts
	if bad {
		readable, writable = c.parts[:1], c.parts[1:]
	}
	id, err := p.driver.Add(readable, writable)
	if err != nil {
		return // no room for so many descriptors
	}
	p.slots = p.slots[1:]
	p.out[id] = c
	p.driver.Publish()
}

// frame makes the next frame, whose number is in its first bytes.
func (p *postedProgram) frame(n int) []byte {
	p.number++
	b := frame(n, byte(p.number))
	binary.BigEndian.PutUint32(b, p.number)
	return b
}

// whole hands over a frame that needs nothing done to it.
func (p *postedProgram) whole(n, frags int) {
	b := p.frame(n)
	if p.p.Write(virtio.NetHdr{}, slices.Collect(slices.Chunk(b, (n+frags-1)/frags))) == Written {
		p.taken = append(p.taken, takenFrame{number: p.number, data: b})
	}
}

// large hands over n bytes of TCP payload, which have to be cut for a guest without TSO4, or one whose buffers are too small.
func (p *postedProgram) large(n, gso int) {
	b := p.frame(54 + n)
	copy(b[12:], tcpFrame(0)[12:])
	binary.BigEndian.PutUint16(b[16:], uint16(40+n))
	binary.BigEndian.PutUint32(b[38:], 0)
	b[46] = 0x50
	hdr := virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, GSOType: virtio.GSOTCPv4, GSOSize: uint16(gso), HdrLen: 54, CsumStart: 34, CsumOffset: 16}
	if p.p.Write(hdr, [][]byte{b}) == Written {
		p.taken = append(p.taken, takenFrame{number: p.number, data: b, gso: gso})
	}
}

// kernel writes a frame as a system call does, into whatever room there is.
func (p *postedProgram) kernel(want int) {
	segs, total := p.p.Space(virtio.NetHdrSize + want)
	n := min(total, virtio.NetHdrSize+want)
	if n < virtio.NetHdrSize+14 {
		return
	}
	b := p.frame(n - virtio.NetHdrSize)
	all := append(make([]byte, virtio.NetHdrSize), b...)
	for _, s := range segs {
		all = all[copy(s, all):]
	}
	if len(all) > 0 {
		p.t.Fatalf("%d bytes of room, which are %d too few", total, len(all))
	}
	p.p.Commit(n)
	p.taken = append(p.taken, takenFrame{number: p.number, data: b})
}

// restart stops the queue and starts it.
func (p *postedProgram) restart() {
	p.p.GiveBack()
	rest := p.p.Close()
	p.tooBig += p.p.Stats.TooBig
	p.p = NewPosted(p.ring, p.f)
	p.p.Inherit(rest)
}

// receive takes all frames that have come.
func (p *postedProgram) receive() {
	p.ring.Publish()
	for {
		hdr, b, ok := p.reapFrame()
		if !ok {
			return
		}
		p.check(hdr, b)
	}
}

// reapFrame takes one frame, in as many buffers as it says.
func (p *postedProgram) reapFrame() (hdr virtio.NetHdr, data []byte, ok bool) {
	for left := 1; left > 0; left-- {
		id, n, got := p.driver.Reap()
		switch {
		case !got && len(data) > 0:
			p.t.Fatal("num_buffers promises more buffers than were used")
		case !got:
			return hdr, nil, false
		}
		c, b := p.take(id, int(n))
		switch {
		case n == 0 && len(data) == 0: // a bad chain, or one that was held when a bad one came
			left++
		case c.bad || n == 0:
			p.t.Fatalf("%d bytes in a bad chain, or none in the middle of a frame", n)
		case len(data) == 0:
			hdr = virtio.DecodeNetHdr(b[:virtio.NetHdrSize])
			left, data = int(hdr.NumBuffers), b
		default:
			data = append(data, b...)
		}
	}
	if merged := p.f.Has(virtio.FNetMrgRxbuf); hdr.NumBuffers == 0 || !merged && hdr.NumBuffers != 1 {
		p.t.Fatalf("num_buffers %d, merging %v", hdr.NumBuffers, merged)
	}
	return hdr, data[virtio.NetHdrSize:], true
}

// take has a chain back, and checks that nothing was written behind its n bytes.
func (p *postedProgram) take(id uint16, n int) (c chainOf, b []byte) {
	c, ok := p.out[id]
	if !ok {
		p.t.Fatalf("chain %d came back, which is not out", id)
	}
	delete(p.out, id)
	p.slots = append(p.slots, c.slot)
	mem := p.mem(c.slot[0], slotLen)
	for i, v := range mem[n:] {
		if v != untouched {
			p.t.Fatalf("byte %d was written, of a chain with %d used", n+i, n)
		}
	}
	return c, bytes.Clone(mem[:n])
}

// check compares a frame with those that were taken.
func (p *postedProgram) check(hdr virtio.NetHdr, b []byte) {
	for {
		if len(p.taken) == 0 {
			p.t.Fatalf("a frame of %d bytes came that nobody sent", len(b))
		}
		e := &p.taken[0]
		if binary.BigEndian.Uint32(b) == e.number {
			break
		}
		p.miss(e, len(e.data)-54)
		p.taken = p.taken[1:]
	}
	e := &p.taken[0]
	if e.gso == 0 || hdr.GSOType != virtio.GSONone {
		if !bytes.Equal(b, e.data) || (e.gso == 0) != (hdr.GSOType == virtio.GSONone) || e.off != 0 {
			p.t.Fatalf("frame %d is not what was sent: %d bytes of %d, header %+v", e.number, len(b), len(e.data), hdr)
		}
		p.taken = p.taken[1:]
		return
	}
	payload := e.data[54:]
	seq := int(binary.BigEndian.Uint32(b[38:]))
	if p.miss(e, seq); seq > len(payload) || len(b)-54 != min(e.gso, len(payload)-seq) || !bytes.Equal(b[54:], payload[seq:][:len(b)-54]) {
		p.t.Fatalf("segment at %d of frame %d is not what was sent: %d bytes", seq, e.number, len(b))
	}
	if e.off = seq + len(b) - 54; e.off == len(payload) {
		p.taken = p.taken[1:]
	}
}

// miss counts the segments of e before seq that have not come.
func (p *postedProgram) miss(e *takenFrame, seq int) {
	if e.gso == 0 || seq < e.off {
		p.t.Fatalf("frame %d is missing, or byte %d of it came behind byte %d", e.number, seq, e.off)
	}
	p.missed += uint64((seq - e.off + e.gso - 1) / e.gso)
}

// drain has the guest post until all has come that was taken, and checks the sums.
func (p *postedProgram) drain() {
	for range 10000 {
		p.receive()
		for len(p.slots) > 0 && p.driver.Free() > 0 {
			p.add(1, slotLen, false)
		}
		if p.p.Flush() {
			break
		}
	}
	p.receive()
	for i := range p.taken {
		p.miss(&p.taken[i], len(p.taken[i].data)-54)
	}
	if got := p.tooBig + p.p.Stats.TooBig; got < p.missed {
		p.t.Fatalf("%d segments are missing, %d count as too big", p.missed, got)
	}
	if p.p.Err() != nil {
		p.t.Fatal(p.p.Err())
	}
}
