//go:build linux

package fault

import (
	"context"
	"fmt"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/internal/sysfault"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/test/vm/daemon"
	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/vhostuser"
)

// TestWait: the kernel has no memory for a worker's wait, or a signal comes. Nobody notices.
func TestWait(t *testing.T) {
	require.NotShort(t)
	r := newRig(t, netlab.Host, []int{unix.SYS_PPOLL}, "null,echo=on", "")
	r.works()
	for _, errno := range []syscall.Errno{unix.EINTR, unix.ENOMEM} {
		t.Run(unix.ErrnoName(errno), func(t *testing.T) {
			r.strike(t, sysfault.Rule{Call: unix.SYS_PPOLL, Errno: errno, Count: 200})
		})
	}
}

// none: the descriptors, or the memory, of the process or of the host are all in use.
var none = []syscall.Errno{unix.EMFILE, unix.ENFILE, unix.ENOMEM}

// TestSession: what a session needs of the host cannot be had. The front-end is told, or loses its connection, in time; when the host has it again the next one
// is served.
func TestSession(t *testing.T) {
	require.NotShort(t)
	cases := []struct {
		rule   sysfault.Rule
		name   string
		errnos []syscall.Errno
	}{
		{sysfault.Rule{Call: unix.SYS_ACCEPT4}, "accept4", append([]syscall.Errno{unix.ENOBUFS, unix.ECONNABORTED, unix.EPERM}, none...)},
		{sysfault.Rule{Call: unix.SYS_EPOLL_CTL}, "epoll_ctl", []syscall.Errno{unix.ENOMEM, unix.ENOSPC}},
		{sysfault.Rule{Call: unix.SYS_RECVMSG, File: "socket"}, "recvmsg", []syscall.Errno{unix.ENOMEM, unix.ECONNRESET, unix.EINTR}},
		{sysfault.Rule{Call: unix.SYS_SENDMSG, File: "socket"}, "sendmsg", []syscall.Errno{unix.ENOMEM, unix.ENOBUFS, unix.EPIPE, unix.EINTR}},
		{sysfault.Rule{Call: unix.SYS_MMAP, File: "memfd", Arg: 4}, "mmap", []syscall.Errno{unix.ENOMEM, unix.EAGAIN, unix.EACCES, unix.EPERM, unix.ENODEV}},
		{sysfault.Rule{Call: unix.SYS_EVENTFD2}, "eventfd2", none},
		{sysfault.Rule{Call: unix.SYS_STATX}, "statx", []syscall.Errno{unix.ENOMEM, unix.EACCES}},
		{sysfault.Rule{Call: unix.SYS_FSTAT, File: "memfd"}, "fstat", []syscall.Errno{unix.ENOMEM, unix.EIO}},
		{sysfault.Rule{Call: unix.SYS_FCNTL}, "fcntl", []syscall.Errno{unix.EACCES, unix.EINVAL}},
		{sysfault.Rule{Call: unix.SYS_MADVISE}, "madvise", []syscall.Errno{unix.ENOMEM, unix.EAGAIN, unix.EINVAL}},
	}
	var calls []int
	for _, c := range cases {
		calls = append(calls, c.rule.Call)
	}
	r := newRig(t, netlab.Host, calls, "null,echo=on", "")
	r.works()
	r.guest.Close()
	before := r.resources()
	for _, c := range cases {
		for _, errno := range c.errnos {
			t.Run(fmt.Sprintf("%s %s", c.name, unix.ErrnoName(errno)), func(t *testing.T) {
				c.rule.Errno = errno
				r.attempts(t, c.rule)
			})
		}
	}
	vhosttest.Eventually(t, "nothing is left of any attempt", func() bool {
		now := r.resources()
		return now.Leak(before) == "" && now.Memory <= before.Memory
	})
}

// resources is what the daemon holds once the last front-end is gone.
func (r *rig) resources() daemon.Resources {
	r.t.Helper()
	vhosttest.Eventually(r.t, "a front-end is served", func() bool { return attempt(r.t, r.socket) == nil })
	got, err := daemon.ResourcesOf(r.cmd.Process.Pid)
	if err != nil {
		r.t.Fatal(err)
	}
	return got
}

// attempts connects while calls fail, the first in one attempt, the second in the next and so on, and then without.
func (r *rig) attempts(t *testing.T, rule sysfault.Rule) {
	defer func(outer *testing.T) { r.t = outer }(r.t)
	r.t = t
	failed, hits := 0, 0
	for rule.Skip = 0; rule.Skip < 4; rule.Skip++ {
		rule.Count = 1 + rule.Skip
		r.in.Set(rule)
		before := time.Now()
		if err := attempt(t, r.socket); err != nil {
			failed++
		}
		if took := time.Since(before); took > patience {
			t.Errorf("the front-end knew after %v", took)
		}
		hits += r.in.Hits()
		r.alive()
	}
	if hits == 0 {
		t.Errorf("no call failed: vhostd makes none of these")
	}
	t.Logf("%d calls failed, and %d of 4 attempts", hits, failed)
	r.in.Set()
	var err error
	vhosttest.Eventually(t, "a front-end is served", func() bool {
		err = attempt(t, r.socket)
		r.alive()
		return err == nil
	})
	r.goesOn()
}

// patience bounds an attempt: several times what a front-end is left waiting by design, which is a second after a failed accept.
const patience = 15 * time.Second

// attempt is a front-end that sets up a queue and takes it down again.
func attempt(t *testing.T, path string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	fe, err := vhostuser.Dial(ctx, path)
	if err != nil {
		return err
	}
	defer fe.Close()
	fe.ReplyTimeout = patience
	features, err := fe.GetFeatures()
	if err != nil {
		return err
	}
	protocol, err := fe.GetProtocolFeatures()
	if err != nil {
		return err
	}
	ram := vhosttest.NewRegion(t, vhosttest.RegionSpec{Size: 2 << 20})
	defer ram.Close()
	kick, err := sys.NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	defer kick.Close()
	for _, step := range []func() error{
		func() error { return fe.SetProtocolFeatures(protocol) },
		fe.SetOwner,
		func() error { return fe.SetFeatures(features) },
		func() error { return fe.SetMemTable([]vhostuser.MemoryRegion{ram.MemoryRegion}, []int{ram.FD}) },
		func() error { return fe.SetVringNum(0, 64) },
		func() error { return fe.SetVringBase(0, 0) },
		func() error {
			return fe.SetVringAddr(vhostuser.VringAddr{Index: 0, Desc: ram.UserAddr, Avail: ram.UserAddr + 4096, Used: ram.UserAddr + 8192})
		},
		func() error { return fe.SetVringCall(0, kick.FD()) },
		func() error { return fe.SetVringKick(0, kick.FD()) },
		func() error { return fe.SetVringEnable(0, true) },
		func() error { _, err := fe.GetVringBase(0); return err },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}
