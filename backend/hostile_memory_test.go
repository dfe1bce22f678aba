package backend_test

import (
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/vhostuser"
)

func TestF8RingSize(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	e.Transmitq(0).Stop()
	for _, size := range []uint32{0, 3, 255, 32769, 65536, 1 << 31, math.MaxUint32} {
		refused(t, e, fmt.Sprint("ring size ", size), e.FE.SetVringNum(1, size))
	}
	e.Transmitq(0).Start()
	e.works(t)
	n.goesOn(t)
}

// ringParts are the parts of a ring of 256 descriptors, as SET_VRING_ADDR names them.
func ringParts(packed bool) map[string]ringPart {
	desc := func(a *vhostuser.VringAddr) *uint64 { return &a.Desc }
	avail := func(a *vhostuser.VringAddr) *uint64 { return &a.Avail }
	used := func(a *vhostuser.VringAddr) *uint64 { return &a.Used }
	if packed {
		return map[string]ringPart{
			"descriptor ring": {desc, 256 * 16, 16}, "driver event suppression": {avail, 4, 4}, "device event suppression": {used, 4, 4},
		}
	}
	return map[string]ringPart{
		"descriptor table": {desc, 256 * 16, 16}, "available ring": {avail, 6 + 256*2, 2}, "used ring": {used, 6 + 256*8, 4},
	}
}

type ringPart struct {
	field       func(a *vhostuser.VringAddr) *uint64
	size, align uint64 // bytes
}

// at is a with the part at another address.
func (p ringPart) at(a vhostuser.VringAddr, user uint64) vhostuser.VringAddr {
	*p.field(&a) = user
	return a
}

// splitAndPacked runs a test for both forms of rings, on a guest whose transmitq is stopped, with a region r whose end is aligned for an available ring and for
// no other part: so that each can lie across it, event suppression too.
func splitAndPacked(t *testing.T, f func(t *testing.T, e *end, r *vhosttest.Region, parts map[string]ringPart)) {
	for form, packed := range map[string]bool{"split": false, "packed": true} {
		t.Run(form, func(t *testing.T) {
			vhosttest.NoLeaks(t)
			n := newNeighbour(t)
			e := attack(t, vhosttest.Options{Packed: packed})
			e.Transmitq(0).Stop()
			r := vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: 1 << 40, Size: 1<<20 - 2})
			defer r.Close()
			if err := e.FE.AddMemReg(r.MemoryRegion, r.FD); err != nil {
				t.Fatal(err)
			}
			f(t, e, r, ringParts(packed))
			e.Transmitq(0).Start()
			e.works(t)
			n.goesOn(t)
		})
	}
}

func TestF9RingAddress(t *testing.T) {
	splitAndPacked(t, func(t *testing.T, e *end, r *vhosttest.Region, parts map[string]ringPart) {
		good := e.Transmitq(0).Addr()
		end := r.UserAddr + r.Size
		for part, p := range parts {
			last := (end - p.size) &^ (p.align - 1)
			for name, at := range map[string]uint64{
				"unaligned": *p.field(&good) + p.align/2, "past the end": last + p.align, "all past the end but its start": (end - 1) &^ (p.align - 1),
				"beyond": (end + p.align) &^ (p.align - 1), "before": r.UserAddr - p.align,
				"nowhere": 0, "wrapping": math.MaxUint64 &^ 15, "almost wrapping": math.MaxUint64&^15 - p.size&^15 + 16,
			} {
				refused(t, e, part+" "+name, e.FE.SetVringAddr(p.at(good, at)))
			}
			if err := e.FE.SetVringAddr(p.at(good, last)); err != nil { // the last place that is good
				t.Errorf("%s at the end of a region: %v", part, err)
			}
		}
		reserved := good
		reserved.Flags = 2
		refused(t, e, "reserved flags", e.FE.SetVringAddr(reserved))
	})
}

