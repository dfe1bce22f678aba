package backend_test

import (
	"fmt"
	"math"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

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

func TestF9RingAddress(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	q := e.Transmitq(0)
	q.Stop()
	good := q.Addr()
	r := e.Mem.Regions[0]
	end := r.UserAddr + r.Size
	size := map[string]uint64{"desc": 256 * 16, "avail": 6 + 256*2, "used": 6 + 256*8}
	align := map[string]uint64{"desc": 16, "avail": 2, "used": 4}
	for part, field := range map[string]func(a *vhostuser.VringAddr) *uint64{
		"desc":  func(a *vhostuser.VringAddr) *uint64 { return &a.Desc },
		"avail": func(a *vhostuser.VringAddr) *uint64 { return &a.Avail },
		"used":  func(a *vhostuser.VringAddr) *uint64 { return &a.Used },
	} {
		last := (end - size[part]) &^ (align[part] - 1)
		bad := map[string]uint64{
			"unaligned": *field(&good) + align[part]/2, "past the end": last + align[part], "beyond": end, "before": r.UserAddr - align[part],
			"nowhere": 0, "wrapping": math.MaxUint64 &^ 15, "almost wrapping": math.MaxUint64&^15 - size[part]&^15 + 16,
		}
		for name, at := range bad {
			a := good
			*field(&a) = at
			refused(t, e, part+" "+name, e.FE.SetVringAddr(a))
		}
		a := good
		*field(&a) = last // the last place that is good
		if err := e.FE.SetVringAddr(a); err != nil {
			t.Errorf("%s at the end of a region: %v", part, err)
		}
	}
	reserved := good
	reserved.Flags = 2
	refused(t, e, "reserved flags", e.FE.SetVringAddr(reserved))
	q.Start()
	e.works(t)
	n.goesOn(t)
}

// A ring across two regions that touch in both address spaces is still two mappings here.
func TestF9RingAcrossRegions(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	q := e.Transmitq(0)
	q.Stop()
	low := e.Mem.Regions[0]
	r := vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: 2 << 20, Size: 1 << 20})
	defer r.Close()
	r.UserAddr = low.UserAddr + low.Size
	if err := e.FE.AddMemReg(r.MemoryRegion, r.FD); err != nil {
		t.Fatal(err)
	}
	a := q.Addr()
	a.Desc = r.UserAddr - 256
	refused(t, e, "a descriptor table across regions", e.FE.SetVringAddr(a))
	q.Start()
	e.works(t)
	n.goesOn(t)
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
