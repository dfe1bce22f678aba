package tap

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

const hostPort = 5000

// guestPort grows with every connection: the kernel remembers the old ones.
var guestPort layers.TCPPort = 4000

// tcpGuest is a guest with just enough TCP for one connection to a listener of the host's kernel.
type tcpGuest struct {
	*guest
	dev      *Device
	q        netdev.Queue
	hostMAC  net.HardwareAddr
	src, dst net.IP
	seq, ack uint32
	conn     net.Conn // the host's end
}

// dialTCP connects over d, whose interface gets an address, as a guest with the features f.
func dialTCP(t *testing.T, d *Device, f virtio.Features, v6 bool) *tcpGuest {
	t.Helper()
	guestPort++
	c := &tcpGuest{guest: newGuest(t, 256, f), dev: d, q: d.Queue(0), seq: 1000, src: net.IPv4(10, 7, 0, 2).To4(), dst: net.IPv4(10, 7, 0, 1).To4()}
	bits := 24
	if v6 {
		c.src, c.dst, bits = net.ParseIP("fd00::2"), net.ParseIP("fd00::1"), 64
		must(t, os.WriteFile("/proc/sys/net/ipv6/conf/"+d.name+"/disable_ipv6", []byte("0"), 0))
	}
	link := netdevtest.Link(t, d.name)
	c.hostMAC = link.Attrs().HardwareAddr
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: c.dst, Mask: net.CIDRMask(bits, 8*len(c.dst))}, Flags: unix.IFA_F_NODAD}
	must(t, netlink.AddrAdd(link, addr))
	must(t, netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: c.src, HardwareAddr: guestMAC}))
	awaitLocal(t, c.dst)
	negotiate(t, d, f)
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: c.dst, Port: hostPort})
	must(t, err)
	defer l.Close()
	must(t, l.SetDeadline(time.Now().Add(testTimeout)))
	c.send(layers.TCP{SYN: true}, nil, 0)

	if reply, _ := c.receive(); !reply.SYN || !reply.ACK {
		t.Fatalf("the answer to a SYN is %+v", reply)
	}
	c.send(layers.TCP{ACK: true}, nil, 0)
	c.conn, err = l.Accept()
	must(t, err)
	t.Cleanup(func() { c.conn.Close() })
	must(t, c.conn.SetDeadline(time.Now().Add(testTimeout)))
	return c
}

// awaitLocal waits until the kernel takes ip for an address of its own: with IPv6 that follows the link coming up at some distance.
func awaitLocal(t *testing.T, ip net.IP) {
	t.Helper()
	for deadline := time.Now().Add(testTimeout); ; time.Sleep(time.Millisecond) {
		routes, err := netlink.RouteGet(ip)
		if err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%v is not local: %v, %v", ip, routes, err)
		}
	}
}

// send sends a segment with a partial checksum; gsoSize > 0 leaves the cutting to the host.
func (c *tcpGuest) send(tcp layers.TCP, payload []byte, gsoSize int) {
	c.Helper()
	tcp.SrcPort, tcp.DstPort, tcp.Seq, tcp.Ack, tcp.Window = guestPort, hostPort, c.seq, c.ack, 65535
	c.seq += uint32(len(payload))
	hdr := virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, CsumOffset: 16}
	if tcp.SYN {
		c.seq++
		tcp.Options = []layers.TCPOption{{OptionType: layers.TCPOptionKindMSS, OptionLength: 4, OptionData: []byte{1440 >> 8, 1440 & 0xff}}}
	}
	tcpLen := 20 + 4*len(tcp.Options) + len(payload)
	eth := &layers.Ethernet{SrcMAC: guestMAC, DstMAC: c.hostMAC, EthernetType: layers.EthernetTypeIPv4}
	var ip gopacket.SerializableLayer = &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, SrcIP: c.src, DstIP: c.dst}
	hdr.CsumStart = 34
	if gsoSize > 0 {
		hdr.GSOType, hdr.GSOSize = virtio.GSOTCPv4, uint16(gsoSize)
	}
	if len(c.src) == 16 {
		eth.EthernetType, hdr.CsumStart = layers.EthernetTypeIPv6, 54
		ip = &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolTCP, SrcIP: c.src, DstIP: c.dst}
		if gsoSize > 0 {
			hdr.GSOType = virtio.GSOTCPv6
		}
	}
	hdr.HdrLen = hdr.CsumStart + 20
	tcp.Checksum = pseudoSum(c.src, c.dst, tcpLen)
	// Lengths first, then the IP header's checksum; TCP's stays the sum over the pseudo-header.
	head := gopacket.NewSerializeBuffer()
	must(c, gopacket.SerializeLayers(head, gopacket.SerializeOptions{FixLengths: true}, &tcp, gopacket.Payload(payload)))
	out := gopacket.NewSerializeBuffer()
	must(c, gopacket.SerializeLayers(out, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, eth, ip, gopacket.Payload(head.Bytes())))
	var b buffers
	b.add(hdr, out.Bytes())
	b.sendAll(c, c.q, zerocopy.Copied)
}

