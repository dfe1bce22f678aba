package shm

import (
	"encoding/binary"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

func TestView(t *testing.T) {
	b := Heap(64).Bytes
	v, err := View[uint64](b, 8)
	if err != nil || len(v) != 8 {
		t.Fatalf("%d values, %v", len(v), err)
	}
	v[7] = 0x0102030405060708
	if got := binary.LittleEndian.Uint64(b[56:]); got != v[7] {
		t.Errorf("the view is not of the bytes: %#x", got)
	}
	if got := Bytes(v); len(got) != 64 || &got[0] != &b[0] {
		t.Errorf("Bytes of the view are %d other bytes", len(got))
	}
	for _, c := range []struct {
		b    []byte
		n    int
		want string
	}{
		{b, 9, "9 values of 8 bytes do not fit in 64 bytes"},
		{b[:63], 8, "do not fit"},
		{b, 0, "do not fit"},
		{b, -1, "do not fit"},
		{b, 1 << 61, "do not fit"}, // times 8 is 0
		{nil, 1, "do not fit"},
		{b[4:], 1, "not aligned to 8 bytes"},
	} {
		if _, err := View[uint64](c.b, c.n); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%d values in %d bytes: %v, want %q", c.n, len(c.b), err, c.want)
		}
	}
}

func TestWord(t *testing.T) {
	b := Heap(16).Bytes
	binary.LittleEndian.PutUint32(b[12:], 0xdeadbeef)
	if w, err := Word(b, 12); err != nil || *w != 0xdeadbeef {
		t.Errorf("word at 12: %v, %v", w, err)
	}
	for _, off := range []int{-4, 2, 13, 14, 16, 1 << 40} {
		if _, err := Word(b, off); err == nil {
			t.Errorf("word at %d of 16 bytes: no error", off)
		}
	}
}

// TestIndex: an index is found wherever it lies in its 32-bit word, and its neighbour is not.
func TestIndex(t *testing.T) {
	b := Heap(16).Bytes
	for i := range b {
		b[i] = 0xee
	}
	for off := -1; off <= 16; off++ {
		w, err := Index(b, off)
		if legal := off >= 0 && off <= 14 && off%2 == 0; legal != (err == nil) {
			t.Errorf("index at %d: %v", off, err)
		}
		if err != nil {
			continue
		}
		binary.LittleEndian.PutUint16(b[off:], 0x1234)
		if got := w.Load(); got != 0x1234 {
			t.Errorf("index at %d is %#x", off, got)
		}
		binary.LittleEndian.PutUint16(b[off:], 0xeeee)
	}
	if _, err := Index(b[:1], 0); err == nil {
		t.Error("an index in 1 byte: no error")
	}
	if _, err := Index(b[4:6], 0); err != nil { // the word around it is the memory's, if not the slice's
		t.Error(err)
	}
}

// TestStoreFence16Alone: the neighbour of the 16 bits is not written.
func TestStoreFence16Alone(t *testing.T) {
	for _, off := range []int{0, 2} {
		b := Heap(8).Bytes
		binary.LittleEndian.PutUint64(b, 0xa1a2a3a4a5a6a7a8)
		p, err := View[uint16](b[off:], 1)
		if err != nil {
			t.Fatal(err)
		}
		StoreFence16(&p[0], 0x1234)
		want := Heap(8).Bytes
		binary.LittleEndian.PutUint64(want, 0xa1a2a3a4a5a6a7a8)
		binary.LittleEndian.PutUint16(want[off:], 0x1234)
		if string(b) != string(want) {
			t.Errorf("at %d: % x, want % x", off, b, want)
		}
	}
}

// TestFenceOrdersStoreBeforeLoad: two goroutines store, fence and load what the other one stores. Without the fence both may load the
// old value; with it, never. Memory that Go did not allocate is another matter for the race detector.
func TestFenceOrdersStoreBeforeLoad(t *testing.T) {
	const cells, line = 20_000, 64
	shared := mapped(t, memfd(t, 2*cells*line), 0, 2*cells*line).Bytes
	here := mapped(t, memfd(t, 2*line), 0, 2*line).Bytes
	heap := Heap(2 * cells * line).Bytes
	stores := map[string]func(b []byte){
		"Fence":        func(b []byte) { storeIndex(at[uint16](b)); Fence() },
		"StoreFence16": func(b []byte) { StoreFence16(at[uint16](b), 1) },
		"StoreFence32": func(b []byte) { StoreFence32(at[uint32](b), 1) },
		"StoreFence64": func(b []byte) { StoreFence64(at[uint64](b), 1) },
	}
	for name, store := range stores {
		for where, mem := range map[string][]byte{"shared": shared, "heap": heap} {
			t.Run(name+"/"+where, func(t *testing.T) {
				for range 4 {
					clear(mem)
					both := meet([2][]byte{mem[:cells*line], mem[cells*line:]}, here, line, store)
					if both > 0 {
						t.Fatalf("%d times of %d neither side saw the other's store", both, cells)
					}
				}
			})
		}
	}
}

