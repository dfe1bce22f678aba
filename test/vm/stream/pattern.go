// Package stream is the traffic that the tests send: bytes that both ends can compute, so that every one of them is
// checked where it arrives.
//
// A stream is cut into blocks of 4096 bytes. A block is the same pseudo-random table for every block of a seed, with
// its own number written over the first eight bytes. So a flipped, lost, repeated or exchanged byte, and a block that
// arrives twice or in the wrong place, all differ from what is expected at that offset. Comparing costs one pass of
// memcmp, which an emulated CPU does at hundreds of MiB/s; a CRC-32C of the whole stream is kept beside it, so that
// the two ends can also be held against each other.
//
//	offset 0        8                              4096      4104
//	       | block 0 | pseudo-random bytes of seed | block 1 | the same bytes ...
package stream

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
)

// BlockSize is the length of a block in bytes.
const BlockSize = 4096

// Pattern yields the bytes of a stream at any offset. It is read-only once made and may be shared.
type Pattern struct {
	table [BlockSize]byte
}

// NewPattern returns the pattern of a seed.
func NewPattern(seed uint64) *Pattern {
	p := &Pattern{}
	r := rand.New(rand.NewPCG(seed, 0x7668_6f73_7464))
	for i := 0; i < BlockSize; i += 8 {
		binary.LittleEndian.PutUint64(p.table[i:], r.Uint64())
	}
	return p
}

// Fill writes the bytes of the stream at offset off into b.
func (p *Pattern) Fill(b []byte, off uint64) {
	for len(b) > 0 {
		n := p.fillBlock(b, off)
		b, off = b[n:], off+uint64(n)
	}
}

// fillBlock fills up to the end of the block that holds off, and returns how many bytes that were.
func (p *Pattern) fillBlock(b []byte, off uint64) int {
	in := int(off % BlockSize)
	n := copy(b, p.table[in:])
	if in < 8 {
		var number [8]byte
		binary.LittleEndian.PutUint64(number[:], off/BlockSize)
		copy(b[:n], number[in:])
	}
	return n
}

// Check compares b with the stream at offset off. It returns the offset of the first byte that differs and false, or
// true. Scratch must be at least as long as b.
func (p *Pattern) Check(b []byte, off uint64, scratch []byte) (uint64, bool) {
	want := scratch[:len(b)]
	p.Fill(want, off)
	if bytes.Equal(b, want) {
		return 0, true
	}
	for i := range b {
		if b[i] != want[i] {
			return off + uint64(i), false
		}
	}
	panic("bug: bytes.Equal and the loop disagree")
}
