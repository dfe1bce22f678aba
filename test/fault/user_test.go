//go:build linux

package fault

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/sysfault"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/virtio"
)

// What opening a socket, connecting it and using it may answer.
var (
	opens    = append([]syscall.Errno{unix.ENOBUFS, unix.EACCES}, none...)
	connects = []syscall.Errno{unix.EAGAIN, unix.EADDRNOTAVAIL, unix.ENETUNREACH, unix.ECONNREFUSED, unix.ENOMEM, unix.EPERM}
	writes   = append([]syscall.Errno{unix.ECONNREFUSED, unix.ENETUNREACH, unix.EPIPE}, sends...)
	reads    = []syscall.Errno{unix.EINTR, unix.EAGAIN, unix.ENOMEM, unix.ECONNREFUSED, unix.ECONNRESET}
)

// TestUser: sockets of the user-mode network fail. The flow that they belong to may end; those that begin afterwards work, and nothing is left of the others.
func TestUser(t *testing.T) {
	require.NotShort(t)
	echo := echoServer(t)
	calls := []int{unix.SYS_SOCKET, unix.SYS_CONNECT, unix.SYS_WRITE, unix.SYS_READ, unix.SYS_SETSOCKOPT, unix.SYS_EPOLL_CTL}
	r := newRig(t, netlab.Host, calls, "user", "")
	u := &userGuest{g: r.guest, udp: echo.udp, tcp: echo.tcp, from: 20000}
	vhosttest.Eventually(t, "the router's address", func() bool { r.alive(); return u.resolve(t) })
	u.works(r)
	for _, c := range []struct {
		rule   sysfault.Rule
		name   string
		errnos []syscall.Errno
	}{
		{sysfault.Rule{Call: unix.SYS_SOCKET}, "socket", opens},
		{sysfault.Rule{Call: unix.SYS_CONNECT}, "connect", connects},
		{sysfault.Rule{Call: unix.SYS_SETSOCKOPT}, "setsockopt", []syscall.Errno{unix.ENOMEM, unix.EPERM, unix.ENOPROTOOPT}},
		{sysfault.Rule{Call: unix.SYS_EPOLL_CTL}, "epoll_ctl", []syscall.Errno{unix.ENOMEM, unix.ENOSPC}},
		{sysfault.Rule{Call: unix.SYS_WRITE, File: "socket"}, "write", writes},
		{sysfault.Rule{Call: unix.SYS_READ, File: "socket"}, "read", reads},
	} {
		for _, errno := range c.errnos {
			t.Run(fmt.Sprintf("%s %s", c.name, unix.ErrnoName(errno)), func(t *testing.T) {
				defer func(outer *testing.T) { r.t = outer }(r.t)
				r.t = t
				c.rule.Errno, c.rule.Skip, c.rule.Count = errno, 2, 9
				r.in.Set(c.rule)
				for i := 0; i < 400 && r.in.Hits() < c.rule.Count; i++ {
					u.tries(t, 8)
					r.alive()
				}
				if r.in.Hits() == 0 {
					t.Errorf("no call failed: vhostd makes none of these")
				}
				r.in.Set()
				if err := r.guest.Transmitq(0).Settle(); err != nil {
					t.Errorf("chains did not come back: %v", err)
				}
				u.works(r)
				r.goesOn()
			})
		}
	}
}

// TestControl: the control socket's calls fail. Who asks is told, or hung up on, in time; the guests notice nothing, and the next one has his answer.
func TestControl(t *testing.T) {
	require.NotShort(t)
	r := newRig(t, netlab.Host, []int{unix.SYS_ACCEPT4, unix.SYS_READ, unix.SYS_WRITE, unix.SYS_EPOLL_CTL}, "null,echo=on", "")
	ask := func() error {
		return exec.Command(program, "stats", "--control", filepath.Join(filepath.Dir(r.socket), "control.sock"), "--json").Run()
	}
	r.works()
	vhosttest.Eventually(t, "an answer", func() bool { return ask() == nil })
	for _, c := range []struct {
		rule   sysfault.Rule
		name   string
		errnos []syscall.Errno
	}{
		{sysfault.Rule{Call: unix.SYS_ACCEPT4}, "accept4", append([]syscall.Errno{unix.ENOBUFS, unix.ECONNABORTED}, none...)},
		{sysfault.Rule{Call: unix.SYS_EPOLL_CTL}, "epoll_ctl", []syscall.Errno{unix.ENOMEM, unix.ENOSPC}},
		{sysfault.Rule{Call: unix.SYS_READ, File: "socket"}, "read", []syscall.Errno{unix.EINTR, unix.ENOMEM, unix.ECONNRESET}},
		{sysfault.Rule{Call: unix.SYS_WRITE, File: "socket"}, "write", []syscall.Errno{unix.EINTR, unix.ENOBUFS, unix.ENOMEM, unix.EPIPE}},
	} {
		for _, errno := range c.errnos {
			t.Run(fmt.Sprintf("%s %s", c.name, unix.ErrnoName(errno)), func(t *testing.T) {
				defer func(outer *testing.T) { r.t = outer }(r.t)
				r.t = t
				c.rule.Errno, c.rule.Count = errno, 1
				r.in.Set(c.rule)
				before := time.Now()
				err := ask()
				if took := time.Since(before); took > patience {
					t.Errorf("the client knew after %v", took)
				}
				t.Logf("the client: %v", err)
				if r.in.Hits() == 0 {
					t.Errorf("no call failed: vhostd makes none of these")
				}
				r.in.Set()
				vhosttest.Eventually(t, "an answer", func() bool { r.alive(); return ask() == nil })
				r.works()
				r.goesOn()
			})
		}
	}
}

