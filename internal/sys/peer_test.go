package sys

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
)

// TestPeerOf: both ends of a connection are told who is at the other.
func TestPeerOf(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	groups, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(groups)
	for name, c := range map[string]*net.UnixConn{"client's": client, "server's": server} {
		p, err := PeerOf(c)
		slices.Sort(p.Groups)
		if err != nil || p.PID != os.Getpid() || p.UID != os.Geteuid() || p.GID != os.Getegid() || !slices.Equal(p.Groups, groups) {
			t.Errorf("%s peer is %+v (%v), want ourselves with groups %v", name, p, err, groups)
		}
	}
}

// TestManyPeerGroups: more than the first guess has room for.
func TestManyPeerGroups(t *testing.T) {
	require.Root(t, "root") // who joins groups
	old, err := unix.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	want := make([]int, 200)
	for i := range want {
		want[i] = 1000 + i
	}
	if err := unix.Setgroups(want); err != nil {
		t.Fatal(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err := errors.Join(err, unix.Setgroups(old)); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	p, err := peerOf(pair[0])
	if err != nil || !slices.Equal(p.Groups, want) {
		t.Errorf("%d groups (%v), want %d", len(p.Groups), err, len(want))
	}
}

func TestAllowed(t *testing.T) {
	p := Peer{PID: 7, UID: 107, GID: 108, Groups: []int{109}}
	for _, c := range []struct {
		allowed Allowed
		ok      bool
	}{
		{Allowed{}, true},
		{Allowed{UIDs: []int{0, 107}}, true},
		{Allowed{UIDs: []int{0}}, false},
		{Allowed{UIDs: []int{108}, GIDs: []int{107}}, false},
		{Allowed{UIDs: []int{0}, GIDs: []int{108}}, true},
		{Allowed{GIDs: []int{109}}, true},
		{Allowed{GIDs: []int{0}}, false},
	} {
		if err := c.allowed.Admit(p); (err == nil) != c.ok {
			t.Errorf("%+v: %v, want admitted %v", c.allowed, err, c.ok)
		}
	}
}