// pseudoSum is the sum over TCP's pseudo-header, not inverted (virtio-v1.2 §5.1.6.2.1).
func pseudoSum(src, dst net.IP, n int) uint16 {
	sum := uint32(n) + unix.IPPROTO_TCP
	for _, ip := range []net.IP{src, dst} {
		for i := 0; i < len(ip); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(ip[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// receive returns the next segment of the connection and how it was delivered, and acknowledges what it holds.
func (c *tcpGuest) receive() (*layers.TCP, *frame) {
	c.Helper()
	for {
		for c.drv.Free() > 8 {
			c.post(1, 4096)
		}
		f := c.recv(c.q)
		p := gopacket.NewPacket(f.data, layers.LayerTypeEthernet, gopacket.Default)
		tcp, ok := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
		if !ok || tcp.DstPort != guestPort {
			continue
		}
		c.checkSum(p, tcp, f)
		// The host sends again what is not acknowledged within milliseconds.
		again := 0
		if c.ack != 0 {
			again = int(int32(c.ack - tcp.Seq))
		}
		if again < 0 {
			c.Fatalf("segment at %d, want %d", tcp.Seq, c.ack)
		}
		if again > 0 && again >= len(tcp.Payload) {
			c.send(layers.TCP{ACK: true}, nil, 0)
			continue
		}
		tcp.Payload = tcp.Payload[again:]
		if c.ack = tcp.Seq + uint32(again+len(tcp.Payload)); tcp.SYN {
			c.ack++
		}
		if len(tcp.Payload) > 0 {
			c.send(layers.TCP{ACK: true}, nil, 0)
		}
		return tcp, f
	}
}

// checkSum verifies a checksum that the guest was not told about.
func (c *tcpGuest) checkSum(p gopacket.Packet, tcp *layers.TCP, f *frame) {
	c.Helper()
	if f.hdr.Flags&(virtio.NetHdrNeedsCsum|virtio.NetHdrDataValid) != 0 {
		return
	}
	must(c, tcp.SetNetworkLayerForChecksum(p.NetworkLayer()))
	if err, r := tcp.VerifyChecksum(); err != nil || !r.Valid {
		c.Fatalf("TCP checksum of a segment of %d bytes: %v, %+v", len(tcp.Payload), err, r)
	}
}

// TestTCPFromGuest: the host's TCP gets the right stream out of segments that the kernel has yet to cut.
func TestTCPFromGuest(t *testing.T) {
	inNetns(t)
	for name, v6 := range map[string]bool{"t4": false, "t6": true} {
		c := dialTCP(t, open(t, "tap:"+name), mergeable|largeRecv, v6)
		want := testFrame(4*15000, 1)
		for i := range 4 {
			c.send(layers.TCP{ACK: true, PSH: true}, want[i*15000:(i+1)*15000], 1440)
		}
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c.conn, got); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: the stream arrives changed", name)
		}
	}
}

// TestTCPToGuest: the guest gets the host's stream, in the form that it takes: whole, with a partial checksum, or complete.
func TestTCPToGuest(t *testing.T) {
	inNetns(t)
	for i, c := range []struct {
		name      string
		f         virtio.Features
		v6        bool
		tso, csum bool
	}{
		{"tso4", mergeable | largeRecv, false, true, true},
		{"tso6", mergeable | largeRecv, true, true, true},
		{"csum4", mergeable | virtio.FNetGuestCsum, false, false, true},
		{"none4", mergeable, false, false, false},
		{"none6", mergeable, true, false, false},
	} {
		d := open(t, "tap:"+c.name)
		g := dialTCP(t, d, c.f, c.v6)
		gsoType := uint8(virtio.GSOTCPv4)
		if c.v6 {
			gsoType = virtio.GSOTCPv6
		}
		want := testFrame(300_000, uint32(i))
		go g.conn.Write(want)
		var got []byte
		var large, partial int
		for len(got) < len(want) {
			tcp, f := g.receive()
			got = append(got, tcp.Payload...)
			if len(f.data) > 1514 || f.hdr.GSOType != 0 {
				large++
				if f.hdr.GSOType != gsoType || f.hdr.GSOSize == 0 {
					t.Fatalf("%s: a frame of %d bytes with %+v", c.name, len(f.data), f.hdr)
				}
			}
			if f.hdr.Flags != 0 {
				partial++
			}
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: the stream arrives changed", c.name)
		}
		if (large > 0) != c.tso || (partial > 0) != c.csum {
			t.Errorf("%s: %d frames to segment, %d with partial checksums; want them: %v, %v", c.name, large, partial, c.tso, c.csum)
		}
		g.conn.Close()
		must(t, d.Close())
	}
}

// TestSetOffloadsQueued: frames that the kernel has queued with an offload do not reach a guest that no longer takes it.
func TestSetOffloadsQueued(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0")
	c := dialTCP(t, d, mergeable|largeRecv, false)
	want := testFrame(8000, 1)
	if _, err := c.conn.Write(want); err != nil {
		t.Fatal(err)
	}
	pollFor(t, d.queues[0].fd, unix.POLLIN)
	// The guest's driver is another one now.
	old := c.guest
	c.guest = newGuest(t, 256, mergeable)
	negotiate(t, d, mergeable)
	if old.take() != nil {
		t.Fatal("the old driver has got a frame")
	}
	var got []byte
	frames := 0
	for ; len(got) < len(want); frames++ {
		tcp, f := c.receive()
		if len(f.data) > 1514 || f.hdr.Flags|f.hdr.GSOType != 0 {
			t.Fatalf("a frame of %d bytes with %+v", len(f.data), f.hdr)
		}
		got = append(got, tcp.Payload...)
	}
	if !bytes.Equal(got, want) {
		t.Error("the stream arrives changed")
	}
	if frames < 2 {
		t.Errorf("%d frames: nothing was cut", frames)
	}
}
