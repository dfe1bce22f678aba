package confine

import (
	"fmt"
	"os"
	"runtime"
	"slices"

	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Verdicts of the filter.
const (
	allow  = unix.SECCOMP_RET_ALLOW
	refuse = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	absent = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	kill   = unix.SECCOMP_RET_KILL_PROCESS
)

// restrictCalls gives all threads the filter of n.
func restrictCalls(n Needs, r *Report) error {
	if !seccompSupported() {
		r.Missing = append(r.Missing, "seccomp filters, or they are older than Linux 4.14: system calls are not restricted")
		return nil
	}
	table, err := arch.GetInfo(runtime.GOARCH)
	if err != nil {
		return err
	}
	code, err := bpf.Assemble(n.filter(table))
	if err != nil {
		return fmt.Errorf("assembling the filter: %w", err)
	}
	if err := loadFilter(code); err != nil {
		return err
	}
	r.Seccomp = true
	return nil
}

// rule is what becomes of a system call.
type rule struct {
	nr      uint32
	verdict uint32 // where when is empty
	when    []call // it is allowed in these cases, and else refused
}

// rules are those of n, ordered by number. What has none is refused.
func (n Needs) callRules(table *arch.Info) (rules []rule) {
	at := map[string]int{}
	set := func(name string, verdict uint32, when ...call) {
		nr, ok := table.SyscallNames[name]
		if !ok {
			return // this architecture does without
		}
		if i, ok := at[name]; ok {
			if rules[i].when != nil && when != nil {
				rules[i].when = append(rules[i].when, when...)
			}
			return
		}
		at[name] = len(rules)
		rules = append(rules, rule{uint32(nr), verdict, when})
	}
	have := n.groups()
	for _, g := range have {
		for _, name := range g.calls {
			set(name, allow)
		}
	}
	for _, g := range have {
		for _, c := range g.when {
			set(c.name, allow, c)
		}
	}
	for _, name := range deadly {
		set(name, kill)
	}
	set("clone3", absent) // the C library, where there is one, asks for it and takes clone
	slices.SortFunc(rules, func(a, b rule) int { return int(a.nr) - int(b.nr) })
	return rules
}

func (n Needs) has(g group) bool { return (g.use == 0 || g.use&n.Use != 0) && g.unless&n.Use == 0 }

// groups are those of n.
func (n Needs) groups() (have []group) {
	for _, g := range groups {
		if n.has(g) {
			have = append(have, g)
		}
	}
	if len(n.Read)+len(n.Devices)+len(n.Make) > 0 || n.Use&Metrics != 0 {
		have = append(have, openGroup)
	}
	if len(n.Remove)+len(n.Make) > 0 {
		have = append(have, removeGroup)
	}
	return have
}

// Offsets in struct seccomp_data, whose words have the machine's byte order: little-endian, on both that vhostd is made for.
const (
	dataNumber = 0
	dataArch   = 4
	dataArgs   = 16
	x32Numbers = 0x40000000
)

// filter is the program that the kernel runs before each system call: it finds the number among the rules by halves, and then looks at the
// argument that the rule names, if it names one.
func (n Needs) filter(table *arch.Info) []bpf.Instruction {
	code := []bpf.Instruction{
		bpf.LoadAbsolute{Off: dataArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(table.ID), SkipTrue: 1},
		bpf.RetConstant{Val: refuse},
		bpf.LoadAbsolute{Off: dataNumber, Size: 4},
	}
	if table.ID == arch.X86_64.ID {
		code = append(code, bpf.JumpIf{Cond: bpf.JumpGreaterOrEqual, Val: x32Numbers, SkipFalse: 1}, bpf.RetConstant{Val: absent})
	}
	return append(code, search(n.callRules(table))...)
}

// search is the program that finds the number that is loaded among rules.
func search(rules []rule) []bpf.Instruction {
	switch len(rules) {
	case 0:
		return []bpf.Instruction{bpf.RetConstant{Val: refuse}}
	case 1:
		body := rules[0].body()
		return slices.Concat(jump(bpf.JumpEqual, rules[0].nr, len(body)), body, search(nil))
	}
	half := len(rules) / 2
	high := search(rules[half:])
	return slices.Concat(jump(bpf.JumpGreaterOrEqual, rules[half].nr, len(high)), high, search(rules[:half]))
}

// jump goes on with the next instructions if the condition holds, and else skips n of them. A conditional jump of BPF's reaches 255 at most.
func jump(cond bpf.JumpTest, value uint32, n int) []bpf.Instruction {
	return []bpf.Instruction{bpf.JumpIf{Cond: cond, Val: value, SkipTrue: 1}, bpf.Jump{Skip: uint32(n)}}
}

// body decides on a call whose number is r's.
func (r rule) body() (code []bpf.Instruction) {
	if r.when == nil {
		return []bpf.Instruction{bpf.RetConstant{Val: r.verdict}}
	}
	for _, c := range r.when {
		low := dataArgs + 8*c.arg
		if c.bits != 0 {
			pass := bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: c.bits, SkipFalse: 1}
			if c.clear {
				pass = bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: c.bits, SkipTrue: 1}
			}
			code = append(code, bpf.LoadAbsolute{Off: low, Size: 4}, pass, bpf.RetConstant{Val: allow})
			continue
		}
		code = append(code,
			bpf.LoadAbsolute{Off: low + 4, Size: 4}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1}, bpf.RetConstant{Val: refuse},
			bpf.LoadAbsolute{Off: low, Size: 4})
		for _, v := range c.values {
			if v == ownProcess {
				v = uint32(os.Getpid())
			}
			code = append(code, bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipFalse: 1}, bpf.RetConstant{Val: allow})
		}
	}
	return append(code, bpf.RetConstant{Val: refuse})
}
