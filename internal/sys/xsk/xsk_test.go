package xsk

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/shm"
)

// TestRings: both kinds over plain memory, with indices that wrap.
func TestRings(t *testing.T) {
	const n, start = 8, 0xffff_fffa
	words := []uint32{start, start, 0}
	end := words[0]
	end += n
	entries := make([]uint64, n)
	common := ring[uint64]{producer: &words[0], consumer: &words[1], flags: &words[2], entries: entries, mask: n - 1}
	p := Producer[uint64]{ring: common, next: start, limit: end}
	c := Consumer[uint64]{ring: common, next: start, end: start}
	next, want := uint64(0), uint64(0)
	for round := range 50 {
		for i := round%n + 1; i > 0 && p.Free(1) > 0; i-- {
			p.Add(next)
			next++
		}
		if c.Len() > int(next-want) {
			t.Fatalf("%d entries, %d were published at most", c.Len(), next-want)
		}
		p.Publish()
		have := c.More()
		if have != int(next-want) || p.Waiting() != have || p.Free(n) != n-have {
			t.Fatalf("round %d: %d there, %d waiting, %d free; want %d", round, have, p.Waiting(), p.Free(n), next-want)
		}
		for i := range have {
			if got := c.At(i); got != want {
				t.Fatalf("entry %d, want %d", got, want)
			}
			want++
		}
		c.Release(have)
	}
	if p.Taken() != words[1] || p.NeedsWakeup() {
		t.Error("words are mixed up")
	}
	if words[2] = unix.XDP_RING_NEED_WAKEUP; !p.NeedsWakeup() {
		t.Error("the flag is not seen")
	}
}

// TestSocket: the kernel takes the memory and makes the rings; Close leaves nothing, twice.
func TestSocket(t *testing.T) {
	require.Root(t, "xdp")
	arena, err := shm.NewArena(64 * MaxChunk)
	if err != nil {
		t.Fatal(err)
	}
	defer arena.Close()
	good := Config{Memory: arena.Bytes(), Chunk: MaxChunk, Fill: 32, Rx: 64, Tx: 16, Done: 128}
	s, err := New(good)
	if err != nil {
		require.Skip(t, "xdp", "%v", err)
	}
	if f, x := s.Fill.Free(32), s.Tx.Free(16); f != 32 || x != 16 || s.Rx.Len() != 0 || s.Done.Len() != 0 {
		t.Errorf("fresh rings: %d and %d free", f, x)
	}
	if st, err := s.Statistics(); err != nil || st.Rx_dropped != 0 || s.Err() != nil || s.ZeroCopy() {
		t.Errorf("%+v, %v", st, err)
	}
	if err := s.Bind(1<<30, 0, unix.XDP_COPY); err == nil {
		t.Error("bound to no interface")
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	for name, change := range map[string]func(c *Config){
		"chunk":     func(c *Config) { c.Chunk = MinChunk - 1 },
		"ring":      func(c *Config) { c.Tx = 17 },
		"unaligned": func(c *Config) { c.Chunk = 3000 },
		"metadata":  func(c *Config) { c.Metadata = 7 },
		"memory":    func(c *Config) { c.Memory = c.Memory[1:] },
	} {
		c := good
		change(&c)
		if s, err := New(c); err == nil {
			s.Close()
			t.Errorf("%s: taken", name)
		}
	}
}