// echo is a server of the host, over both protocols.
type echo struct{ udp, tcp uint16 }

func echoServer(t *testing.T) echo {
	t.Helper()
	u, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close(); l.Close() })
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := u.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = u.WriteTo(b[:n], from)
			}
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	return echo{uint16(u.LocalAddr().(*net.UDPAddr).Port), uint16(l.Addr().(*net.TCPAddr).Port)}
}

// userGuest is a guest behind the user-mode network.
type userGuest struct {
	g        *vhosttest.Guest
	udp, tcp uint16 // of the server
	from     uint16 // the last port that was used
	gateway  []byte // its MAC address
}

var guestMAC, guestIP, gatewayIP = []byte{0x52, 0x54, 0, 0x12, 0x34, 0x56}, []byte{10, 0, 2, 15}, []byte{10, 0, 2, 2}

const ethLen, ipLen, protoTCP, protoUDP = 14, 20, 6, 17

func (u *userGuest) frame(t *testing.T, f []byte) {
	t.Helper()
	if err := u.g.Send(0, virtio.NetHdr{}, f, vhosttest.Flat); err != nil {
		t.Fatal(err)
	}
}

// arp asks for the router's address, or answers to it.
func arp(op byte, to []byte) []byte {
	f := make([]byte, 60)
	copy(f, to)
	copy(f[6:], guestMAC)
	copy(f[12:], []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, op})
	copy(f[22:], guestMAC)
	copy(f[28:], guestIP)
	copy(f[38:], gatewayIP)
	return f
}

func (u *userGuest) resolve(t *testing.T) bool {
	u.frame(t, arp(1, bytes.Repeat([]byte{0xff}, 6)))
	return u.recv(t, func([]byte) bool { return u.gateway != nil })
}

// recv takes frames until one is the one that is waited for, or for a while none comes.
func (u *userGuest) recv(t *testing.T, is func(f []byte) bool) bool {
	t.Helper()
	for {
		_, f, err := u.g.Recv(0, 100*time.Millisecond)
		if errors.Is(err, vhosttest.ErrTimeout) {
			return false
		}
		if err != nil {
			t.Fatal(err)
		}
		if f[12] == 8 && f[13] == 6 && f[21] == 1 && bytes.Equal(f[38:42], guestIP) {
			u.frame(t, arp(2, f[22:28]))
		}
		if f[12] == 8 && f[13] == 6 && f[21] == 2 {
			u.gateway = bytes.Clone(f[22:28])
		}
		if is(f) {
			return true
		}
	}
}

// packet is an IPv4 packet to the server, of a flow that is new.
func (u *userGuest) packet(proto byte, to uint16, segment []byte, sum int) []byte {
	if u.from++; u.from < 20000 {
		u.from = 20000
	}
	f := append(make([]byte, ethLen+ipLen), segment...)
	copy(f, u.gateway)
	copy(f[6:], guestMAC)
	f[12] = 8
	ip := f[ethLen:]
	ip[0], ip[8], ip[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	copy(ip[12:], guestIP)
	copy(ip[16:], gatewayIP)
	binary.BigEndian.PutUint16(ip[10:], offload.Checksum(0, ip[:ipLen]))
	s := ip[ipLen:]
	binary.BigEndian.PutUint16(s, u.from)
	binary.BigEndian.PutUint16(s[2:], to)
	var c offload.Sum
	c.Add(ip[12:20])
	c.AddWord(uint16(proto))
	c.AddWord(uint16(len(s)))
	c.Add(s)
	binary.BigEndian.PutUint16(s[sum:], ^c.Fold())
	return f
}

func (u *userGuest) datagram() []byte {
	return u.packet(protoUDP, u.udp, []byte("\x00\x00\x00\x00\x00\x10\x00\x00answered"), 6)
}
func (u *userGuest) syn() []byte {
	return u.packet(protoTCP, u.tcp, append(make([]byte, 12), 0x50, 2, 0xff, 0xff, 0, 0, 0, 0), 16)
}

// tries begins n flows of each protocol, whatever becomes of them.
func (u *userGuest) tries(t *testing.T, n int) {
	t.Helper()
	for range n {
		u.frame(t, u.datagram())
		u.frame(t, u.syn())
	}
	u.recv(t, func([]byte) bool { return false })
}

// works waits until flows of both protocols are answered.
func (u *userGuest) works(r *rig) {
	r.t.Helper()
	for name, begin := range map[string]func() []byte{"UDP": u.datagram, "TCP": u.syn} {
		answered := func() bool {
			r.alive()
			f := begin()
			u.frame(r.t, f)
			from := f[ethLen+ipLen : ethLen+ipLen+2]
			return u.recv(r.t, func(got []byte) bool {
				return len(got) > ethLen+ipLen+13 && got[ethLen+9] == f[ethLen+9] && bytes.Equal(got[ethLen+ipLen+2:][:2], from) &&
					(name == "UDP" || got[ethLen+ipLen+13] == 0x12) // SYN and ACK
			})
		}
		vhosttest.Eventually(r.t, name+" is answered", answered)
	}
}
