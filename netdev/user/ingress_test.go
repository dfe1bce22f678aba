package user

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// arpFrame is a request of the guest's.
func arpFrame(op header.ARPOp, sender, target string) []byte {
	f := make([]byte, ethLen+header.ARPSize)
	header.Ethernet(f).Encode(&header.EthernetFields{SrcAddr: guestMAC, DstAddr: header.EthernetBroadcastAddress, Type: header.ARPProtocolNumber})
	a := header.ARP(f[ethLen:])
	a.SetIPv4OverEthernet()
	a.SetOp(op)
	copy(a.HardwareAddressSender(), guestMAC)
	s, d := netip.MustParseAddr(sender).As4(), netip.MustParseAddr(target).As4()
	copy(a.ProtocolAddressSender(), s[:])
	copy(a.ProtocolAddressTarget(), d[:])
	return f
}

// solicit is a neighbor solicitation, as duplicate address detection sends it when src is "::".
func solicit(src, target string) []byte {
	body := make([]byte, 24)
	body[0] = byte(header.ICMPv6NeighborSolicit)
	a := netip.MustParseAddr(target).As16()
	copy(body[8:], a[:])
	group := [16]byte{0: 0xff, 1: 2, 11: 1, 12: 0xff, 13: a[13], 14: a[14], 15: a[15]}
	dst := netip.AddrFrom16(group).String()
	setSum(body, header.ICMPv6ProtocolNumber, src, dst, 2)
	f := guestFrame(src, dst, header.ICMPv6ProtocolNumber, body)
	copy(f, []byte{0x33, 0x33, 0xff, a[13], a[14], a[15]})
	header.IPv6(f[ethLen:]).SetHopLimit(255)
	return f
}

// verdictCase is a frame and what is to become of it.
type verdictCase struct {
	name  string
	frame []byte
	want  verdict
}

func verdictCases() []verdictCase {
	to := func(mac tcpip.LinkAddress, f []byte) []byte {
		copy(f, mac)
		return f
	}
	badSum := udpFrame("10.0.2.15", "192.0.2.1", 1, 2, []byte("data"))
	badSum[len(badSum)-1] ^= 1
	noSum := udpFrame("10.0.2.15", "192.0.2.1", 1, 2, []byte("data"))
	binary.BigEndian.PutUint16(noSum[ethLen+20+6:], 0)
	badSum6 := udpFrame("fd00::15", "2001:db8::1", 1, 2, []byte("data"))
	badSum6[len(badSum6)-1] ^= 1
	short := udpFrame("10.0.2.15", "192.0.2.1", 1, 2, []byte("data"))
	return []verdictCase{
		{"udp", udpFrame("10.0.2.15", "192.0.2.1", 1, 2, nil), toStack},
		{"tcp6", synFrame("fd00::15", "2001:db8::1", 1, 2), toStack},
		{"wrong checksum", badSum, refuse},
		{"no checksum", noSum, toStack},
		{"IPv6: wrong checksum", badSum6, refuse},
		{"IPv6: behind options", behindOptions(synFrame("fd00::15", "2001:db8::1", 1, 2)), toStack},
		{"IPv6: wrong checksum behind options", behindOptions(badSum6), refuse},
		{"IPv6: cut in options", behindOptions(badSum6)[:ethLen+header.IPv6MinimumSize+4], refuse},
		{"IPv6: neighbor: the router, behind options", behindOptions(solicit("fd00::15", "fe80::2")), toStack},
		{"cut", short[:len(short)-1], refuse},
		{"cut in the IP header", short[:ethLen+10], refuse},
		{"only ethernet", short[:ethLen], refuse},
		{"not for the router's MAC", to("\x02\x00\x00\x00\x00\x01", udpFrame("10.0.2.15", "192.0.2.1", 1, 2, nil)), refuse},
		{"unicast in a broadcast frame", to(header.EthernetBroadcastAddress, udpFrame("10.0.2.15", "192.0.2.1", 1, 2, nil)), refuse},
		{"another source", udpFrame("192.0.2.9", "192.0.2.1", 1, 2, nil), refuse},
		{"the router as source", udpFrame("10.0.2.2", "192.0.2.1", 1, 2, nil), refuse},
		{"loopback as source", udpFrame("127.0.0.1", "192.0.2.1", 1, 2, nil), refuse},
		{"IPv6: another source", udpFrame("2001:db8::9", "2001:db8::1", 1, 2, nil), refuse},
		{"IPv6: the router as source", udpFrame("fe80::2", "2001:db8::1", 1, 2, nil), refuse},
		{"a neighbor that is not there", udpFrame("10.0.2.15", "10.0.2.16", 1, 2, nil), refuse},
		{"loopback", udpFrame("10.0.2.15", "127.0.0.1", 1, 2, nil), refuse},
		{"IPv6: loopback", udpFrame("fd00::15", "::1", 1, 2, nil), refuse},
		{"IPv6: mapped loopback", udpFrame("fd00::15", "::ffff:127.0.0.1", 1, 2, nil), refuse},
		{"IPv6: link-local", udpFrame("fd00::15", "fe80::77", 1, 2, nil), refuse},
		{"multicast", to("\x01\x00\x5e\x00\x00\xfb", udpFrame("10.0.2.15", "224.0.0.251", 5353, 5353, nil)), done},
		{"broadcast", to(header.EthernetBroadcastAddress, udpFrame("10.0.2.15", "10.0.2.255", 1, 2, nil)), done},
		{"ARP for the router", arpFrame(header.ARPRequest, "10.0.2.15", "10.0.2.2"), toStack},
		{"ARP for the name server", arpFrame(header.ARPRequest, "10.0.2.15", "10.0.2.3"), toStack},
		{"ARP probe of its own address", arpFrame(header.ARPRequest, "0.0.0.0", "10.0.2.15"), done},
		{"ARP for another", arpFrame(header.ARPRequest, "10.0.2.15", "10.0.2.77"), done},
		{"ARP as the router", arpFrame(header.ARPReply, "10.0.2.2", "10.0.2.2"), refuse},
		{"neighbor: the router", solicit("fd00::15", "fe80::2"), toStack},
		{"neighbor: duplicate of its own", solicit("::", "fd00::15"), done},
		{"VLAN", append(append([]byte(testRouter.mac+guestMAC), 0x81, 0), make([]byte, 60)...), done},
	}
}

