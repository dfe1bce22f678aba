package guestmem

import (
	"errors"
	"math"
	"os"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// heap is a region of size bytes at a, in heap memory; user addresses are the guest's and a constant.
func heap(t testing.TB, a GPA, size int) *Region {
	t.Helper()
	r, err := NewHeapRegion(a, UVA(a)+0x7000_0000_0000, size)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func table(t testing.TB, regions ...*Region) *Table {
	t.Helper()
	tab, err := NewTable(regions...)
	if err != nil {
		t.Fatal(err)
	}
	return tab
}

// at says where in r the bytes of b lie, or -1.
func at(r *Region, b []byte) int {
	for i := range r.Bytes() {
		if len(b) > 0 && &r.Bytes()[i] == &b[0] {
			return i
		}
	}
	return -1
}

func TestTableSlice(t *testing.T) {
	a, b, c := heap(t, 0x1000, 0x1000), heap(t, 0x2000, 0x800), heap(t, 0x9000, 0x1000)
	tab := table(t, c, a, b)
	defer tab.Unpin()
	if got := tab.Regions(); len(got) != 3 || got[0] != a || got[1] != b || got[2] != c {
		t.Errorf("regions are not in order: %v", got)
	}
	for _, x := range []struct {
		addr GPA
		n    uint64
		in   *Region // nil: not mapped
		off  int
	}{
		{0x1000, 1, a, 0}, {0x1000, 0x1000, a, 0}, {0x1fff, 1, a, 0xfff}, {0x2000, 0x800, b, 0}, {0x9abc, 4, c, 0xabc},
		{0xfff, 1, nil, 0}, {0xfff, 2, nil, 0}, {0, 1, nil, 0}, {0x1000, 0x1001, nil, 0}, {0x1fff, 2, nil, 0}, {0x2800, 1, nil, 0},
		{0x27ff, 2, nil, 0}, {0x8fff, 2, nil, 0}, {0xa000, 1, nil, 0}, {math.MaxUint64, 1, nil, 0}, {math.MaxUint64, 2, nil, 0},
		{0x1001, math.MaxUint64, nil, 0}, {0x9001, math.MaxUint64 - 0x9000, nil, 0},
	} {
		for name, got := range map[string][]byte{"Slice": tab.Slice(x.addr, x.n), "UserSlice": tab.UserSlice(UVA(x.addr)+0x7000_0000_0000, x.n)} {
			switch {
			case x.in == nil && got != nil:
				t.Errorf("%s(%#x, %#x) is %d bytes, want nil", name, x.addr, x.n, len(got))
			case x.in != nil && (uint64(len(got)) != x.n || cap(got) != len(got) || at(x.in, got) != x.off):
				t.Errorf("%s(%#x, %#x): %d bytes, room for %d, at %d of the region", name, x.addr, x.n, len(got), cap(got), at(x.in, got))
			}
		}
	}
	if got := table(t).Slice(0, 1); got != nil {
		t.Error("an empty table has memory")
	}
}

// TestTableRefuses: field cases of hostile memory tables.
func TestTableRefuses(t *testing.T) {
	user := func(g GPA, u UVA, size int) *Region {
		r, err := NewHeapRegion(g, u, size)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	one := heap(t, 0x1000, 0x1000)
	for name, regions := range map[string][]*Region{
		"guest addresses overlap by a byte":  {heap(t, 0x1000, 0x1000), user(0x1fff, 0, 0x1000)},
		"guest addresses, one in the other":  {heap(t, 0x1000, 0x1000), user(0x1100, 0, 1)},
		"user addresses overlap by a byte":   {user(0x1000, 0x10_0000, 0x1000), user(0x9000, 0x10_0fff, 0x1000)},
		"user addresses, guest's in reverse": {user(0x9000, 0x10_0000, 0x1000), user(0x1000, 0x10_0800, 0x1000)},
		"the same region twice":              {one, one},
	} {
		if _, err := NewTable(regions...); !errors.Is(err, ErrOverlap) {
			t.Errorf("%s: %v", name, err)
		}
		for _, r := range regions {
			if r.tables.Load() != 0 {
				t.Errorf("%s: a table that was refused holds a region", name)
			}
		}
	}
	var many []*Region
	for i := range MaxRegions + 1 {
		many = append(many, heap(t, GPA(i)*0x1000, 0x1000))
	}
	if _, err := NewTable(many...); err == nil || !strings.Contains(err.Error(), "510 memory regions, at most 509") {
		t.Errorf("510 regions: %v", err)
	}
	table(t, many[1:]...).Unpin()
}

func TestRegionRefuses(t *testing.T) {
	fd := memfd(t, 0x4000)
	for _, x := range []struct {
		guest     GPA
		user      UVA
		size, off uint64
		want      string
	}{
		{0x1000, 0, 0, 0, "size 0"},
		{math.MaxUint64 - 0xfff, 0, 0x2000, 0, "guest address 0xfffffffffffff000, size 0x2000 wraps"},
		{math.MaxUint64 - 0xfff, 0, 0x1000, 0, "wraps"}, // its end would be address 0
		{0, math.MaxUint64 - 0xfff, 0x2000, 0, "user address"},
		{0, 0, 1 << 63, 0, "size 0x8000000000000000"},
		{0, 0, 0x4001, 0, "outside a memory file of 0x4000 bytes"},
		{0, 0, 0x1000, 0x3001, "outside a memory file"},
		{0, 0, 0x1000, math.MaxUint64 - 0xfff, "outside a memory file"},
	} {
		if _, err := NewRegion(fd, x.off, x.guest, x.user, x.size); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("region %+v: %v, want %q", x, err, x.want)
		}
	}
	if _, err := NewHeapRegion(0, 0, 0); err == nil {
		t.Error("a heap region of size 0: no error")
	}
	if n := mappings(t); n != 0 {
		t.Errorf("%d mappings left", n)
	}
}

func memfd(t *testing.T, size int64) int {
	t.Helper()
	fd, err := unix.MemfdCreate("guestmem", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	return fd
}

// mappings is how many mappings of the memory file this process has. Those of one file that touch may count as one.
func mappings(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), "/memfd:guestmem")
}

// TestPinsKeepMemoryMapped: a region lives until the last pin of the last table that holds it, and not for longer.
func TestPinsKeepMemoryMapped(t *testing.T) {
	fd := memfd(t, 0x4000)
	region := func(i uint64) *Region {
		r, err := NewRegion(fd, i*0x2000, GPA(i*0x2000), UVA(i*0x2000), 0x1000)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	want := func(n int, when string) {
		t.Helper()
		if got := mappings(t); got != n {
			t.Errorf("%d mappings %s, want %d", got, when, n)
		}
	}
	kept, gone := region(0), region(1)
	old := table(t, kept, gone)
	old.Pin() // a frame in flight
	inFlight := old.Slice(0x2000, 8)
	current := table(t, kept)
	old.Unpin() // the owner has the new table
	want(2, "with a frame in flight")
	copy(inFlight, "alive") // faults if it is not
	if old.Pins() != 1 {
		t.Errorf("%d pins, want 1", old.Pins())
	}
	old.Unpin()
	want(1, "after the last frame")
	if gone.Bytes() != nil {
		t.Error("a region that was unmapped still has bytes")
	}
	copy(current.Slice(0, 8), "alive")
	current.Unpin()
	want(0, "at the end")

	region(0).Discard()
	want(0, "after Discard")
	for name, f := range map[string]func(){
		"Unpin of a released table":     current.Unpin,
		"Pin of a released table":       old.Pin,
		"a table of an unmapped region": func() { _, _ = NewTable(gone) },
		"Discard of a region in use":    func() { r := heap(t, 0, 1); table(t, r); r.Discard() },
	} {
		mustPanic(t, name, f)
	}
}

func mustPanic(t *testing.T, name string, f func()) {
	t.Helper()
	defer func() {
		if s, _ := recover().(string); !strings.HasPrefix(s, "bug: ") {
			t.Errorf("%s: panics with %q, want \"bug: ...\"", name, s)
		}
	}()
	f()
}

// TestPinsConcurrently: whoever lets go last, memory is unmapped once.
func TestPinsConcurrently(t *testing.T) {
	fd := memfd(t, 0x1000)
	for range 50 {
		r, err := NewRegion(fd, 0, 0, 0, 0x1000)
		if err != nil {
			t.Fatal(err)
		}
		a, b := table(t, r), table(t, r)
		var wg sync.WaitGroup
		for _, tab := range []*Table{a, b} {
			for range 4 {
				tab.Pin()
				wg.Go(func() {
					if len(tab.Slice(0, 1)) != 1 {
						t.Error("pinned memory is gone")
					}
					tab.Unpin()
				})
			}
			wg.Go(tab.Unpin)
		}
		wg.Wait()
		if r.Bytes() != nil {
			t.Fatal("nobody unmapped the region")
		}
	}
	if n := mappings(t); n != 0 {
		t.Errorf("%d mappings left", n)
	}
}

func TestViewHit(t *testing.T) {
	a, b := heap(t, 0x1000, 0x1000), heap(t, 0x2000, 0x1000)
	tab := table(t, a, b)
	defer tab.Unpin()
	v := NewView(tab, nil)
	if v.Table() != tab {
		t.Error("Table is another one")
	}
	if v.Hit(0x1000, 1) != nil || v.Hit(0, 1) != nil {
		t.Error("Hit before any Slice")
	}
	if v.Slice(0x1800, 0) != nil || v.Slice(0x1800, 8) == nil || at(a, v.Hit(0x1ff0, 16)) != 0xff0 {
		t.Error("Slice does not make its region hit")
	}
	for _, x := range []struct {
		a GPA
		n uint32
	}{{0x1ff0, 17}, {0xfff, 1}, {0xfff, 2}, {0x2000, 1}, {0x1001, math.MaxUint32}, {math.MaxUint64, 1}, {math.MaxUint64, math.MaxUint32}, {0, 0x1001}} {
		if got := v.Hit(x.a, x.n); got != nil {
			t.Errorf("Hit(%#x, %#x) is %d bytes", x.a, x.n, len(got))
		}
	}
	if v.Slice(0x5000, 1) != nil || v.Hit(0x1000, 1) == nil {
		t.Error("an address that is not mapped makes the View forget its region")
	}
	if n := testing.AllocsPerRun(100, func() { v.Slice(0x1000, 8); v.Slice(0x2000, 8) }); n != 0 {
		t.Errorf("Slice allocates %v times", n)
	}
}

func TestViewPrefix(t *testing.T) {
	a, b := heap(t, 0x1000, 0x1000), heap(t, 0x2000, 0x1000)
	tab := table(t, a, b)
	defer tab.Unpin()
	v := NewView(tab, nil)
	for _, x := range []struct {
		a    GPA
		n    uint32
		in   *Region
		want int
	}{
		{0x1000, 0x800, a, 0x800}, {0x1f00, 0x200, a, 0x100}, {0x2000, 0x100, b, 0x100}, {0x2f00, 0x101, b, 0x100},
		{0x1fff, math.MaxUint32, a, 1}, {0x3000, 1, nil, 0}, {0xfff, 2, nil, 0}, {math.MaxUint64, 2, nil, 0}, {0x1000, 0, nil, 0},
	} {
		got := v.Prefix(x.a, x.n)
		if len(got) != x.want || cap(got) != len(got) || x.in != nil && at(x.in, got) != int(x.a-x.in.Guest) {
			t.Errorf("Prefix(%#x, %#x): %d bytes, room for %d, want %d", x.a, x.n, len(got), cap(got), x.want)
		}
	}
}

// TestViewAgainstBytes: whatever is asked, a View finds what a look at every region would.
func TestViewAgainstBytes(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		var regions []*Region
		next := GPA(rapid.Uint64Range(0, 64).Draw(rt, "first"))
		for range rapid.IntRange(1, 6).Draw(rt, "regions") {
			size := rapid.IntRange(1, 64).Draw(rt, "size")
			regions = append(regions, heap(t, next, size))
			next += GPA(size + rapid.SampledFrom([]int{0, 0, 1, 40}).Draw(rt, "gap"))
		}
		tab := table(t, regions...)
		v := NewView(tab, nil)
		for range 50 {
			a := GPA(rapid.Uint64Range(0, uint64(next)+10).Draw(rt, "address"))
			n := rapid.Uint32Range(1, 80).Draw(rt, "bytes")
			var in *Region
			for _, r := range regions {
				if a >= r.Guest && uint64(a) < uint64(r.Guest)+r.Size {
					in = r
				}
			}
			whole, part := v.Slice(a, n), v.Prefix(a, n)
			switch {
			case in == nil:
				if whole != nil || part != nil {
					rt.Fatalf("%#x is not mapped", a)
				}
			case at(in, part) != int(a-in.Guest) || len(part) != min(int(n), int(in.Size)-int(a-in.Guest)):
				rt.Fatalf("Prefix(%#x, %d) is %d bytes at %d", a, n, len(part), at(in, part))
			case (len(part) == int(n)) != (whole != nil) || whole != nil && at(in, whole) != at(in, part):
				rt.Fatalf("Slice(%#x, %d) is %d bytes", a, n, len(whole))
			}
		}
	})
}

type recorder []uint64

func (r *recorder) Dirty(a GPA, n uint64) { *r = append(*r, uint64(a), n) }

func TestViewDirty(t *testing.T) {
	tab := table(t, heap(t, 0, 0x1000))
	defer tab.Unpin()
	v := NewView(tab, nil)
	v.Dirty(0, 1) // nobody to tell
	if v.Logging() {
		t.Error("logging without a log")
	}
	var log recorder
	v = NewView(tab, &log)
	v.Dirty(0x123, 45)
	if !v.Logging() || len(log) != 2 || log[0] != 0x123 || log[1] != 45 {
		t.Errorf("the log was told %v", log)
	}
}
