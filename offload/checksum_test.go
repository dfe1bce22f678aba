package offload

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

// naiveSum is the ones' complement sum of RFC 1071, a word at a time.
func naiveSum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i++ {
		w := uint32(b[i])
		if i%2 == 0 {
			w <<= 8
		}
		sum += w
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// sameSum compares ones' complement numbers, which have two zeros.
func sameSum(a, b uint16) bool { return a%0xffff == b%0xffff }

func randomBytes(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func TestChecksumOfRFC1071Example(t *testing.T) {
	b := []byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}
	if got := Checksum(0, b); got != ^uint16(0xddf2) {
		t.Fatalf("Checksum = %#x, RFC 1071 §3 says %#x", got, ^uint16(0xddf2))
	}
}

func TestChecksumAllLengthsAndBoundaries(t *testing.T) {
	b := randomBytes(300, 7)
	for n := range b {
		for _, at := range []int{0, 1, n / 3, n - 1} {
			if at < 0 || at > n {
				continue
			}
			if got, want := ^Checksum(0, b[:at], b[at:n]), naiveSum(b[:n]); !sameSum(got, want) {
				t.Fatalf("%d bytes cut at %d: sum %#x, want %#x", n, at, got, want)
			}
		}
	}
}

func TestChecksumCarries(t *testing.T) {
	ones := make([]byte, 70001)
	for i := range ones {
		ones[i] = 0xff
	}
	for _, n := range []int{1, 2, 7, 8, 63, 64, 65, 1500, 70001} {
		if got, want := ^Checksum(0xffffffff, ones[:n]), naiveSum(ones[:n]); !sameSum(got, want) {
			t.Errorf("%d bytes of 0xff: sum %#x, want %#x", n, got, want)
		}
	}
}

func TestChecksumFragmentsProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := rapid.SliceOfN(rapid.Byte(), 0, 600).Draw(t, "bytes")
		initial := rapid.Uint32().Draw(t, "initial")
		var frags [][]byte
		for rest := b; len(rest) > 0; {
			n := rapid.IntRange(0, len(rest)).Draw(t, "fragment")
			frags = append(frags, rest[:n])
			rest = rest[n:]
			if n == 0 && len(frags) > 50 {
				frags = append(frags, rest)
				break
			}
		}
		head := []byte{byte(initial >> 24), byte(initial >> 16), byte(initial >> 8), byte(initial)}
		want := naiveSum(append(head, b...))
		if got := ^Checksum(initial, frags...); !sameSum(got, want) {
			t.Fatalf("sum %#x over %d fragments, want %#x", got, len(frags), want)
		}
	})
}

func BenchmarkChecksum(b *testing.B) {
	for _, n := range []int{20, 64, 1460, 65536} {
		data := randomBytes(n, 3)
		b.Run(fmt.Sprintf("bytes=%d", n), func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				Checksum(0, data)
			}
		})
	}
}
