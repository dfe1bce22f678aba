package confine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/landlock-lsm/go-landlock/landlock"
	llsys "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// Rights of the members of Needs.
const (
	readRights   landlock.AccessFSSet = llsys.AccessFSReadFile | llsys.AccessFSReadDir
	deviceRights landlock.AccessFSSet = llsys.AccessFSReadFile | llsys.AccessFSWriteFile | llsys.AccessFSIoctlDev
	removeRights landlock.AccessFSSet = llsys.AccessFSRemoveFile
	makeRights   landlock.AccessFSSet = removeRights | llsys.AccessFSMakeSock
)

// pathsOfSockets is the version of Landlock that knows paths of UNIX sockets; abstract names it knows since 6.
const pathsOfSockets = 9

// landlockVersion is the version of the kernel's Landlock, or why there is none.
func landlockVersion() (int, error) {
	v, err := llsys.LandlockGetABIVersion()
	if err != nil {
		return 0, err
	}
	return v, nil
}

// restrictPaths applies Landlock. What it restricts beyond its rules is all that the kernel's version of it can, with two exceptions: signals are
// left to seccomp, since kernels up to 6.14 took Go's own, from thread to thread, for those of strangers; and UDP is, since its sockets are open.
func restrictPaths(n Needs, r *Report) error {
	version, err := landlockVersion()
	if unavailable(err) {
		r.Missing = append(r.Missing, fmt.Sprintf("Landlock (%v): files are not restricted", err))
		return nil
	}
	if err != nil {
		return err
	}
	if version < 4 {
		r.Missing = append(r.Missing, fmt.Sprintf("TCP in Landlock, which is of version %d and not 4 or newer", version))
	}
	if version < pathsOfSockets && n.Use&(Unix|Open) != 0 {
		r.Newer = append(r.Newer, fmt.Sprintf("UNIX sockets in Landlock, which is of version %d and not %d or newer: all that this user can connect to stay open to vhostd",
			version, pathsOfSockets))
	}
	if n.Use&Metrics != 0 {
		n.Read = append(slices.Clip(n.Read), processDir, "/proc/stat")
		if err := pinProcess(); err != nil {
			return err
		}
	}
	rules, err := n.rules()
	if err != nil {
		return err
	}
	if err := n.landlock().BestEffort().Restrict(rules...); err != nil {
		return err
	}
	r.Landlock = version
	return nil
}

// landlock is what Landlock is to restrict.
func (n Needs) landlock() landlock.Config {
	c := landlock.V9
	c.Scoped = llsys.ScopeAbstractUnixSocket
	if slices.ContainsFunc(n.Connect, abstract) {
		c.Scoped = 0
	}
	switch {
	case n.Use&Open != 0 && n.Use&Inet != 0:
		c.HandledAccessNet = 0
	case n.Use&Inet != 0: // any port, as the guest likes
		c.HandledAccessNet = llsys.AccessNetBindTCP
	default:
		c.HandledAccessNet = llsys.AccessNetBindTCP | llsys.AccessNetConnectTCP
	}
	return c
}

func abstract(path string) bool { return strings.HasPrefix(path, "@") }

// rules are the exceptions for the paths of n.
func (n Needs) rules() ([]landlock.Rule, error) {
	var rules []landlock.Rule
	add := func(rights landlock.AccessFSSet, paths []string) error {
		for _, path := range paths {
			info, err := os.Stat(path)
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			if !info.IsDir() {
				rules = append(rules, landlock.PathAccess(rights&fileRights, path))
				continue
			}
			rules = append(rules, landlock.PathAccess(rights, path))
		}
		return nil
	}
	var servers []string // a socket may be made anew: its directory
	for _, path := range n.Connect {
		if !abstract(path) {
			servers = append(servers, filepath.Dir(path))
		}
	}
	return rules, errors.Join(
		add(readRights, n.Read), add(deviceRights, n.Devices), add(makeRights, n.Make),
		add(removeRights, n.Remove), add(llsys.AccessFSResolveUnix, servers))
}

// fileRights are those that a rule for a file, not a directory, can have.
const fileRights landlock.AccessFSSet = llsys.AccessFSReadFile | llsys.AccessFSWriteFile | llsys.AccessFSIoctlDev | llsys.AccessFSTruncate |
	llsys.AccessFSExecute | llsys.AccessFSResolveUnix

// beneath tells whether path is root or lies under it.
func beneath(root, path string) bool {
	rel, err := filepath.Rel(root, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

// pinProcess keeps the directory /proc/self the one that its rule is for: the kernel forgets such a directory when memory is short, and makes
// another one of it later. The descriptor stays open for the life of the process.
func pinProcess() error {
	_, err := unix.Open(processDir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", processDir, err)
	}
	return nil
}

const processDir = "/proc/self"
