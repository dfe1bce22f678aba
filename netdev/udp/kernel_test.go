package udp_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/udp"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// suite picks the frames of netdevtest.
func suite(b []byte) bool {
	switch binary.BigEndian.Uint16(b[12:]) {
	case netdevtest.EtherType:
		return true
	case 0x0800:
		return len(b) >= 38 && binary.BigEndian.Uint16(b[34:]) == netdevtest.Port
	case 0x86dd:
		return len(b) >= 58 && binary.BigEndian.Uint16(b[54:]) == netdevtest.Port
	}
	return false
}

// TestKernelTunnels has the device talk to the kernel's own tunnels.
func TestKernelTunnels(t *testing.T) {
	for _, kind := range []string{"vxlan", "geneve"} {
		for _, options := range []string{"", ",zerocopy=on", ",zerocopy=off", msg + ",zerocopy=on"} {
			t.Run(kind+options, func(t *testing.T) {
				l := newLab(t, 20000)
				l.peer(kind, "tun0", 16000)
				netdevtest.Run(t, func(t *testing.T) netdevtest.Harness {
					l := &lab{l.For(t)}
					p := l.Wire(l.There, "tun0")
					return netdevtest.Harness{
						Device: l.device(fmt.Sprintf("%s:vni=42,local=%s,remote=%s%s", kind, hereIP, thereIP, options)), MaxFrame: 16000 + etherLen,
						Capture: func() (virtio.NetHdr, []byte) { return virtio.NetHdr{}, p.Recv(suite) },
						Inject:  p.Send,
						Close:   p.Close,
					}
				})
			})
		}
	}
}

