//go:build linux

package daemon

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestResourcesLeak: files and memory of guests that are held on to are seen and named.
func TestResourcesLeak(t *testing.T) {
	before, err := ResourcesOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.MemfdCreate("leak", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, 4096); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(mem) }()
	now, err := ResourcesOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	leak := now.Leak(before)
	if !strings.Contains(leak, "memfd:leak") || !strings.Contains(leak, "guest memory mappings: 1, was 0") {
		t.Errorf("Leak = %q, want the memfd and its mapping", leak)
	}
	if leak := before.Leak(now); leak != "" {
		t.Errorf("less than before is called a leak: %q", leak)
	}
}
