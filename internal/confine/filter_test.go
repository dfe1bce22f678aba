package confine

import (
	"encoding/binary"
	"os"
	"slices"
	"testing"

	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// vm runs the filter of n as the kernel would.
func vm(t *testing.T, n Needs, table *arch.Info) func(nr int, audit uint32, args ...uint64) uint32 {
	t.Helper()
	program := n.filter(table)
	// The kernel's verdicts are lengths for this machine, which bounds them: a table keeps them.
	var verdicts []uint32
	for i, in := range program {
		if ret, ok := in.(bpf.RetConstant); ok {
			at := slices.Index(verdicts, ret.Val)
			if at < 0 {
				at, verdicts = len(verdicts), append(verdicts, ret.Val)
			}
			program[i] = bpf.RetConstant{Val: uint32(at + 1)}
		}
	}
	machine, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}
	return func(nr int, audit uint32, args ...uint64) uint32 {
		b := make([]byte, 64) // struct seccomp_data
		binary.BigEndian.PutUint32(b, uint32(nr))
		binary.BigEndian.PutUint32(b[4:], audit)
		for i, a := range args {
			binary.BigEndian.PutUint32(b[16+8*i:], uint32(a)) // the machine is big-endian, the order of the words is not
			binary.BigEndian.PutUint32(b[20+8*i:], uint32(a>>32))
		}
		at, err := machine.Run(b)
		if err != nil {
			t.Fatal(err)
		}
		return verdicts[at-1]
	}
}

// TestFilter runs the program for every system call that there is, with arguments that matter and others, for several needs, and compares it
// with what the lists say.
func TestFilter(t *testing.T) {
	for _, table := range []*arch.Info{arch.X86_64, arch.AARCH64} {
		for _, n := range []Needs{
			{}, {Use: Inet}, {Use: Unix}, {Use: Packet}, {Use: XDP}, {Use: Ring}, {Use: Metrics | Profile}, {Use: Metrics | Inet}, {Use: Open}, {Use: ^Use(0)},
			{Read: []string{"/"}}, {Remove: []string{"/"}}, {Make: []string{"/"}},
		} {
			run := vm(t, n, table)
			for name, nr := range table.SyscallNames {
				for _, arg := range argumentsOfInterest() {
					if got, want := run(nr, uint32(table.ID), arg, arg, arg, arg), n.expected(name, [4]uint64{arg, arg, arg, arg}); got != want {
						t.Errorf("%s: %+v: %s(%#x): %#x, want %#x", table.Name, n, name, arg, got, want)
					}
				}
			}
			if got := run(5000, uint32(table.ID)); got != refuse {
				t.Errorf("%s: %+v: a call that is not known: %#x", table.Name, n, got)
			}
		}
	}
}

// argumentsOfInterest are all values that a group names, and some that none does.
func argumentsOfInterest() []uint64 {
	all := []uint64{0, 1, 7, 1 << 16, 1 << 32, 1<<32 | unix.AF_INET, ^uint64(0) >> 1, uint64(os.Getpid()), 0x50f00, unix.TIOCSTI, unix.F_SETOWN, 0o4755, unix.MSG_FASTOPEN}
	for _, g := range groups {
		for _, c := range g.when {
			for _, v := range c.values {
				if v != ownProcess && !slices.Contains(all, uint64(v)) {
					all = append(all, uint64(v))
				}
			}
		}
	}
	return all
}

// expected is what the lists say.
func (n Needs) expected(name string, args [4]uint64) uint32 {
	all := slices.Clone(groups)
	if len(n.Read)+len(n.Make) > 0 || n.Use&Metrics != 0 {
		all = append(all, openGroup)
	}
	if len(n.Remove)+len(n.Make) > 0 {
		all = append(all, removeGroup)
	}
	conditional := false
	for _, g := range all {
		if n.has(g) && slices.Contains(g.calls, name) {
			return allow
		}
		for _, c := range g.when {
			if c.name != name || !n.has(g) {
				continue
			}
			conditional = true
			if c.allows(args[c.arg]) {
				return allow
			}
		}
	}
	switch {
	case name == "clone3":
		return absent
	case slices.Contains(deadly, name) && !conditional:
		return kill
	}
	return refuse
}

func (c call) allows(a uint64) bool {
	switch {
	case c.bits != 0:
		return (uint32(a)&c.bits == 0) == c.clear
	case slices.Contains(c.values, ownProcess):
		return a == uint64(os.Getpid())
	}
	return a < 1<<32 && slices.Contains(c.values, uint32(a))
}

// TestFilterOfOtherTables: the numbers of i386 and x32 mean other calls, and none is allowed.
func TestFilterOfOtherTables(t *testing.T) {
	run := vm(t, Needs{Use: ^Use(0)}, arch.X86_64)
	for nr := range 600 {
		if got := run(nr, uint32(arch.I386.ID)); got == allow {
			t.Errorf("call %d of i386 is allowed", nr)
		}
		if got := run(0x40000000|nr, uint32(arch.X86_64.ID)); got == allow {
			t.Errorf("call %d of x32 is allowed", nr)
		}
	}
}

// TestListsAreSpelt: a name that no architecture has would never be looked at; one that is deadly is never allowed by itself.
func TestListsAreSpelt(t *testing.T) {
	check := func(name string) {
		if _, ok := arch.X86_64.SyscallNames[name]; ok {
			return
		}
		if _, ok := arch.AARCH64.SyscallNames[name]; !ok {
			t.Errorf("there is no system call %q", name)
		}
	}
	var allowed []string
	for _, g := range append(slices.Clone(groups), openGroup, removeGroup) {
		allowed = append(allowed, g.calls...)
		for _, c := range g.when {
			check(c.name)
		}
	}
	for _, name := range slices.Concat(allowed, deadly) {
		check(name)
	}
	for _, name := range deadly {
		if slices.Contains(allowed, name) {
			t.Errorf("%s is allowed and deadly", name)
		}
	}
}

// TestNeedsCovers: what a process was not confined to allow is named.
func TestNeedsCovers(t *testing.T) {
	have := Needs{Use: Inet, Caps: CapNetRaw, Read: []string{"/etc/vhostd"}, Make: []string{"/run/vhostd"}}
	if lacks := have.Covers(Needs{Use: Inet, Read: []string{"/etc/vhostd/vhostd.toml"}, Remove: []string{"/run/vhostd"}}); len(lacks) != 0 {
		t.Errorf("lacks %q, want nothing", lacks)
	}
	want := []string{"new AF_XDP sockets", "CAP_BPF", "reading /etc/vhostd2", "making sockets in /run", "connecting to /run/a"}
	got := have.Covers(Needs{Use: XDP | Inet, Caps: CapBPF | CapNetRaw, Read: []string{"/etc/vhostd2"}, Make: []string{"/run"}, Connect: []string{"/run/a"}})
	if !slices.Equal(got, want) {
		t.Errorf("lacks %q, want %q", got, want)
	}
}