// A ring across two regions that touch in both address spaces is still two mappings here.
func TestF9RingAcrossRegions(t *testing.T) {
	splitAndPacked(t, func(t *testing.T, e *end, low *vhosttest.Region, parts map[string]ringPart) {
		high := vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: guestmem.GPA(low.GuestAddr + low.Size), Size: 1 << 20})
		defer high.Close()
		high.UserAddr = low.UserAddr + low.Size
		if err := e.FE.AddMemReg(high.MemoryRegion, high.FD); err != nil {
			t.Fatal(err)
		}
		good := e.Transmitq(0).Addr()
		for part, p := range parts {
			first, last := (high.UserAddr-p.size)&^(p.align-1)+p.align, (high.UserAddr-1)&^(p.align-1)
			for _, at := range []uint64{first, first + (last-first)/2&^(p.align-1), last} {
				refused(t, e, fmt.Sprintf("%s across regions, %d of %d bytes in the first", part, high.UserAddr-at, p.size), e.FE.SetVringAddr(p.at(good, at)))
			}
		}
	})
}

// A ring that was told its place while it was short enough, and grows out of the region then, does not start.
func TestF9RingGrowsAcrossRegions(t *testing.T) {
	splitAndPacked(t, func(t *testing.T, e *end, r *vhosttest.Region, parts map[string]ringPart) {
		q := e.Transmitq(0)
		for part, p := range parts {
			if p.size == 4 { // whatever the ring's size is
				continue
			}
			at := (r.UserAddr + r.Size - p.size/2) &^ (p.align - 1)
			if err := errors.Join(e.FE.SetVringNum(1, 2), e.FE.SetVringAddr(p.at(q.Addr(), at)), e.FE.SetVringNum(1, 256)); err != nil {
				t.Fatal(err)
			}
			refused(t, e, "the start of a ring with a "+part+" across regions", e.FE.SetVringKick(1, q.Kick.FD()))
		}
	})
}

