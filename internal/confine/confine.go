package confine

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Use is a set of groups of system calls.
type Use uint32

// The groups, beside the base that everybody has.
const (
	// Inet: sockets to and from addresses: TCP, UDP, pings.
	Inet Use = 1 << iota
	// Unix: connections to UNIX sockets, and datagrams to them.
	Unix
	// Packet: packet sockets are opened, and interfaces watched.
	Packet
	// XDP: AF_XDP sockets are opened and put into the program's map.
	XDP
	// Ring: requests go through io_uring rings that are open.
	Ring
	// NewRing: rings are opened. What goes through a ring passes seccomp by until the ring is restricted: Landlock alone sees it.
	NewRing
	// Metrics: what Prometheus's collectors read of the process.
	Metrics
	// Profile: Go's profiles.
	Profile
	// Open: new devices and sockets are opened, as far as Caps and paths let them; those with addresses want Inet as well, rings NewRing.
	Open
)

// Needs is what a process goes on needing. The zero value is a process that moves bytes between descriptors and accepts connections.
type Needs struct {
	Use  Use
	Caps Caps // kept as far as the process has them

	// Paths. One that does not exist yields no right.
	Read    []string // files, and directories with all that is below them, that are read
	Devices []string // device nodes that are opened to be read, written and controlled
	Make    []string // directories in which sockets are made, and files removed
	Remove  []string // directories of which files are removed
	Connect []string // UNIX sockets, which may be made later; one that begins with @ is abstract

	User *User // to become, nil: stay who we are
}

// Add adds what other needs to n. There is one user, the first that is named.
func (n *Needs) Add(other Needs) {
	n.Use |= other.Use
	n.Caps |= other.Caps
	n.Read = append(n.Read, other.Read...)
	n.Devices = append(n.Devices, other.Devices...)
	n.Make = append(n.Make, other.Make...)
	n.Remove = append(n.Remove, other.Remove...)
	n.Connect = append(n.Connect, other.Connect...)
	if n.User == nil {
		n.User = other.User
	}
}

// Covers tells what other needs that n has not: the names of it, none if a process that was confined to n can do what other needs.
func (n Needs) Covers(other Needs) (lacks []string) {
	for _, g := range groups {
		if g.use != 0 && other.Use&^n.Use&g.use != 0 {
			lacks = append(lacks, g.what)
		}
	}
	if c := other.Caps &^ n.Caps; c != 0 {
		lacks = append(lacks, c.String())
	}
	for _, p := range []struct {
		verb       string
		have, want []string
	}{
		{"reading", n.Read, other.Read},
		{"opening", n.Devices, other.Devices},
		{"making sockets in", n.Make, other.Make},
		{"removing from", append(slices.Clip(n.Remove), n.Make...), other.Remove},
		{"connecting to", n.Connect, other.Connect},
	} {
		for _, path := range p.want {
			if !slices.ContainsFunc(p.have, func(have string) bool { return beneath(have, path) }) {
				lacks = append(lacks, p.verb+" "+path)
			}
		}
	}
	return lacks
}

// Report is what Apply did.
type Report struct {
	Landlock int      // the version of Landlock's interface that was used; 0: none
	Seccomp  bool     // system calls are filtered
	Caps     Caps     // that the process still has
	Missing  []string // what this kernel cannot do, and should, one sentence each
	Newer    []string // what newer kernels than most can do besides
}

// Apply confines the process to n, for good. It is called once, when everything is open and before strangers are served. An error may leave
// the process half confined: it should end.
func Apply(n Needs) (Report, error) {
	if cgo {
		return Report{}, errors.New("this vhostd was built with cgo: its C library makes system calls of its own, which would end it. Build it with CGO_ENABLED=0, or run it with --no-sandbox")
	}
	_ = time.Now().Local().String() // reads the time zone's file, which the log wants later
	var r Report
	for _, step := range []struct {
		what string
		do   func(Needs, *Report) error
	}{
		{"core dumps", noDumps},
		{"user", become},
		{"capabilities", dropCaps},
		{"no_new_privs", noNewPrivs},
		{"Landlock", restrictPaths},
		{"seccomp", restrictCalls},
	} {
		if err := step.do(n, &r); err != nil {
			return r, fmt.Errorf("confining vhostd: %s: %w", step.what, err)
		}
	}
	return r, nil
}

// noDumps keeps the process's memory, in which frames of guests are, from being written to a file at a crash. Guest memory itself is left out
// of dumps by internal/shm, also where this is not called.
func noDumps(Needs, *Report) error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("RLIMIT_CORE: %w", err)
	}
	return undumpable()
}

// undumpable makes /proc/PID root's own, and ptrace(2) a matter of CAP_SYS_PTRACE. A change of the user undoes it.
func undumpable() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_DUMPABLE: %w", err)
	}
	return nil
}

func noNewPrivs(Needs, *Report) error {
	if err := onAllThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return fmt.Errorf("PR_SET_NO_NEW_PRIVS: %w", err)
	}
	return nil
}

// Support is what a kernel can do for Apply.
type Support struct {
	Landlock    int   // version of its interface, 0 for none
	LandlockErr error // why there is none
	Seccomp     bool
}

// Supported asks the kernel.
func Supported() Support {
	var s Support
	s.Landlock, s.LandlockErr = landlockVersion()
	s.Seccomp = seccompSupported()
	return s
}

// unavailable tells whether the kernel, or the container around this process, does not have what was asked for at all.
func unavailable(err error) bool {
	return errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM)
}
