package udp_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/udp"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

func TestMain(m *testing.M) { vhosttest.Main(m) }

const patience = vhosttest.Patience

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// far is a plain UDP socket on the loopback interface: the other end of a dgram device.
type far struct {
	testing.TB
	conn *net.UDPConn
	to   netip.AddrPort
	buf  [1 << 16]byte
}

func newFar(t testing.TB) *far {
	t.Helper()
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	must(t, conn.SetReadBuffer(4<<20))
	return &far{TB: t, conn: conn}
}

func (f *far) addr() netip.AddrPort { return f.conn.LocalAddr().(*net.UDPAddr).AddrPort() }

func (f *far) recv() []byte {
	f.Helper()
	must(f, f.conn.SetReadDeadline(time.Now().Add(patience)))
	n, err := f.conn.Read(f.buf[:])
	must(f, err)
	return f.buf[:n]
}

func (f *far) send(b []byte) {
	f.Helper()
	if _, err := f.conn.WriteToUDPAddrPort(b, f.to); err != nil {
		f.Fatalf("sending %d bytes: %v", len(b), err)
	}
}

// freePort is a port of the loopback interface that nobody uses at the moment.
func freePort(t testing.TB) netip.AddrPort {
	t.Helper()
	f := newFar(t)
	defer f.conn.Close()
	return f.addr()
}

func TestDgram(t *testing.T) {
	for _, options := range []string{"", ",zerocopy=on", ",zerocopy=off", ",zerocopy-min=500,zerocopy-pending=5", msg + ",zerocopy=on", msg + ",zerocopy-min=500,zerocopy-pending=5"} {
		t.Run("options"+options, func(t *testing.T) {
			netdevtest.Run(t, func(t *testing.T) netdevtest.Harness {
				f := newFar(t)
				f.to = freePort(t)
				o, err := udp.ParseOptions(fmt.Sprintf("dgram:local=%s,remote=%s%s", f.to, f.addr(), options))
				must(t, err)
				d, err := udp.Open(o)
				if o.ZeroCopy == netdev.On && o.Engine != udp.MsgZeroCopy && (errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM)) {
					require.Skip(t, "uring", "%v", err)
				}
				must(t, err)
				return netdevtest.Harness{
					Device: d, MaxFrame: 65507,
					Capture: func() (virtio.NetHdr, []byte) { return virtio.NetHdr{}, f.recv() },
					Inject:  f.send,
					Close:   func() { f.conn.Close() },
				}
			})
		})
	}
}

// sent counts what became of frames.
type sent struct {
	outcomes chan zerocopy.Outcome
}

func newSent() *sent { return &sent{make(chan zerocopy.Outcome, 1<<16)} }

func (s *sent) buffer(frags ...[]byte) *zerocopy.Buffer {
	u := zerocopy.Ubuf{Callback: func(_ *zerocopy.Ubuf, o zerocopy.Outcome) { s.outcomes <- o }}
	return zerocopy.NewUbufBuffer(u, virtio.NetHdr{}, frags...)
}

// next waits for the next release.
func (s *sent) next(t testing.TB) zerocopy.Outcome {
	t.Helper()
	select {
	case o := <-s.outcomes:
		return o
	case <-time.After(patience):
		t.Fatal("no frame was released")
	}
	return 0
}

func (s *sent) want(t testing.TB, outcomes ...zerocopy.Outcome) {
	t.Helper()
	for i, want := range outcomes {
		if got := s.next(t); got != want {
			t.Fatalf("release %d: %v, want %v", i, got, want)
		}
	}
}

// none checks that nothing is released for a while.
func (s *sent) none(t testing.TB) {
	t.Helper()
	select {
	case o := <-s.outcomes:
		t.Fatalf("released as %v while the kernel holds the frame", o)
	case <-time.After(20 * time.Millisecond):
	}
}
