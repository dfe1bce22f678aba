package confine

import (
	"fmt"
	"os"
	"runtime"
	"slices"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

const actionENOSYS = seccomp.ActionErrno | seccomp.Action(unix.ENOSYS)

// restrictCalls gives all threads the filter of n.
func restrictCalls(n Needs, r *Report) error {
	if !seccompSupported() {
		r.Missing = append(r.Missing, "seccomp filters, or one older than Linux 4.14: system calls are not restricted")
		return nil
	}
	code, err := n.filter()
	if err != nil {
		return err
	}
	if err := loadFilter(code); err != nil {
		return err
	}
	r.Seccomp = true
	return nil
}

// filter is the program that the kernel runs before each system call.
func (n Needs) filter() ([]bpf.RawInstruction, error) {
	table, err := arch.GetInfo(runtime.GOARCH)
	if err != nil {
		return nil, err
	}
	policy := n.policy(table.SyscallNames)
	program, err := policy.Assemble()
	if err != nil {
		return nil, fmt.Errorf("assembling the filter: %w", err)
	}
	return bpf.Assemble(program)
}

// policy is what the filter is made of, in the order in which it looks. exist are the calls of this architecture.
func (n Needs) policy(exist map[string]int) seccomp.Policy {
	allow := n.unconditional(exist)
	p := seccomp.Policy{DefaultAction: seccomp.ActionErrno, Syscalls: []seccomp.SyscallGroup{{Action: seccomp.ActionAllow, Names: allow}}}
	var some []string
	for _, g := range groups {
		for _, c := range g.when {
			if _, ok := exist[c.name]; ok && n.has(g) && !slices.Contains(allow, c.name) {
				some = append(some, c.name)
				// A group for each: no jump is longer than a filter's can be.
				p.Syscalls = append(p.Syscalls, seccomp.SyscallGroup{Action: seccomp.ActionAllow, NamesWithCondtions: c.conditions()})
			}
		}
	}
	kill := seccomp.SyscallGroup{Action: seccomp.ActionKillProcess}
	for _, name := range deadly {
		if _, ok := exist[name]; ok && !slices.Contains(some, name) {
			kill.Names = append(kill.Names, name)
		}
	}
	// The C library, where there is one, asks whether there is clone3 and takes clone.
	absent := seccomp.SyscallGroup{Names: []string{"clone3"}, Action: actionENOSYS}
	p.Syscalls = append(p.Syscalls, absent, kill)
	return p
}

func (n Needs) has(g group) bool { return g.use == 0 || g.use&n.Use != 0 }

// unconditional are the calls of n that are allowed whatever their arguments are.
func (n Needs) unconditional(exist map[string]int) (names []string) {
	add := func(calls []string) {
		for _, name := range calls {
			if _, ok := exist[name]; ok && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	for _, g := range groups {
		if n.has(g) {
			add(g.calls)
		}
	}
	if len(n.Read)+len(n.Devices)+len(n.Make) > 0 || n.Use&Metrics != 0 {
		add(openCalls)
	}
	if len(n.Remove)+len(n.Make) > 0 {
		add(removeCalls)
	}
	return names
}

// conditions are the ways in which c is allowed, of which one is enough.
func (c call) conditions() (all []seccomp.NameWithConditions) {
	one := func(op seccomp.Operation, value uint64) {
		all = append(all, seccomp.NameWithConditions{
			Name: c.name, Conditions: seccomp.ArgumentConditions{{Argument: c.arg, Operation: op, Value: value}},
		})
	}
	if c.bits != 0 {
		op := seccomp.BitsSet
		if c.clear {
			op = seccomp.BitsNotSet
		}
		one(op, c.bits)
	}
	for _, v := range c.values {
		if v == ownProcess {
			v = uint64(os.Getpid())
		}
		one(seccomp.Equal, v)
	}
	return all
}
