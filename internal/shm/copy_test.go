package shm

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCopy: every length around the limits, at every place in a cache line, and not a byte beside.
func TestCopy(t *testing.T) {
	src, dst := make([]byte, 10_000), make([]byte, 10_000)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(src)
	try := func(n, from, to int) {
		for i := range dst {
			dst[i] = 0xee
		}
		Copy(dst[to:], src[from:from+n])
		if !bytes.Equal(dst[to:to+n], src[from:from+n]) {
			t.Fatalf("%d bytes from offset %d to %d are others", n, from, to)
		}
		for i, b := range dst {
			if (i < to || i >= to+n) && b != 0xee {
				t.Fatalf("%d bytes from offset %d to %d: byte %d was written", n, from, to, i)
			}
		}
	}
	for _, n := range []int{0, 1, 63, 64, wideFrom - 1, wideFrom, wideFrom + 1, wideFrom + 63, wideFrom + 64, wideFrom + 65, 1518, 2048, 9000} {
		for at := range 65 {
			try(n, at, 64-at)
			try(n, 7*at, 100+at)
		}
	}
}

// TestCopyFaults: a fault in it is caught as any other.
func TestCopyFaults(t *testing.T) {
	m, fd := shrinking(t)
	var owner blamed
	m.Own(&owner)
	if err := unix.Ftruncate(fd, 4096); err != nil {
		t.Fatal(err)
	}
	private := make([]byte, 8192)
	for _, n := range []int{wideFrom - 1, wideFrom, 4096} {
		if f := Guard(func() { Copy(m.Bytes[4096:], private[:n]) }); f == nil || f.Owner != &owner {
			t.Errorf("%d bytes to memory that is gone: %+v", n, f)
		}
		if f := Guard(func() { Copy(private, m.Bytes[4096:4096+n]) }); f == nil || f.Owner != &owner {
			t.Errorf("%d bytes from memory that is gone: %+v", n, f)
		}
	}
}

func BenchmarkCopy(b *testing.B) {
	for _, n := range []int{256, 512, 1024, 1518, 9000, 65536} {
		for name, f := range map[string]func(dst, src []byte){"copy": func(d, s []byte) { copy(d, s) }, "Copy": Copy} {
			b.Run(fmt.Sprintf("%s/bytes=%d", name, n), func(b *testing.B) {
				dst, src := make([]byte, n+12), make([]byte, n)
				b.SetBytes(int64(n))
				for b.Loop() {
					f(dst[12:], src)
				}
			})
		}
	}
}
