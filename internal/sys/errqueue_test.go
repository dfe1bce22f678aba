package sys

import (
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestErrorQueue: sends with MSG_ZEROCOPY to this host are told of by number, over IPv4 and IPv6, as copied.
func TestErrorQueue(t *testing.T) {
	for _, local := range []string{"127.0.0.1", "::1"} {
		a := netip.MustParseAddr(local)
		family, bind := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
		if a.Is6() {
			family, bind = unix.AF_INET6, &unix.SockaddrInet6{Addr: a.As16()}
		}
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			defer unix.Close(fd)
			err = unix.Bind(fd, bind)
		}
		if a.Is6() && (err == unix.EADDRNOTAVAIL || err == unix.EAFNOSUPPORT) {
			t.Logf("no IPv6 here: %v", err)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1); err != nil {
			t.Fatal(err)
		}
		name, err := unix.Getsockname(fd)
		if err != nil {
			t.Fatal(err)
		}
		port := 0
		switch n := name.(type) {
		case *unix.SockaddrInet4:
			port = n.Port
		case *unix.SockaddrInet6:
			port = n.Port
		}
		checkErrorQueue(t, fd, NewSockaddr(netip.AddrPortFrom(a, uint16(port)), 0))
	}
}

func checkErrorQueue(t *testing.T, fd int, to Sockaddr) {
	t.Helper()
	var m Msgs
	const n = 5
	for range n {
		m.Begin(&to)
		m.Add(make([]byte, 1000))
	}
	for i := 0; i < n; {
		sent, errno := m.SendPages(fd, i, n)
		if errno != 0 {
			t.Fatal(errno)
		}
		i += sent
	}
	var q ErrorQueue
	seen := map[uint32]bool{}
	for end := time.Now().Add(20 * time.Second); len(seen) < n && time.Now().Before(end); {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		if _, err := unix.Poll(fds, 1000); err != nil && err != unix.EINTR {
			t.Fatal(err)
		}
		list, _, errno := q.Recv(fd)
		if errno != 0 {
			t.Fatal(errno)
		}
		for _, c := range list {
			if !c.Copied || c.Hi >= n || c.Lo > c.Hi {
				t.Errorf("%+v of %d sends on the loopback interface", c, n)
			}
			for i := c.Lo; i <= c.Hi; i++ {
				seen[i] = true
			}
		}
	}
	if len(seen) != n {
		t.Errorf("%d of %d sends are complete", len(seen), n)
	}
	if list, more, errno := q.Recv(fd); len(list) != 0 || more || errno != 0 {
		t.Errorf("an empty queue has %v, %v, %v", list, more, errno)
	}
}

func TestCompletionsAmongOthers(t *testing.T) {
	control := func(level, typ int32, data []byte) []byte {
		b := make([]byte, unix.CmsgSpace(len(data)))
		b[0] = byte(unix.CmsgLen(len(data)))
		b[8], b[12] = byte(level), byte(typ)
		copy(b[unix.CmsgLen(0):], data)
		return b
	}
	report := make([]byte, 32)
	report[4], report[6], report[8], report[12] = unix.SO_EE_ORIGIN_ZEROCOPY, unix.SO_EE_CODE_ZEROCOPY_COPIED, 3, 9
	icmp := make([]byte, 32)
	icmp[4] = unix.SO_EE_ORIGIN_ICMP
	noise := append(control(unix.SOL_SOCKET, unix.SCM_TIMESTAMP, make([]byte, 16)), control(unix.SOL_IP, unix.IP_RECVERR, icmp)...)
	if c, ok := completions(noise); ok {
		t.Errorf("found %+v where there is none", c)
	}
	if c, ok := completions(append(noise, control(unix.SOL_IPV6, unix.IPV6_RECVERR, report)...)); !ok || c != (Completions{3, 9, true}) {
		t.Errorf("found %+v, %v", c, ok)
	}
	for n := range report[:16] {
		if c, ok := completions(control(unix.SOL_IP, unix.IP_RECVERR, report[:n])); ok {
			t.Errorf("found %+v in %d bytes", c, n)
		}
	}
}
