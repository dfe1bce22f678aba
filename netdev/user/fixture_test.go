package user

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

const testTimeout = 30 * time.Second

// Features of guests.
const (
	plain    = virtio.FVersion1 | virtio.FNetMrgRxbuf
	offloads = plain | virtio.FNetCsum | virtio.FNetHostTSO4 | virtio.FNetHostTSO6 |
		virtio.FNetGuestCsum | virtio.FNetGuestTSO4 | virtio.FNetGuestTSO6
	bare = virtio.FVersion1 // not even mergeable buffers
)

var (
	guestMAC = tcpip.LinkAddress("\x52\x54\x00\x12\x34\x56")
	guestIP  = netip.MustParseAddr("10.0.2.15")
	gateway  = netip.MustParseAddr("10.0.2.2")
	dnsIP    = netip.MustParseAddr("10.0.2.3")
	gateway6 = netip.MustParseAddr("fd00::2")
	// guestIP6 is what the guest makes of the prefix and its MAC address.
	guestIP6 = netip.MustParseAddr("fd00::5054:ff:fe12:3456")
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mustTCPIP(t testing.TB, err tcpip.Error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// openTest opens a device from the form of the command line. Its name server knows only what the test says.
func openTest(t testing.TB, options string) *Device {
	t.Helper()
	o, err := ParseOptions(options)
	must(t, err)
	dir := t.TempDir()
	o.ResolvConf, o.HostsFile = filepath.Join(dir, "resolv.conf"), filepath.Join(dir, "hosts")
	must(t, os.WriteFile(o.HostsFile, []byte("127.0.0.1 localhost thishost\n192.0.2.7 printer.example # laser\n2001:db8::7 printer.example\n"), 0o600))
	return openWith(t, o)
}

func openWith(t testing.TB, o Options) *Device {
	t.Helper()
	before := goleak.IgnoreCurrent()
	nd, err := Open(o)
	must(t, err)
	d := nd.(*Device)
	t.Cleanup(func() {
		must(t, d.Close())
		if err := vhosttest.FindGoroutines(before); err != nil {
			t.Error(err)
		}
	})
	return d
}

// guest is a network stack that drives a device as a virtual machine would: over receiveqs in memory, and with Send.
type guest struct {
	testing.TB
	dev      *Device
	stack    *stack.Stack
	link     guestLink
	features virtio.Features
	wg       sync.WaitGroup
	stop     chan struct{}
	closing  sync.Once

	mu     sync.Mutex
	queues []*guestQueue
	tap    func(hdr virtio.NetHdr, frame []byte) // sees what comes from the device
}

type guestOptions struct {
	features virtio.Features
	mtu      int
	pairs    int
	address  bool // configure guestIP and routes without DHCP
	noStack  bool // frames only, by hand
	trust    bool // do not verify checksums: for benchmarks
	bufSize  int  // bytes of each receive buffer
}

func newGuest(t testing.TB, d *Device, o guestOptions) *guest {
	t.Helper()
	if o.mtu == 0 {
		o.mtu = 1500
	}
	o.pairs = max(o.pairs, 1)
	if o.bufSize == 0 {
		o.bufSize = 2048
		if o.features&virtio.FNetMrgRxbuf == 0 {
			o.bufSize = o.mtu + ethLen + virtio.NetHdrSize
		}
	}
	g := &guest{TB: t, dev: d, features: o.features, stop: make(chan struct{})}
	g.link = guestLink{g: g, mtu: uint32(o.mtu), trust: o.trust}
	for i := range o.pairs {
		g.queues = append(g.queues, newGuestQueue(t, g, i, o.bufSize))
	}
	if !o.noStack {
		g.newStack(o)
	}
	must(t, d.SetOffloads(offload.ToGuest(o.features)))
	must(t, d.SetPairs(o.pairs))
	for _, q := range g.queues {
		g.wg.Add(1)
		go q.receive()
	}
	t.Cleanup(g.close)
	return g
}

// close stops the guest; its queues may be looked at after it.
func (g *guest) close() { g.closing.Do(g.shutdown) }

func (g *guest) shutdown() {
	if g.stack != nil {
		g.stack.Close()
		g.stack.Wait()
	}
	close(g.stop)
	g.wg.Wait()
	must(g, g.dev.SetPairs(0))
}

func (g *guest) newStack(o guestOptions) {
	ndp := ipv6.DefaultNDPConfigurations()
	s := stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{
			ipv4.NewProtocol, arp.NewProtocol,
			ipv6.NewProtocolWithOptions(ipv6.Options{
				AutoGenLinkLocal: true, NDPConfigs: ndp, DADConfigs: stack.DADConfigurations{DupAddrDetectTransmits: 1, RetransmitTimer: 100 * time.Millisecond},
			}),
		},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	g.stack = s
	sack := tcpip.TCPSACKEnabled(true)
	mustTCPIP(g, s.SetTransportProtocolOption(tcp.ProtocolNumber, &sack))
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: 4096, Default: 1 << 20, Max: 4 << 20}
	mustTCPIP(g, s.SetTransportProtocolOption(tcp.ProtocolNumber, &receive))
	send := tcpip.TCPSendBufferSizeRangeOption{Min: 4096, Default: 1 << 20, Max: 4 << 20}
	mustTCPIP(g, s.SetTransportProtocolOption(tcp.ProtocolNumber, &send))
	mustTCPIP(g, s.CreateNIC(1, &g.link))
	s.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, Gateway: stackAddr(gateway), NIC: 1},
		{Destination: header.IPv6EmptySubnet, Gateway: stackAddr(gw6), NIC: 1},
	})
	if o.address {
		g.addAddress(netip.PrefixFrom(guestIP, 24))
	}
}