// pump moves frames between a tap, whose kernel is the guest, and a device, until stop says so.
func pump(t *testing.T, tap int, d *udp.Device, stop func() bool) {
	t.Helper()
	const f = virtio.FVersion1 | virtio.FNetMrgRxbuf
	g := netdevtest.NewGuest(t, 256, f)
	p, q := zerocopy.NewPosted(g.Ring, f), d.Queue(0)
	fds := []unix.PollFd{{Fd: int32(tap), Events: unix.POLLIN}, {Fd: int32(q.RecvFD()), Events: unix.POLLIN}}
	for !stop() {
		if _, err := unix.Poll(fds, 10); err != nil && err != unix.EINTR {
			t.Fatal(err)
		}
		for range 64 {
			page := make([]byte, 20000) // of its own: the kernel may have it for long
			n, err := unix.Read(tap, page)
			if err != nil {
				break
			}
			b := []*zerocopy.Buffer{zerocopy.NewBuffer(virtio.NetHdr{}, page[:14], page[14:n])}
			for q.Send(b) == 0 {
				if _, err := unix.Poll([]unix.PollFd{{Fd: int32(q.SendFD()), Events: unix.POLLOUT}}, -1); err != nil && err != unix.EINTR {
					t.Fatal(err)
				}
			}
		}
		q.Reap()
		if free := g.Driver.Free(); free > 0 {
			g.Post(free, 20000)
		}
		if _, _, err := q.Recv(p, 64); err != nil {
			t.Fatal(err)
		}
		for {
			_, b := g.Take()
			if b == nil {
				break
			}
			if _, err := unix.Write(tap, b); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestTCPOverKernelVXLAN: the guest pings a host behind the kernel's vxlan, and they move data both ways, over frames that are sent by page.
func TestTCPOverKernelVXLAN(t *testing.T) {
	for _, options := range []string{",zerocopy=on", ",zerocopy=off", "", msg + ",zerocopy=on"} {
		t.Run("options"+options, func(t *testing.T) {
			l := newLab(t, 9100)
			l.peer("vxlan", "tun0", 9000)
			l.Run("ip -n " + l.There + " address add 192.168.77.2/24 dev tun0")
			// A cable between namespaces carries inner checksums that are not computed: a network card would have done it.
			l.Run("ip netns exec " + l.There + " " + require.Tool(t, "netns", "ethtool") + " -K tun0 tx off gso off tso off")
			d := l.device("vxlan:vni=42,local=" + hereIP + ",remote=" + thereIP + options)
			defer func() { must(t, d.Close()) }()
			if mtu := d.Capabilities().MTU; mtu != 9050 {
				t.Errorf("MTU %d over a cable of 9100 bytes", mtu)
			}
			var tap int
			l.In(l.Here, func() (err error) {
				if tap, err = unix.Open(sys.TunPath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
					_, err = sys.TunSetIff(tap, "guest0", sys.TunTap|sys.TunNoPI)
				}
				return err
			})
			defer unix.Close(tap)
			l.Run("ip -n " + l.Here + " address add 192.168.77.1/24 dev guest0")
			l.Run("ip -n " + l.Here + " link set guest0 mtu 9000 up")
			done := make(chan error, 1)
			go func() { done <- l.traffic() }()
			var err error
			ended := false
			pump(t, tap, d, func() bool {
				select {
				case err = <-done:
					ended = true
				default:
				}
				return ended
			})
			must(t, err)
			if st := d.Stats(); strings.Contains(options, "zerocopy=on") && st.ByCopy+st.ByPage < 100 {
				t.Errorf("few frames by page: %+v", st)
			}
		})
	}
}

// ping sends echo requests of n bytes, and wants them back.
func (l *lab) ping(n int) error {
	var c net.PacketConn
	if err := l.Enter(l.Here, func() (err error) { c, err = net.ListenPacket("ip4:icmp", "192.168.77.1"); return err }); err != nil {
		return err
	}
	defer c.Close()
	for seq := range byte(5) {
		request := append([]byte{8, 0, 0, 0, 7, 7, 0, seq}, netdevtest.Frame(n, uint32(seq))...)
		binary.BigEndian.PutUint16(request[2:], offload.Checksum(0, request))
		if _, err := c.WriteTo(request, &net.IPAddr{IP: net.IPv4(192, 168, 77, 2)}); err != nil {
			return fmt.Errorf("ping: %w", err)
		}
		_ = c.SetReadDeadline(time.Now().Add(patience))
		reply := make([]byte, 1<<16)
		m, _, err := c.ReadFrom(reply)
		if err != nil || !bytes.Equal(reply[4:m], request[4:]) || reply[0] != 0 {
			return fmt.Errorf("ping %d: %d bytes back, want %d, or others: %w", seq, m, len(request), err)
		}
	}
	return nil
}

// traffic pings, and sends a stream each way.
func (l *lab) traffic() error {
	for _, n := range []int{20, 8000} {
		if err := l.ping(n); err != nil {
			return err
		}
	}
	const n = 8 << 20
	data := make([]byte, n)
	for i, x := 0, uint32(1); i < n; i++ {
		x = x*1664525 + 1013904223
		data[i] = byte(x >> 24)
	}
	var ln net.Listener
	if err := l.Enter(l.There, func() (err error) { ln, err = net.Listen("tcp", "192.168.77.2:7777"); return err }); err != nil {
		return err
	}
	defer ln.Close()
	var conn net.Conn
	if err := l.Enter(l.Here, func() (err error) { conn, err = net.DialTimeout("tcp", "192.168.77.2:7777", patience); return err }); err != nil {
		return err
	}
	defer conn.Close()
	far, err := ln.Accept()
	if err != nil {
		return err
	}
	defer far.Close()
	errs := make(chan error, 2)
	for _, way := range [][2]net.Conn{{conn, far}, {far, conn}} {
		go func() {
			_, err := way[0].Write(data)
			errs <- err
		}()
		got := make([]byte, n)
		deadline := time.Now().Add(3 * patience)
		_ = way[1].SetReadDeadline(deadline)
		if _, err := io.ReadFull(way[1], got); err != nil {
			return fmt.Errorf("reading: %w", err)
		}
		if !bytes.Equal(got, data) {
			return errors.New("other bytes arrived than were sent")
		}
		if err := <-errs; err != nil {
			return fmt.Errorf("writing: %w", err)
		}
	}
	return nil
}
