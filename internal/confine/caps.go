package confine

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"os/user"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// Caps is a set of capabilities, a bit for each, as /proc/PID/status has them.
type Caps uint64

// Capabilities that devices go on needing, or need to be opened.
const (
	CapNetAdmin Caps = 1 << unix.CAP_NET_ADMIN
	CapNetRaw   Caps = 1 << unix.CAP_NET_RAW
	CapIPCLock  Caps = 1 << unix.CAP_IPC_LOCK
	CapBPF      Caps = 1 << unix.CAP_BPF
	CapChown    Caps = 1 << unix.CAP_CHOWN
)

var capNames = map[Caps]string{
	CapNetAdmin: "CAP_NET_ADMIN", CapNetRaw: "CAP_NET_RAW", CapIPCLock: "CAP_IPC_LOCK", CapBPF: "CAP_BPF", CapChown: "CAP_CHOWN",
}

// String lists the names.
func (c Caps) String() string {
	if c == 0 {
		return "none"
	}
	var names []string
	for left := c; left != 0; left &= left - 1 {
		one := left & -left
		name, ok := capNames[one]
		if !ok {
			name = fmt.Sprintf("capability %d", bits.TrailingZeros64(uint64(one)))
		}
		names = append(names, name)
	}
	return strings.Join(names, ",")
}

// onAllThreads makes a system call on every thread of the process. Go's runtime ends the process if they do not all answer the same.
func onAllThreads(nr, a, b, c uintptr) error {
	if _, _, errno := psx.Syscall3(nr, a, b, c); errno != 0 {
		return errno
	}
	return nil
}

// dropCaps leaves the capabilities of n that the process has, in the permitted and effective sets alone. The bounding set, which limits what a
// program that is executed could gain, can be reduced with CAP_SETPCAP only; without it no_new_privs does the same.
func dropCaps(n Needs, r *Report) error {
	have, err := permitted()
	if err != nil {
		return err
	}
	r.Caps = n.Caps & have
	if err := capset(have); err != nil { // a change of the user has emptied the effective set
		return fmt.Errorf("capset: %w", err)
	}
	if have&(1<<unix.CAP_SETPCAP) != 0 {
		if err := dropBounding(r.Caps); err != nil {
			return err
		}
	}
	if err := onAllThreads(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("ambient set: %w", err)
	}
	if err := capset(r.Caps); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	return nil
}

func dropBounding(keep Caps) error {
	for c := range 64 {
		if keep&(1<<c) != 0 {
			continue
		}
		err := onAllThreads(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c), 0)
		if errors.Is(err, unix.EINVAL) {
			return nil // beyond the last one that the kernel has
		}
		if err != nil {
			return fmt.Errorf("bounding set, capability %d: %w", c, err)
		}
	}
	return nil
}

// permitted are the capabilities of this thread.
func permitted() (Caps, error) {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var d [2]unix.CapUserData
	if err := unix.Capget(&h, &d[0]); err != nil {
		return 0, fmt.Errorf("capget: %w", err)
	}
	return Caps(d[0].Permitted) | Caps(d[1].Permitted)<<32, nil
}

// User is who the process becomes.
type User struct {
	UID, GID int
	Groups   []int // supplementary ones
}

// LookupUser reads NAME or UID, with :GROUP or :GID behind it or not. A name has the groups that the host's tables give it; a number has one.
func LookupUser(spec string) (*User, error) {
	name, group, given := strings.Cut(spec, ":")
	u := &User{}
	if uid, err := strconv.ParseUint(name, 10, 31); err == nil {
		u.UID, u.GID = int(uid), int(uid)
	} else if err := u.lookup(name); err != nil {
		return nil, err
	}
	if given {
		gid, err := LookupGroup(group)
		if err != nil {
			return nil, err
		}
		u.GID = gid
	}
	if u.Groups == nil {
		u.Groups = []int{u.GID}
	}
	return u, nil
}

func (u *User) lookup(name string) (err error) {
	found, err := user.Lookup(name)
	if err != nil {
		return fmt.Errorf("%q: there is no such user on this host", name)
	}
	if u.UID, err = strconv.Atoi(found.Uid); err != nil {
		return err
	}
	if u.GID, err = strconv.Atoi(found.Gid); err != nil {
		return err
	}
	ids, err := found.GroupIds()
	if err != nil {
		return fmt.Errorf("groups of user %q: %w", name, err)
	}
	for _, id := range ids {
		gid, err := strconv.Atoi(id)
		if err != nil {
			return err
		}
		u.Groups = append(u.Groups, gid)
	}
	return nil
}

// LookupGroup reads a group's name or number.
func LookupGroup(name string) (int, error) {
	if gid, err := strconv.ParseUint(name, 10, 31); err == nil {
		return int(gid), nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, fmt.Errorf("%q: there is no such group on this host", name)
	}
	return strconv.Atoi(g.Gid)
}

// become changes the user, and keeps the permitted capabilities, of which dropCaps leaves what is needed.
func become(n Needs, _ *Report) error {
	u := n.User
	if u == nil {
		return nil
	}
	if u.UID == os.Getuid() && u.GID == os.Getgid() && os.Geteuid() == u.UID {
		return nil
	}
	if err := onAllThreads(unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1, 0); err != nil {
		return fmt.Errorf("PR_SET_KEEPCAPS: %w", err)
	}
	for _, step := range []struct {
		what string
		err  error
	}{
		{"setgroups", syscall.Setgroups(u.Groups)},
		{"setresgid", syscall.Setresgid(u.GID, u.GID, u.GID)},
		{"setresuid", syscall.Setresuid(u.UID, u.UID, u.UID)},
	} {
		if step.err != nil {
			return fmt.Errorf("%s, to user %d, group %d: %w (only root can change the user)", step.what, u.UID, u.GID, step.err)
		}
	}
	return errors.Join(
		onAllThreads(unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 0, 0),
		undumpable())
}