func (g *guest) addAddress(p netip.Prefix) {
	pa := tcpip.ProtocolAddress{Protocol: protoOf(p.Addr()), AddressWithPrefix: stackAddr(p.Addr()).WithPrefix()}
	pa.AddressWithPrefix.PrefixLen = p.Bits()
	mustTCPIP(g, g.stack.AddProtocolAddress(1, pa, stack.AddressProperties{}))
	subnet := pa.AddressWithPrefix.Subnet()
	table := append([]tcpip.Route{{Destination: subnet, NIC: 1}}, g.stack.GetRouteTable()...)
	g.stack.SetRouteTable(table)
}

func full(ap netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: 1, Addr: stackAddr(ap.Addr()), Port: ap.Port()}
}

// dial connects the guest to an address.
func (g *guest) dial(addr netip.Addr, port uint16) (*gonet.TCPConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	return gonet.DialContextTCP(ctx, g.stack, full(netip.AddrPortFrom(addr, port)), protoOf(addr))
}

func (g *guest) mustDial(addr netip.Addr, port uint16) *gonet.TCPConn {
	g.Helper()
	c, err := g.dial(addr, port)
	must(g, err)
	g.Cleanup(func() { c.Close() })
	return c
}

// dialUDP is a socket of the guest's, connected.
func (g *guest) dialUDP(addr netip.Addr, port uint16) *gonet.UDPConn {
	g.Helper()
	to := full(netip.AddrPortFrom(addr, port))
	c, err := gonet.DialUDP(g.stack, nil, &to, protoOf(addr))
	must(g, err)
	g.Cleanup(func() { c.Close() })
	return c
}

// waitAddress waits until the guest has made itself an address of the prefix that is advertised.
func (g *guest) waitAddress(a netip.Addr) {
	g.Helper()
	for end := time.Now().Add(testTimeout); ; time.Sleep(10 * time.Millisecond) {
		for _, pa := range g.stack.AllAddresses()[1] {
			if hostAddr(pa.AddressWithPrefix.Address) == a && g.stack.CheckLocalAddress(1, protoOf(a), stackAddr(a)) != 0 {
				return
			}
		}
		if time.Now().After(end) {
			g.Fatalf("the guest never had %v, but %v", a, g.stack.AllAddresses()[1])
		}
	}
}

// send sends a frame with no work left to the device.
func (g *guest) send(frame []byte) { g.sendHdr(virtio.NetHdr{}, frame) }

func (g *guest) sendHdr(hdr virtio.NetHdr, frame []byte) {
	q := g.queues[0]
	q.sendMu.Lock()
	defer q.sendMu.Unlock()
	b := zerocopy.NewBuffer(hdr, frame)
	if n := g.dev.Queue(q.i).Send([]*zerocopy.Buffer{b}); n != 1 {
		panic("Send took nothing")
	}
}

