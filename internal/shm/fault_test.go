package shm

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// blamed is an Owner that notes what it is told.
type blamed struct{ faults []*Fault }

func (b *blamed) Faulted(f *Fault) { b.faults = append(b.faults, f) }

// shrinking is a mapping of two pages of a memory file, and its file.
func shrinking(t *testing.T) (m *Mapping, fd int) {
	t.Helper()
	fd, err := unix.MemfdCreate("shm-test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, 8192); err != nil {
		t.Fatal(err)
	}
	if m, err = Map(fd, 0, 8192); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Unmap() })
	return m, fd
}

func TestGuardTellsWhoseMemoryFaulted(t *testing.T) {
	a, fdA := shrinking(t)
	b, fdB := shrinking(t)
	nobodys, fdN := shrinking(t)
	var ownerA, ownerB blamed
	a.Own(&ownerA)
	b.Own(&ownerB)
	if f := Guard(func() { a.Bytes[8191]++; b.Bytes[8191]++; nobodys.Bytes[8191]++ }); f != nil {
		t.Fatalf("memory that is there: %v", f)
	}
	for _, fd := range []int{fdA, fdB, fdN} {
		if err := unix.Ftruncate(fd, 4096); err != nil {
			t.Fatal(err)
		}
	}
	var private [8192]byte
	for name, c := range map[string]struct {
		f     func()
		owner Owner
		at    uintptr
	}{
		"load":      {func() { private[0] = a.Bytes[5000] }, &ownerA, Addr(a.Bytes) + 5000},
		"store":     {func() { b.Bytes[5000] = 1 }, &ownerB, Addr(b.Bytes) + 5000},
		"nobody's":  {func() { private[0] = nobodys.Bytes[5000] }, nil, Addr(nobodys.Bytes) + 5000},
		"last byte": {func() { private[0] = a.Bytes[8191] }, &ownerA, Addr(a.Bytes) + 8191},
	} {
		f := Guard(c.f)
		if f == nil || f.Owner != c.owner || f.Addr != c.at {
			t.Errorf("%s: %+v, want a fault at %#x of %v", name, f, c.at, c.owner)
		}
	}
	// From one to the other, it is the one that faults which counts.
	if f := Guard(func() { copy(b.Bytes[:4096], a.Bytes[4096:]) }); f == nil || f.Owner != &ownerA {
		t.Errorf("copying from a: %+v", f)
	}
	if f := Guard(func() { copy(b.Bytes[4096:], a.Bytes[:4096]) }); f == nil || f.Owner != &ownerB {
		t.Errorf("copying to b: %+v", f)
	}
	if len(ownerA.faults)+len(ownerB.faults) != 0 {
		t.Error("Guard told an owner, which is its caller's to do")
	}
	// What was unmapped is nobody's, even if somebody has the addresses by then.
	at := Addr(a.Bytes)
	if err := a.Unmap(); err != nil {
		t.Fatal(err)
	}
	if o, ok := sharedAt(at); ok {
		t.Errorf("unmapped memory belongs to %v", o)
	}
}

func TestGuardLetsOtherPanicsPass(t *testing.T) {
	defer func() {
		if r := recover(); r != "bug: other" {
			t.Errorf("recovered %v", r)
		}
	}()
	Guard(func() { panic("bug: other") })
	t.Error("the panic did not pass")
}

// An access outside of guest memory is a bug of ours, whatever the signal: it is not laid to a guest, whose session's end would hide it.
func TestGuardTakesNoFaultElsewhere(t *testing.T) {
	m, _ := shrinking(t)
	at := m.Bytes
	if err := m.Unmap(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if r := fmt.Sprint(recover()); !strings.HasPrefix(r, "bug: access to address") {
			t.Errorf("recovered %v", r)
		}
	}()
	Guard(func() { at[5000] = 1 })
	t.Error("the panic did not pass")
}

// A second mapping of guest memory faults as the first does.
func TestGuardInArena(t *testing.T) {
	m, fd := shrinking(t)
	a, err := NewArena(0, m.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if err := unix.Ftruncate(fd, 4096); err != nil {
		t.Fatal(err)
	}
	if f := Guard(func() { a.Bytes()[5000] = 1 }); f == nil || f.Owner != nil {
		t.Errorf("%+v, want a fault of nobody's", f)
	}
}