// behindOptions puts hop-by-hop and destination options, of padding, before the payload of an IPv6 packet.
func behindOptions(f []byte) []byte {
	f = bytes.Clone(f)
	ip := header.IPv6(f[ethLen:])
	options := append([]byte{60, 0, 1, 4, 0, 0, 0, 0}, ip.NextHeader(), 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	ip.SetNextHeader(0)
	ip.SetPayloadLength(ip.PayloadLength() + uint16(len(options)))
	return slices.Insert(f, ethLen+header.IPv6MinimumSize, options...)
}

func TestIngressVerdicts(t *testing.T) {
	d := openTest(t, "")
	for _, c := range verdictCases() {
		f := frame{data: c.frame, size: len(c.frame)}
		if got := d.ingress.classify(&f); got != c.want {
			t.Errorf("%s: verdict %d, want %d", c.name, got, c.want)
		}
	}
}

// TestTunnelChecksumIsCompleted: a guest that encapsulates leaves a checksum partial that no driver of ours will ever see again.
func TestTunnelChecksumIsCompleted(t *testing.T) {
	inner := synFrame("192.0.2.1", "192.0.2.2", 1, 2)
	want := bytes.Clone(inner)
	at := ethLen + header.IPv4MinimumSize
	full := binary.BigEndian.Uint16(inner[at+header.TCPChecksumOffset:])
	// As a driver leaves it: the sum of the pseudo-header only.
	pseudo := header.PseudoHeaderChecksum(header.TCPProtocolNumber,
		stackAddr(netip.MustParseAddr("192.0.2.1")), stackAddr(netip.MustParseAddr("192.0.2.2")), header.TCPMinimumSize)
	binary.BigEndian.PutUint16(inner[at+header.TCPChecksumOffset:], pseudo)

	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	must(t, err)
	defer pc.Close()
	f := udpFrame("10.0.2.15", "10.0.2.2", 4789, portOf(pc.(*net.UDPConn)), inner)
	outer := ethLen + header.IPv4MinimumSize
	binary.BigEndian.PutUint16(f[outer+6:], 0) // as VXLAN does
	g := newGuest(t, openTest(t, ""), guestOptions{features: offloads, noStack: true})
	start := outer + header.UDPMinimumSize + at
	g.sendHdr(virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, CsumStart: uint16(start), CsumOffset: header.TCPChecksumOffset}, f)

	pc.SetReadDeadline(time.Now().Add(testTimeout))
	got := make([]byte, 2000)
	n, _, err := pc.ReadFrom(got)
	must(t, err)
	if !bytes.Equal(got[:n], want) {
		t.Errorf("checksum %#04x, want %#04x", binary.BigEndian.Uint16(got[at+header.TCPChecksumOffset:]), full)
	}
}

