package udp

import (
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/internal/sys/uring"
)

// TestCut: guest memory of any shape is cut into chunks that hold all of it, in order, and that can be registered, at borders of huge pages.
func TestCut(t *testing.T) {
	const size = 9 << 30
	space, err := unix.Mmap(-1, 0, size, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(space)
	private := (1 + maxSlotPages) * 4096
	rapid.Check(t, func(t *rapid.T) {
		var regions [][]byte
		rest := space
		for range rapid.IntRange(1, 8).Draw(t, "regions") {
			skip := rapid.SampledFrom([]int{0, 1, 4096, 1 << 20, hugePage}).Draw(t, "hole")
			n := rapid.SampledFrom([]int{1, 4096, 640 << 10, 1 << 29, 1<<30 - hugePage, 1 << 30, 3<<30 - 4096}).Draw(t, "size")
			if skip+n > len(rest) {
				break
			}
			regions, rest = append(regions, rest[skip:skip+n]), rest[skip+n:]
		}
		i, done := 0, 0 // in regions, and in regions[i]
		for _, pieces := range cut(regions) {
			used := private
			for _, p := range pieces {
				if &p[0] != &regions[i][done] {
					t.Fatalf("a piece of region %d begins at %#x, not %#x", i, shm.Addr(p), shm.Addr(regions[i][done:]))
				}
				if done > 0 && shm.Addr(p)%hugePage != 0 {
					t.Fatalf("region %d is cut at %#x", i, shm.Addr(p))
				}
				// As an arena lays it out, of huge pages.
				used = (used + hugePage - 1) / hugePage * hugePage
				used += (int(shm.Addr(p)%hugePage) + len(p) + hugePage - 1) / hugePage * hugePage
				if done += len(p); done == len(regions[i]) {
					i, done = i+1, 0
				}
			}
			if used > uring.MaxBuffer {
				t.Fatalf("a chunk of %#x bytes in %d pieces", used, len(pieces))
			}
		}
		if i != len(regions) {
			t.Fatalf("%d of %d regions are in chunks", i, len(regions))
		}
	})
}
