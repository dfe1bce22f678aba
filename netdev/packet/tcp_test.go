package packet

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

const (
	stackName = "stack0"
	guestAddr = "10.7.0.2"
	farAddr   = "10.7.0.1"
)

// stack is a guest whose TCP is the kernel's: behind a tap, from which its frames go to the device and the other way round. It makes
// large segments and partial checksums, and takes them as far as it is told to.
type stack struct {
	*guest
	tap            int
	buf            []byte
	partial, large int // frames to the guest with a partial checksum, and to be cut
	sentLarge      int
	stop           func()
	batch          [1]*zerocopy.Buffer
}

// newStack makes the guest, which takes what its features f say.
func newStack(t *testing.T, d *Device, f virtio.Features, tunOffloads uint) *stack {
	t.Helper()
	fd, err := unix.Open(sys.TunPath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	must(t, err)
	_, err = sys.TunSetIff(fd, stackName, sys.TunTap|sys.TunNoPI|sys.TunVnetHdr)
	must(t, err)
	must(t, sys.TunSetVnetHdrSize(fd, virtio.NetHdrSizeLegacy))
	must(t, sys.TunSetOffload(fd, tunOffloads))
	link := netdevtest.Link(t, stackName)
	must(t, netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(guestAddr).To4(), Mask: net.CIDRMask(24, 32)}}))
	must(t, netlink.LinkSetUp(link))
	s := &stack{guest: newGuest(t, d, 0, f), tap: fd, buf: make([]byte, 1<<17)}
	quit := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() { s.pump(quit) })
	s.stop = sync.OnceFunc(func() {
		close(quit)
		done.Wait()
		unix.Close(fd)
	})
	t.Cleanup(s.stop)
	return s
}

// pump moves frames both ways.
func (s *stack) pump(quit chan struct{}) {
	for {
		select {
		case <-quit:
			return
		default:
		}
		for s.toStack() || s.fromStack() {
		}
		fds := []unix.PollFd{{Fd: int32(s.tap), Events: unix.POLLIN}, {Fd: int32(s.q.RecvFD()), Events: unix.POLLIN}}
		_, _ = unix.Poll(fds, 20)
	}
}

func (s *stack) toStack() bool {
	hdr, b := s.take()
	if b == nil {
		return false
	}
	if hdr.Flags&virtio.NetHdrNeedsCsum != 0 {
		s.partial++
	}
	if hdr.GSOType != 0 {
		s.large++
	}
	out := make([]byte, virtio.NetHdrSizeLegacy, virtio.NetHdrSizeLegacy+len(b))
	hdr.Encode(out)
	if _, err := unix.Write(s.tap, append(out, b...)); err != nil {
		s.Errorf("a frame of %d bytes with %+v for the stack: %v", len(b), hdr, err)
	}
	return true
}

func (s *stack) fromStack() bool {
	n, err := unix.Read(s.tap, s.buf)
	if err != nil {
		return false
	}
	hdr, f := virtio.DecodeNetHdr(s.buf[:virtio.NetHdrSizeLegacy]), s.buf[virtio.NetHdrSizeLegacy:n]
	if hdr.GSOType != 0 {
		s.sentLarge++
	}
	s.batch[0] = zerocopy.NewBuffer(hdr, f)
	for s.q.Send(s.batch[:]) == 0 {
		netdevtest.Poll(s, s.q.SendFD(), unix.POLLOUT, time.Second)
	}
	s.q.Reap()
	return true
}

// farStack moves the far end to a namespace of its own with an address, and returns a listener there.
func farStack(t *testing.T) net.Listener {
	t.Helper()
	type result struct {
		l   net.Listener
		err error
	}
	made, moved, listening := make(chan netns.NsHandle, 1), make(chan struct{}), make(chan result, 1)
	go func() {
		runtime.LockOSThread() // and not unlocked: the thread ends with the goroutine
		h, err := netns.New()
		if err != nil {
			t.Error(err)
		}
		made <- h
		<-moved
		l, err := func() (net.Listener, error) {
			link, err := netlink.LinkByName(farName)
			if err != nil {
				return nil, err
			}
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(farAddr).To4(), Mask: net.CIDRMask(24, 32)}}
			if err := netlink.AddrAdd(link, addr); err != nil {
				return nil, err
			}
			if err := netlink.LinkSetUp(link); err != nil {
				return nil, err
			}
			return net.Listen("tcp4", farAddr+":5000")
		}()
		listening <- result{l, err}
	}()
	h := <-made
	err := netlink.LinkSetNsFd(netdevtest.Link(t, farName), int(h))
	h.Close()
	close(moved)
	r := <-listening
	must(t, err)
	must(t, r.err)
	netdevtest.AwaitRunning(t, devName)
	t.Cleanup(func() { r.l.Close() })
	return r.l
}

// TestTCP: the kernel's TCP on both ends, with what the guest's side takes: everything, partial checksums, nothing.
func TestTCP(t *testing.T) {
	const tso = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	for _, c := range []struct {
		name    string
		options string
		f       virtio.Features
		tun     uint
		large   bool // segments to be cut, both ways
	}{
		{"tso", "", largeRecv, tso, true},
		{"csum", "", plain | virtio.FNetGuestCsum, unix.TUN_F_CSUM, false},
		{"none", "", plain, 0, false},
		{"queues", ",queues=2", largeRecv, tso, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			inNetns(t)
			l := farStack(t)
			d := open(t, "packet:"+devName+c.options)
			must(t, d.SetPairs(1))
			s := newStack(t, d, c.f, c.tun)
			near, far := connect(t, l)
			data := make([]byte, 8<<20)
			rand.NewChaCha8([32]byte{1}).Read(data)
			transfer(t, near, far, data)
			transfer(t, far, near, data)
			near.Close()
			far.Close()
			if got := d.Queue(0).Counters(); got.SendDropped > 0 {
				t.Errorf("%+v", got)
			}
			s.stop()
			if s.large > 0 != c.large || s.sentLarge > 0 != c.large {
				t.Errorf("%d frames to be cut for the guest, %d from it; want them: %v", s.large, s.sentLarge, c.large)
			}
			if partial := c.f.Has(virtio.FNetGuestCsum); s.partial > 0 != partial {
				t.Errorf("%d frames with a partial checksum for the guest; want them: %v", s.partial, partial)
			}
		})
	}
}

// connect returns the ends of a connection from the guest's stack to l.
func connect(t *testing.T, l net.Listener) (near, far net.Conn) {
	t.Helper()
	near, err := net.DialTimeout("tcp4", l.Addr().String(), testTimeout)
	must(t, err)
	t.Cleanup(func() { near.Close() })
	far, err = l.Accept()
	must(t, err)
	t.Cleanup(func() { far.Close() })
	for _, c := range []net.Conn{near, far} {
		must(t, c.SetDeadline(time.Now().Add(testTimeout)))
	}
	return near, far
}

func transfer(t *testing.T, from, to net.Conn, data []byte) {
	t.Helper()
	failed := make(chan error, 1)
	go func() {
		_, err := from.Write(data)
		failed <- err
	}()
	got := make([]byte, len(data))
	n, err := io.ReadFull(to, got)
	if err := fmt.Sprint(err, <-failed); err != "<nil> <nil>" {
		t.Fatalf("after %d bytes: %s", n, err)
	}
	if !bytes.Equal(got, data) {
		t.Error("the stream arrives changed")
	}
}