func TestRouterAdvertisementOnSolicitation(t *testing.T) {
	g := newGuest(t, openTest(t, "dnssearch=a.example,net6=fd12:3456::/64,mtu=9000"), guestOptions{features: offloads, noStack: true})
	adverts := g.sniff(func(f []byte) bool {
		return header.Ethernet(f).Type() == header.IPv6ProtocolNumber && f[ethLen+header.IPv6MinimumSize] == byte(header.ICMPv6RouterAdvert)
	})
	time.Sleep(2 * solicitedGap)
	select {
	case <-adverts: // for the guest that has come, if it came after sniff looked
	default:
	}
	body := make([]byte, 8)
	body[0] = byte(header.ICMPv6RouterSolicit)
	setSum(body, header.ICMPv6ProtocolNumber, "fe80::15", "ff02::2", 2)
	rs := guestFrame("fe80::15", "ff02::2", header.ICMPv6ProtocolNumber, body)
	copy(rs, "\x33\x33\x00\x00\x00\x02")
	g.send(rs)
	select {
	case f := <-adverts:
		ip := header.IPv6(f[ethLen:])
		icmp := header.ICMPv6(ip.Payload())
		if ip.HopLimit() != 255 || ip.SourceAddress() != stackAddr(gw6) {
			t.Errorf("from %v with hop limit %d", ip.SourceAddress(), ip.HopLimit())
		}
		if s := header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: icmp, Src: ip.SourceAddress(), Dst: ip.DestinationAddress()}); s != icmp.Checksum() {
			t.Errorf("checksum %#04x, want %#04x", icmp.Checksum(), s)
		}
		ra := header.NDPRouterAdvert(icmp.MessageBody())
		if ra.RouterLifetime() != routerLifetime*time.Second || !ra.OtherConfFlag() || ra.ManagedAddrConfFlag() {
			t.Errorf("lifetime %v, other %v, managed %v", ra.RouterLifetime(), ra.OtherConfFlag(), ra.ManagedAddrConfFlag())
		}
		checkAdvert(t, ra)
	case <-time.After(testTimeout):
		t.Fatal("no advertisement")
	}
}

func checkAdvert(t *testing.T, ra header.NDPRouterAdvert) {
	t.Helper()
	it, err := ra.Options().Iter(true)
	must(t, err)
	seen := 0
	for {
		o, end, err := it.Next()
		must(t, err)
		if end {
			break
		}
		switch o := o.(type) {
		case header.NDPSourceLinkLayerAddressOption:
			if o.EthernetAddress() != testRouter.mac {
				t.Errorf("from %v", o.EthernetAddress())
			}
		case header.NDPPrefixInformation:
			if p := o.Subnet(); p.String() != "fd12:3456::/64" || !o.AutonomousAddressConfigurationFlag() || !o.OnLinkFlag() {
				t.Errorf("prefix %v", p)
			}
		case header.NDPRecursiveDNSServer:
			a, err := o.Addresses()
			must(t, err)
			if len(a) != 1 || a[0].String() != "fd12:3456::3" {
				t.Errorf("name servers %v", a)
			}
		case header.NDPDNSSearchList:
			n, err := o.DomainNames()
			must(t, err)
			if len(n) != 1 || n[0] != "a.example" {
				t.Errorf("search list %v", n)
			}
		default:
			continue // the MTU, which this stack does not know
		}
		seen++
	}
	if seen != 4 {
		t.Errorf("%d options, want 4", seen)
	}
}

func TestMultiqueueSpreadsFlowsAndKeepsThem(t *testing.T) {
	const pairs, conns = 4, 64 // enough that chance leaves no pair without
	const size = 128 << 10     // bytes each way of each: more takes a starved machine longer than anybody waits
	port := listen(t, "tcp4", func(c *net.TCPConn) { io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c}) })
	d := openTest(t, "")
	g := newGuest(t, d, guestOptions{features: offloads, address: true, pairs: pairs})
	results := make(chan error, conns)
	for range conns {
		go func() {
			c, err := g.dial(gateway, port)
			if err != nil {
				results <- err
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(testTimeout))
			go func() {
				io.Copy(struct{ io.Writer }{c}, newPattern(size))
				c.CloseWrite()
			}()
			n, crc, err := sum(c)
			if err == nil && (n != size || crc != wantSum(size)) {
				err = io.ErrUnexpectedEOF
			}
			results <- err
		}()
	}
	for range conns {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	g.close()
	for i, q := range g.queues {
		if q.frames < 10 {
			t.Errorf("pair %d got %d frames", i, q.frames)
		}
	}
}

func discoverBytes() []byte {
	m, err := dhcpv4.NewDiscovery(net.HardwareAddr{2, 0, 0, 0, 0, 1})
	if err != nil {
		panic(err)
	}
	return m.ToBytes()
}

// TestLargeFrames: with a large MTU, a guest that computes its checksums itself may send a packet as long as any; those that are longer than one piece of private
// memory were refused.
func TestLargeFrames(t *testing.T) {
	for _, n := range []int{1000, otherPiece - ethLen - 28, otherPiece - ethLen - 27, 40000, MaxMTU - 28} {
		d := openTest(t, "mtu=65520")
		b := zerocopy.NewBuffer(virtio.NetHdr{}, udpFrame("10.0.2.15", "10.0.2.2", 1, 9, make([]byte, n)))
		if !d.ingress.frame(b) {
			t.Errorf("a datagram of %d bytes is refused", n)
		}
		badSum := udpFrame("10.0.2.15", "10.0.2.2", 1, 9, make([]byte, n))
		badSum[len(badSum)-1] ^= 1
		if d.ingress.frame(zerocopy.NewBuffer(virtio.NetHdr{}, badSum)) {
			t.Errorf("a datagram of %d bytes with a wrong checksum is taken", n)
		}
	}
}
