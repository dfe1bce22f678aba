package sys

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSockaddr(t *testing.T) {
	for _, a := range []string{"10.1.2.3:4789", "[fd00::1]:6081", "0.0.0.0:0"} {
		want := netip.MustParseAddrPort(a)
		s := NewSockaddr(want, 0)
		if got := s.AddrPort(); got != want {
			t.Errorf("%v became %v", want, got)
		}
		p := s.WithPort(99)
		if got := p.AddrPort(); got != netip.AddrPortFrom(want.Addr(), 99) || s.AddrPort() != want {
			t.Errorf("%v with port 99 is %v", want, got)
		}
	}
	mapped := NewSockaddr(netip.MustParseAddrPort("[::ffff:10.1.2.3]:7"), 0)
	if got := mapped.AddrPort(); got != netip.MustParseAddrPort("10.1.2.3:7") {
		t.Errorf("a mapped address became %v", got)
	}
	var none Sockaddr
	if none.AddrPort().IsValid() {
		t.Errorf("the zero address is %v", none.AddrPort())
	}
}

// TestMsgsSkipsARefusedOne: the error of a datagram in the middle is told when it is the first.
func TestMsgsSkipsARefusedOne(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	to := NewSockaddr(netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(name.(*unix.SockaddrInet4).Port)), 0)
	var m Msgs
	for range 2 { // its memory serves again
		m.Reset()
		for _, n := range []int{1, 1 << 16, 3, 0} {
			m.Begin(&to)
			m.Add(make([]byte, n/2))
			m.Add(make([]byte, n-n/2))
		}
		if n, errno := m.Send(fd, 0); n != 1 || errno != 0 {
			t.Fatalf("sent %d, %v", n, errno)
		}
		if n, errno := m.Send(fd, 1); n != 0 || errno != unix.EMSGSIZE {
			t.Fatalf("sent %d, %v, want EMSGSIZE", n, errno)
		}
		if n, errno := m.Send(fd, 2); n != 2 || errno != 0 {
			t.Fatalf("sent %d, %v", n, errno)
		}
		in := NewInbox(8, 2)
		if n, errno := in.Recv(fd); n != 3 || errno != 0 {
			t.Fatalf("received %d, %v", n, errno)
		}
		for i, want := range []int{1, 2, 0} { // cut at 2
			if b, from := in.Datagram(i); len(b) != want || *from != to {
				t.Errorf("datagram %d: %d bytes from %v", i, len(b), from.AddrPort())
			}
		}
		if n, errno := in.Recv(fd); n != 0 || errno != unix.EAGAIN {
			t.Errorf("received %d, %v from an empty socket", n, errno)
		}
	}
}

func TestPageOffset(t *testing.T) {
	b := make([]byte, 3*PageSize)
	first := PageSize - PageOffset(b)
	for _, i := range []int{0, 1, PageSize - 1, PageSize, PageSize + 7} {
		if got := PageOffset(b[first+i:]); got != i%PageSize {
			t.Errorf("%d bytes behind a page's start: %d", i, got)
		}
	}
}
