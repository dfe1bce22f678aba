package backend

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/vhostuser"
)

// SetMemTable implements vhostuser.Handler. If regions are refused the old memory stays. A ring that the new memory does not hold is an error too, but one of
// that ring's: it stops, and the new memory is in use, since the front-end has done with the old, and other rings have to go on.
func (s *session) SetMemTable(regions []vhostuser.MemoryRegion, fds []int) error {
	defer s.discardFDs(fds...)
	var mapped []*guestmem.Region
	for i, r := range regions {
		m, err := s.mapRegion(r, fds[i])
		if err != nil {
			discard(mapped)
			return err
		}
		mapped = append(mapped, m)
	}
	return s.useTable(mapped, mapped)
}

// AddMemReg implements vhostuser.Handler. A front-end may add the same region once for each queue pair, as QEMU does up to 8.0; then it
// is removed as often, and goes with the last.
func (s *session) AddMemReg(r vhostuser.MemoryRegion, fd int) error {
	defer s.discardFDs(fd)
	m, err := s.mapRegion(r, fd)
	if err != nil {
		return err
	}
	if i := slices.IndexFunc(s.table.Regions(), m.Same); i >= 0 {
		m.Discard()
		s.repeats[s.table.Regions()[i]]++
		return nil
	}
	return s.useTable(append(slices.Clone(s.table.Regions()), m), []*guestmem.Region{m})
}

// RemMemReg implements vhostuser.Handler.
func (s *session) RemMemReg(r vhostuser.MemoryRegion) error {
	left := slices.Clone(s.table.Regions())
	i := slices.IndexFunc(left, func(m *guestmem.Region) bool {
		return m.Guest == guestmem.GPA(r.GuestAddr) && m.User == guestmem.UVA(r.UserAddr) && m.Size == r.Size
	})
	if i < 0 {
		return fmt.Errorf("no memory region at guest address %#x, user address %#x, size %#x", r.GuestAddr, r.UserAddr, r.Size)
	}
	if s.repeats[left[i]] > 0 {
		s.repeats[left[i]]--
		return nil
	}
	return s.useTable(slices.Delete(left, i, i+1), nil)
}

// GetMaxMemSlots implements vhostuser.Handler.
func (s *session) GetMaxMemSlots() uint64 { return guestmem.MaxRegions }

// newRegion maps memory. Tests have it take heap, which the race detector can watch.
var newRegion = guestmem.NewRegion

// mapRegion maps a region, whose faults are the session's.
func (s *session) mapRegion(r vhostuser.MemoryRegion, fd int) (*guestmem.Region, error) {
	m, err := newRegion(fd, r.MmapOffset, guestmem.GPA(r.GuestAddr), guestmem.UVA(r.UserAddr), r.Size)
	if err == nil {
		m.Own(s.ending)
	}
	return m, err
}

func discard(regions []*guestmem.Region) {
	for _, r := range regions {
		r.Discard()
	}
}

// useTable makes regions, of which fresh were mapped just now, the guest's memory. All queues are locked. What is in flight keeps the
// memory that it lies in; rings are looked up anew, and one that lies in memory no more stops, which is an error, with regions in use.
func (s *session) useTable(regions, fresh []*guestmem.Region) error {
	table, err := guestmem.NewTable(regions...)
	if err != nil {
		discard(fresh)
		return err
	}
	old := s.table
	s.table = table
	maps.DeleteFunc(s.repeats, func(m *guestmem.Region, _ int) bool { return !slices.Contains(regions, m) })
	s.countMemory()
	err = s.moveRings(table)
	s.register(table)
	old.Unpin()
	return err
}

// moveRings has all queues work in table from now on. Rings that it does not hold stop, and are broken.
func (s *session) moveRings(table *guestmem.Table) error {
	var lost []*queue
	var errs []error
	for _, q := range s.queues {
		if err := q.setTable(table); err != nil {
			lost, errs = append(lost, q), append(errs, err)
		}
	}
	err := s.stop(lost...) // what they have popped is returned while the old memory is there
	for i, q := range lost {
		q.setup.addr, q.broken = nil, errs[i]
	}
	return errors.Join(append(errs, err)...)
}

// register tells a device that wants to know of it what memory the guest has. No worker runs.
func (s *session) register(table *guestmem.Table) {
	r, ok := s.b.dev.(netdev.Registrar)
	if !ok {
		return
	}
	var regions [][]byte
	for _, m := range table.Regions() {
		regions = append(regions, m.Bytes())
	}
	if err := r.SetMemory(regions); err != nil {
		s.b.log.Warn("the device cannot register guest memory, and does without", "error", err)
	}
}

// countMemory notes the size of guest memory for Stats, which may ask at any time.
func (s *session) countMemory() {
	n := uint64(0)
	for _, r := range s.table.Regions() {
		n += r.Size
	}
	s.memRegions.Store(int64(len(s.table.Regions())))
	s.memBytes.Store(n)
}
