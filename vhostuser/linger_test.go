package vhostuser_test

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/vhostuser"
)

// Descriptors in messages that nobody has read go with the connection, and whoever sent them may have that wait.
func TestF18CloseWithUnreadDescriptors(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	c, err := vhostuser.NewConnFD(pair[0], vhostuser.ConnOptions{})
	if err != nil {
		t.Fatal(err)
	}
	fd, release := vhosttest.Lingering(t)
	if _, err := unix.SendmsgN(pair[1], []byte{1}, unix.UnixRights(fd), nil, 0); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	start := time.Now()
	c.Close()
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("the close took %v", d)
	}
	release()
}