// input is the guest's network driver. Like one, it checks that the device keeps to what was negotiated.
func (g *guest) input(hdr virtio.NetHdr, frame []byte) {
	accept := offload.ToGuest(g.features)
	if !accept.Takes(hdr) {
		g.Errorf("header %+v, but the guest accepts %b", hdr, accept)
	}
	if hdr.GSO() == virtio.GSONone && len(frame) > int(g.link.mtu)+ethLen {
		g.Errorf("frame of %d bytes with mtu %d", len(frame), g.link.mtu)
	}
	if hdr.Flags&virtio.NetHdrNeedsCsum != 0 && !g.link.trust {
		sum := ^checksum.Checksum(frame[hdr.CsumStart:], 0)
		binary.BigEndian.PutUint16(frame[hdr.CsumStart+hdr.CsumOffset:], sum)
	}
	g.mu.Lock()
	tap := g.tap
	g.mu.Unlock()
	if tap != nil {
		tap(hdr, append([]byte(nil), frame...))
	}
	if g.link.deaf.Load() && header.IPv4(frame[ethLen:]).TransportProtocol() == header.TCPProtocolNumber {
		if tcp := header.TCP(header.IPv4(frame[ethLen:]).Payload()); !tcp.Flags().Contains(header.TCPFlagSyn) {
			return
		}
	}
	if d := g.link.dispatcher; d != nil {
		v := buffer.NewView(len(frame))
		v.Write(frame)
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithView(v)})
		g.link.ParseHeader(pkt)
		eth := header.Ethernet(pkt.LinkHeader().Slice())
		if dst := eth.DestinationAddress(); dst != guestMAC && !header.IsMulticastEthernetAddress(dst) {
			g.Errorf("frame for %v", dst)
		}
		d.DeliverNetworkPacket(eth.Type(), pkt)
		pkt.DecRef()
	}
}

// sniff returns a channel of the frames from the device that match.
func (g *guest) sniff(match func(frame []byte) bool) <-chan []byte {
	c := make(chan []byte, 1024)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.tap = func(_ virtio.NetHdr, frame []byte) {
		if match(frame) {
			select {
			case c <- frame:
			default:
			}
		}
	}
	return c
}

// guestLink is the guest's network driver as its stack sees it.
type guestLink struct {
	link
	g          *guest
	mtu        uint32
	trust      bool
	dispatcher stack.NetworkDispatcher
	largest    atomic.Int64 // frame sent, in bytes
	deaf       atomic.Bool  // to all TCP but SYN-ACK
}

func (l *guestLink) MTU() uint32                    { return l.mtu }
func (l *guestLink) LinkAddress() tcpip.LinkAddress { return guestMAC }
func (l *guestLink) IsAttached() bool               { return l.dispatcher != nil }
func (l *guestLink) Attach(d stack.NetworkDispatcher) {
	if d != nil { // the stack is closed before the queues: late frames find a closed stack
		l.dispatcher = d
	}
}

func (l *guestLink) Capabilities() stack.LinkEndpointCapabilities {
	if l.trust {
		return stack.CapabilityResolutionRequired | stack.CapabilityRXChecksumOffload
	}
	return stack.CapabilityResolutionRequired
}

func (l *guestLink) SupportedGSO() stack.SupportedGSO {
	if l.g.features.Has(virtio.FNetHostTSO4 | virtio.FNetHostTSO6) {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}

func (l *guestLink) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for _, pkt := range pkts.AsSlice() {
		q := l.g.queues[flowHash(pkt)%uint32(len(l.g.queues))]
		v := pkt.ToView()
		frame := v.AsSlice()
		l.link.accept.Store(0)
		b := zerocopy.NewBuffer(l.link.netHdr(pkt), frame)
		if n := int64(len(frame)); n > l.largest.Load() {
			l.largest.Store(n)
		}
		q.sendMu.Lock()
		l.g.dev.Queue(q.i).Send([]*zerocopy.Buffer{b})
		q.sendMu.Unlock()
		v.Release()
	}
	return pkts.Len(), nil
}

// listen is a TCP server of the host's.
func listen(t testing.TB, network string, serve func(*net.TCPConn)) uint16 {
	t.Helper()
	addr := "127.0.0.1:0"
	if strings.HasSuffix(network, "6") {
		addr = "[::1]:0"
	}
	l, err := net.Listen(network, addr)
	must(t, err)
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Add(1)
			go func() {
				defer wg.Done()
				defer c.Close()
				serve(c.(*net.TCPConn))
			}()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}