// meet has two threads go through the lines of mem side by side, each storing in its own and then loading the other's. In here each says how far it
// is. meet returns how often neither has seen the other's store.
func meet(mem [2][]byte, here []byte, line int, store func(b []byte)) (both int) {
	cells := len(mem[0]) / line
	clear(here)
	var got [2][]bool
	var wg sync.WaitGroup
	for side := range 2 {
		got[side] = make([]bool, cells)
		wg.Go(func() {
			mine, other := at[uint32](here[side*line:]), at[uint32](here[(1-side)*line:])
			for i := range cells {
				atomic.StoreUint32(mine, uint32(i))
				for n := 0; atomic.LoadUint32(other) < uint32(i) && n < 1000; n++ { // it may have no processor now
				}
				w, err := Index(mem[1-side], i*line)
				if err != nil {
					panic(err)
				}
				store(mem[side][i*line:])
				got[side][i] = w.Load() == 1
			}
		})
	}
	wg.Wait()
	for i := range cells {
		if !got[0][i] && !got[1][i] {
			both++
		}
	}
	return both
}

// at is the value of type T at the beginning of b.
func at[T any](b []byte) *T {
	v, err := View[T](b, 1)
	if err != nil {
		panic(err)
	}
	return &v[0]
}

// storeIndex is a plain store, hidden from the race detector as a guest's would be.
//
//go:norace
//go:noinline
func storeIndex(p *uint16) { *p = 1 }

func memfd(t *testing.T, size int64) int {
	t.Helper()
	fd, err := unix.MemfdCreate("shm", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	return fd
}

// mappings is how many mappings of the memory file this process has.
func mappings(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), "/memfd:shm")
}

func TestMap(t *testing.T) {
	page := uint64(os.Getpagesize())
	fd := memfd(t, int64(4*page))
	for _, c := range []struct{ off, size uint64 }{
		{0, 4 * page}, {page, page}, {1, 1}, {page - 1, 2}, {page + 12, 2 * page}, {4*page - 1, 1},
	} {
		m, err := Map(fd, c.off, c.size)
		if err != nil {
			t.Fatalf("%#x+%#x: %v", c.off, c.size, err)
		}
		if uint64(len(m.Bytes)) != c.size || cap(m.Bytes) != len(m.Bytes) {
			t.Errorf("%#x+%#x: %d bytes, room for %d", c.off, c.size, len(m.Bytes), cap(m.Bytes))
		}
		m.Bytes[0], m.Bytes[c.size-1] = 0x5a, 0xa5
		var one [1]byte
		if _, err := unix.Pread(fd, one[:], int64(c.off+c.size-1)); err != nil || one[0] != 0xa5 {
			t.Errorf("%#x+%#x: the file has %#x, %v", c.off, c.size, one, err)
		}
		for range 2 {
			if err := m.Unmap(); err != nil || m.Bytes != nil {
				t.Errorf("Unmap: %v", err)
			}
		}
		if n := mappings(t); n != 0 {
			t.Errorf("%#x+%#x: %d mappings left", c.off, c.size, n)
		}
	}
}

func TestMapRefuses(t *testing.T) {
	page := uint64(os.Getpagesize())
	fd := memfd(t, int64(4*page))
	for _, c := range []struct{ off, size uint64 }{
		{0, 0}, {0, 4*page + 1}, {4 * page, 1}, {page, 4 * page}, {1, 1<<64 - 1}, {1 << 63, 1 << 63}, {1<<64 - 1, 2},
	} {
		if m, err := Map(fd, c.off, c.size); err == nil {
			t.Errorf("%#x+%#x: mapped %d bytes of a file of %#x", c.off, c.size, len(m.Bytes), 4*page)
		}
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	for name, fd := range map[string]int{"a pipe": int(r.Fd()), "a closed fd": -1} {
		if _, err := Map(fd, 0, 1); err == nil {
			t.Errorf("%s was mapped", name)
		}
	}
	if n := mappings(t); n != 0 {
		t.Errorf("%d mappings left", n)
	}
}

func TestHeap(t *testing.T) {
	m := Heap(13)
	if len(m.Bytes) != 13 || cap(m.Bytes) != 13 || Addr(m.Bytes)%8 != 0 {
		t.Errorf("%d bytes, room for %d, at %#x", len(m.Bytes), cap(m.Bytes), Addr(m.Bytes))
	}
	if err := m.Unmap(); err != nil || m.Bytes != nil {
		t.Error(err)
	}
}
