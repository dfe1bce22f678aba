package sys

import (
	"fmt"
	"net"
	"slices"

	"golang.org/x/sys/unix"
)

// Peer is who is at the other end of a connected UNIX socket: who connected, or to the one who connected, who listened.
type Peer struct {
	PID    int // 0: in a PID namespace that this process does not see
	UID    int
	GID    int
	Groups []int // supplementary ones
}

// String tells who it is, for a log.
func (p Peer) String() string {
	return fmt.Sprintf("process %d of user %d, group %d", p.PID, p.UID, p.GID)
}

// PeerOf asks the kernel, which noted who it was when the connection was made. What the process has become since does not count.
func PeerOf(c *net.UnixConn) (p Peer, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return p, err
	}
	cerr := raw.Control(func(fd uintptr) { p, err = peerOf(int(fd)) })
	if err == nil {
		err = cerr
	}
	return p, err
}

func peerOf(fd int) (Peer, error) {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return Peer{}, fmt.Errorf("SO_PEERCRED: %w", err)
	}
	groups, err := peerGroups(fd)
	if err != nil {
		return Peer{}, fmt.Errorf("SO_PEERGROUPS: %w", err)
	}
	return Peer{PID: int(cred.Pid), UID: int(cred.Uid), GID: int(cred.Gid), Groups: groups}, nil
}

// Allowed are users and groups, by number. The zero value allows everybody.
type Allowed struct {
	UIDs, GIDs []int
}

// Admit returns an error that tells who p is, unless p is one of the users or in one of the groups.
func (a Allowed) Admit(p Peer) error {
	if len(a.UIDs)+len(a.GIDs) == 0 || slices.Contains(a.UIDs, p.UID) || slices.Contains(a.GIDs, p.GID) {
		return nil
	}
	for _, g := range p.Groups {
		if slices.Contains(a.GIDs, g) {
			return nil
		}
	}
	return fmt.Errorf("%v: not among the users and groups that may connect", p)
}
