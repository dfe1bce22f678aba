package offload

import (
	"encoding/binary"
	"math/bits"
)

// Sum is a running ones' complement sum of 16-bit big-endian words (RFC 1071), fed with fragments of any length: one of odd length leaves
// the next to begin in the middle of a word. The zero Sum is empty.
//
// The sum is kept in little-endian words, which is how they are loaded fastest: swapping the bytes of the sum is the same as
// swapping them in every word.
type Sum struct {
	acc uint64 // little-endian, not folded
	odd bool   // an odd number of bytes so far
}

// Add adds the bytes of b.
func (s *Sum) Add(b []byte) {
	n := sumLE(b)
	if s.odd {
		n = uint64(bits.ReverseBytes16(fold(n)))
	}
	var carry uint64
	s.acc, carry = bits.Add64(s.acc, n, 0)
	s.acc += carry
	s.odd = s.odd != (len(b)&1 != 0)
}

// AddWord adds one 16-bit word, at an even offset.
func (s *Sum) AddWord(w uint16) {
	var carry uint64
	s.acc, carry = bits.Add64(s.acc, uint64(bits.ReverseBytes16(w)), 0)
	s.acc += carry
}

// Fold is the sum so far as a 16-bit word, not complemented: what a checksum field holds for a partial checksum.
func (s Sum) Fold() uint16 { return bits.ReverseBytes16(fold(s.acc)) }

// Checksum is the Internet checksum (RFC 1071) over the fragments as if they were one, beginning with the sum initial, which need not
// be folded. Its value goes into the packet big-endian. UDP has no checksum of 0: it is sent as 0xffff, the same number.
func Checksum(initial uint32, frags ...[]byte) uint16 {
	var s Sum
	s.AddWord(uint16(initial))
	s.AddWord(uint16(initial >> 16))
	for _, f := range frags {
		s.Add(f)
	}
	return ^s.Fold()
}

// fold adds the four 16-bit words of a sum, carries included.
func fold(n uint64) uint16 {
	n = n>>32 + n&0xffffffff
	n = n>>32 + n&0xffffffff
	n = n>>16 + n&0xffff
	n = n>>16 + n&0xffff
	n = n>>16 + n&0xffff
	return uint16(n)
}

// sumLE sums b as little-endian words, with the carry that leaves bit 63 added at bit 0: 2^64 and 1 are the same number modulo
// 0xffff. A last odd byte counts as a word with its high byte 0.
func sumLE(b []byte) uint64 {
	var sum, c uint64
	le := binary.LittleEndian
	for len(b) >= 64 {
		w := b[:64:64]
		sum, c = bits.Add64(sum, le.Uint64(w[0:]), 0)
		sum, c = bits.Add64(sum, le.Uint64(w[8:]), c)
		sum, c = bits.Add64(sum, le.Uint64(w[16:]), c)
		sum, c = bits.Add64(sum, le.Uint64(w[24:]), c)
		sum, c = bits.Add64(sum, le.Uint64(w[32:]), c)
		sum, c = bits.Add64(sum, le.Uint64(w[40:]), c)
		sum, c = bits.Add64(sum, le.Uint64(w[48:]), c)
		sum, c = bits.Add64(sum, le.Uint64(w[56:]), c)
		sum += c
		b = b[64:]
	}
	for len(b) >= 8 {
		sum, c = bits.Add64(sum, le.Uint64(b), 0)
		sum += c
		b = b[8:]
	}
	var tail uint64
	if len(b) >= 4 {
		tail = uint64(le.Uint32(b))
		b = b[4:]
	}
	if len(b) >= 2 {
		tail += uint64(le.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		tail += uint64(b[0])
	}
	sum, c = bits.Add64(sum, tail, 0)
	return sum + c
}
