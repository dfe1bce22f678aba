package shm

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
)

func mapped(t *testing.T, fd int, off, size uint64) *Mapping {
	t.Helper()
	m, err := Map(fd, off, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Unmap(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// TestArena: regions of several files, at any offset, are one range with the private memory, and the same memory as before.
func TestArena(t *testing.T) {
	page := uint64(os.Getpagesize())
	one, two := memfd(t, int64(8*page)), memfd(t, int64(8*page))
	regions := []*Mapping{mapped(t, one, 0, 3*page), mapped(t, two, page+100, page), mapped(t, one, 5*page, 3*page)}
	before := mappings(t)
	a, err := NewArena(100, regions[0].Bytes, regions[1].Bytes, regions[2].Bytes)
	if err != nil {
		t.Fatal(err)
	}
	// The second one lies in two pages.
	if got, want := len(a.Bytes()), int((1+3+2+3)*page); got != want || Addr(a.Bytes())%uintptr(page) != 0 {
		t.Errorf("%d bytes at %#x, want %d", got, Addr(a.Bytes()), want)
	}
	if p := a.Private(); len(p) != 100 || cap(p) != 100 || &p[0] != &a.Bytes()[0] || !bytes.Equal(p, make([]byte, 100)) {
		t.Errorf("private memory: %d bytes, % x", len(p), p)
	}
	a.Private()[99] = 1
	for i, m := range regions {
		off, ok := a.Offset(m.Bytes)
		if !ok {
			t.Fatalf("region %d is not in the arena", i)
		}
		again := a.Bytes()[off : off+uint64(len(m.Bytes))]
		m.Bytes[7], again[len(again)-1] = byte(0x50+i), byte(0xa0+i)
		if again[7] != byte(0x50+i) || m.Bytes[len(again)-1] != byte(0xa0+i) {
			t.Errorf("region %d is other memory", i)
		}
		if o, ok := a.Offset(m.Bytes[7:9]); !ok || o != off+7 {
			t.Errorf("region %d from byte 7 on: at %d, %v", i, o, ok)
		}
	}
	checkOutside(t, a, regions[1])
	for range 2 {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	}
	if n := mappings(t); n != before {
		t.Errorf("%d mappings, %d before", n, before)
	}
	regions[0].Bytes[0]++ // still there
}

// checkOutside: what is not wholly in a region has no place in the arena.
func checkOutside(t *testing.T, a *Arena, m *Mapping) {
	t.Helper()
	size := len(m.Bytes)
	longer := m.whole[100 : 100+size+1]
	for name, b := range map[string][]byte{
		"a byte behind": longer, "a byte before": m.whole[99:200], "the heap": make([]byte, 10), "nothing": m.Bytes[:0], "nil": nil, "itself": a.Bytes()[:10],
	} {
		if off, ok := a.Offset(b); ok {
			t.Errorf("%s: at %d", name, off)
		}
	}
}

// TestArenaOutlivesRegions: the arena does not need the mapping that it was made of.
func TestArenaOutlivesRegions(t *testing.T) {
	m, err := Map(memfd(t, 1<<16), 0, 1<<16)
	if err != nil {
		t.Fatal(err)
	}
	a, err := NewArena(0, m.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	m.Bytes[1234] = 77
	if err := m.Unmap(); err != nil {
		t.Error(err)
	}
	if len(a.Private()) != 0 || a.Bytes()[1234] != 77 {
		t.Error("the memory went with its first mapping")
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
}

func TestArenaRefuses(t *testing.T) {
	m := mapped(t, memfd(t, 1<<16), 0, 1<<16)
	before := mappings(t)
	for _, c := range []struct {
		name    string
		regions [][]byte
		want    string
	}{
		{"the heap", [][]byte{m.Bytes, Heap(1 << 16).Bytes}, "mapping region 1 of 2 a second time, 0x10000 bytes: invalid argument (is it shared memory?)"},
		{"an empty region", [][]byte{{}, m.Bytes}, "region 0 of 2 is empty"},
		{"nothing", nil, "no bytes"},
	} {
		_, err := NewArena(0, c.regions...)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		if c.name == "the heap" && !errors.Is(err, unix.EINVAL) {
			t.Errorf("%v is not EINVAL", err)
		}
	}
	if after := mappings(t); after != before {
		t.Errorf("%d mappings of the file, %d before", after, before)
	}
}

// TestArenaHugePages: pages of any size keep their alignment, and need no more of them than there were.
func TestArenaHugePages(t *testing.T) {
	const huge = 2 << 20
	reserveHuge(t, 4)
	fd, err := unix.MemfdCreate("shm-huge", unix.MFD_CLOEXEC|unix.MFD_HUGETLB|unix.MFD_HUGE_2MB)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(fd, 4*huge); err != nil {
		t.Fatal(err)
	}
	m := mapped(t, fd, huge+4096, 2*huge-4096)
	small := mapped(t, memfd(t, 1<<16), 0, 1<<16)
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	fds := descriptors(t)
	a, err := NewArena(5000, m.Bytes[10:], small.Bytes, m.Bytes[:100])
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
		if n := descriptors(t); n != fds {
			t.Errorf("%d descriptors, %d before", n, fds)
		}
	}()
	for i, b := range [][]byte{m.Bytes[10:], small.Bytes} {
		off, ok := a.Offset(b)
		if !ok {
			t.Fatalf("region %d is not in the arena", i)
		}
		b[0] = byte(3 + i)
		if a.Bytes()[off] != byte(3+i) {
			t.Errorf("region %d is other memory", i)
		}
		if i == 0 && (off != 8192+4096+10 || (Addr(a.Bytes())+8192)%huge != 0) {
			t.Errorf("the huge pages begin at %d of %#x", off-4096-10, Addr(a.Bytes()))
		}
	}
	gap := a.Bytes()[8192+2*huge+1<<16:][:huge-1<<16]
	for i := 0; i < len(gap); i += 4096 {
		if gap[i] != 0 {
			t.Fatalf("byte %d of the gap is %d", i, gap[i])
		}
	}
	if off, ok := a.Offset(m.Bytes[1:2]); !ok || a.Bytes()[off+9] != 3 {
		t.Error("the last region is other memory")
	}
}

const hugePages = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"

// reserveHuge has the host set n huge pages aside until the test ends.
func reserveHuge(t *testing.T, n int) {
	t.Helper()
	old, err := os.ReadFile(hugePages)
	if err != nil {
		require.Skip(t, "hugepages", "%v", err)
	}
	if err := os.WriteFile(hugePages, []byte{byte('0' + n)}, 0); err != nil {
		require.Skip(t, "hugepages", "setting huge pages aside: %v", err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(hugePages, bytes.TrimSpace(old), 0); err != nil {
			t.Error(err)
		}
	})
	if got, err := os.ReadFile(hugePages); err != nil || string(bytes.TrimSpace(got)) < string('0'+byte(n)) {
		require.Skip(t, "hugepages", "the host has set %q of %d huge pages aside", got, n)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}