func TestF10Regions(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	spare := vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: 1 << 40, Size: 1 << 20})
	defer spare.Close()
	dir, err := unix.Open(t.TempDir(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dir)
	exe, err := os.Executable() // on a disk
	if err != nil {
		t.Fatal(err)
	}
	disk, err := unix.Open(exe, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(disk)
	good, held := spare.MemoryRegion, e.Mem.Regions[0].MemoryRegion
	for name, c := range map[string]struct {
		change func(r *vhostuser.MemoryRegion)
		fd     int
	}{
		"size 0":               {func(r *vhostuser.MemoryRegion) { r.Size = 0 }, spare.FD},
		"guest address wraps":  {func(r *vhostuser.MemoryRegion) { r.GuestAddr = math.MaxUint64 - 0xfff }, spare.FD},
		"user address wraps":   {func(r *vhostuser.MemoryRegion) { r.UserAddr = math.MaxUint64 - 0xfff }, spare.FD},
		"offset wraps":         {func(r *vhostuser.MemoryRegion) { r.MmapOffset = math.MaxUint64 - 0xfff }, spare.FD},
		"offset past the end":  {func(r *vhostuser.MemoryRegion) { r.MmapOffset = 1 << 20 }, spare.FD},
		"size past the end":    {func(r *vhostuser.MemoryRegion) { r.Size++ }, spare.FD},
		"huge":                 {func(r *vhostuser.MemoryRegion) { r.Size = math.MaxUint64 - 1<<41 }, spare.FD},
		"guest overlap":        {func(r *vhostuser.MemoryRegion) { r.GuestAddr = held.GuestAddr + held.Size - 1 }, spare.FD},
		"guest overlap within": {func(r *vhostuser.MemoryRegion) { r.GuestAddr = held.GuestAddr + 4096 }, spare.FD},
		"user overlap":         {func(r *vhostuser.MemoryRegion) { r.UserAddr = held.UserAddr - r.Size + 1 }, spare.FD},
		"another file there":   {func(r *vhostuser.MemoryRegion) { *r = held }, e.Mem.Regions[1].FD},
		"no file to map":       {func(*vhostuser.MemoryRegion) {}, e.Queues[0].Kick.FD()},
		"a directory":          {func(*vhostuser.MemoryRegion) {}, dir},
		"a file on a disk":     {func(*vhostuser.MemoryRegion) {}, disk},
	} {
		r := good
		c.change(&r)
		refused(t, e, "ADD_MEM_REG: "+name, e.FE.AddMemReg(r, c.fd))
		// The old table stays, in one piece: the new one holds the old regions, and so fails for the bad one alone.
		regions := []vhostuser.MemoryRegion{e.Mem.Regions[0].MemoryRegion, e.Mem.Regions[1].MemoryRegion, r}
		refused(t, e, "SET_MEM_TABLE: "+name, e.FE.SetMemTable(regions, []int{e.Mem.Regions[0].FD, e.Mem.Regions[1].FD, c.fd}))
		e.works(t)
	}
	for _, change := range []func(r *vhostuser.MemoryRegion){
		func(r *vhostuser.MemoryRegion) { r.Size-- }, func(r *vhostuser.MemoryRegion) { r.UserAddr++ },
		func(r *vhostuser.MemoryRegion) { r.GuestAddr++ },
	} {
		r := held
		change(&r)
		refused(t, e, "REM_MEM_REG of what is not there", e.FE.RemMemReg(r))
	}
	e.works(t)
	n.goesOn(t)
	for _, count := range []uint32{0, 9, math.MaxUint32} {
		payload := append(u32s(count, 0), make([]byte, 32*min(count, 9))...) // as long as it says, where it can be
		fds := slices.Repeat([]int{spare.FD}, int(min(count, 8)))
		e.raw(t, append(header(vhostuser.ReqSetMemTable, vhostuser.FlagVersion, len(payload)), payload...), fds...)
		e.closed(t)
	}
}

// A table in which a ring is no longer found, or found where its parts cannot be used, stops that ring.
func TestF10RingLosesItsMemory(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	for name, change := range map[string]func(e *end) error{
		"removed": func(e *end) error { return e.FE.RemMemReg(e.Mem.Regions[1].MemoryRegion) },
		"replaced": func(e *end) error {
			r := e.Mem.Regions[0]
			return e.FE.SetMemTable([]vhostuser.MemoryRegion{r.MemoryRegion}, []int{r.FD})
		},
		"unaligned": func(e *end) error { // by an odd offset: the addresses that we see are not those of the front-end
			var regions []vhostuser.MemoryRegion
			var fds []int
			for _, r := range e.Mem.Regions {
				m := r.MemoryRegion
				m.MmapOffset, m.Size = 1, m.Size-1
				regions, fds = append(regions, m), append(fds, r.FD)
			}
			return e.FE.SetMemTable(regions, fds)
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := attack(t, vhosttest.Options{})
			refused(t, e, "memory without a ring", change(e))
			var stopped int
			for _, q := range e.be.Stats().Queues {
				if !q.Started && q.Broken != "" {
					stopped++
				}
			}
			if stopped == 0 {
				t.Errorf("no queue stopped: %+v", e.be.Stats().Queues)
			}
			e.Hangup()
			e.Reconnect()
			e.works(t)
			n.goesOn(t)
		})
	}
}

// What was counted of a region goes with it, also when the new memory costs a ring and the answer is an error: the new memory is in use.
func TestRepeatsGoWithTheirMemory(t *testing.T) {
	vhosttest.NoLeaks(t)
	e := attack(t, vhosttest.Options{})
	r := e.Mem.Regions[0]
	for range 3 {
		if err := e.FE.AddMemReg(r.MemoryRegion, r.FD); err != nil {
			t.Fatal(err)
		}
	}
	if n := e.be.Repeats(); n != 1 {
		t.Fatalf("%d regions counted, want 1", n)
	}
	if err := e.FE.SetMemTable([]vhostuser.MemoryRegion{r.MemoryRegion}, []int{r.FD}); err == nil {
		t.Fatal("memory without a ring is taken without a word")
	}
	if s := e.be.Stats(); s.MemoryRegions != 1 {
		t.Errorf("%d regions, want the 1 of the new memory", s.MemoryRegions)
	}
	if n := e.be.Repeats(); n != 0 {
		t.Errorf("%d regions of the old memory counted", n)
	}
	e.Hangup()
	e.Reconnect()
	e.works(t)
}
