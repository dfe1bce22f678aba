package user

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv6"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// dhcpClient speaks DHCP by frames.
type dhcpClient struct {
	*guest
	replies <-chan []byte
}

func newDHCPClient(t *testing.T, options string) *dhcpClient {
	g := newGuest(t, openTest(t, options), guestOptions{features: offloads, noStack: true})
	c := &dhcpClient{guest: g}
	c.replies = g.sniff(func(f []byte) bool {
		return header.Ethernet(f).Type() == header.IPv4ProtocolNumber && header.UDP(f[ethLen+header.IPv4MinimumSize:]).DestinationPort() == dhcp4ClientPort
	})
	return c
}

func (c *dhcpClient) post(m *dhcpv4.DHCPv4) {
	f := udpFrame("0.0.0.0", "255.255.255.255", dhcp4ClientPort, dhcp4ServerPort, m.ToBytes())
	copy(f, header.EthernetBroadcastAddress)
	c.send(f)
}

// ask returns the reply to m.
func (c *dhcpClient) ask(m *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	c.Helper()
	c.post(m)
	select {
	case f := <-c.replies:
		fr := frame{data: f, size: len(f)}
		l4 := l4Part{
			start: ethLen + header.IPv4MinimumSize, end: len(f), proto: header.UDPProtocolNumber,
			src: header.IPv4(f[ethLen:]).SourceAddress(), dst: header.IPv4(f[ethLen:]).DestinationAddress(),
		}
		if !header.IPv4(f[ethLen:]).IsChecksumValid() || l4.verify(&fr) != toStack {
			c.Fatal("reply with a wrong checksum")
		}
		r, err := dhcpv4.FromBytes(f[ethLen+header.IPv4MinimumSize+header.UDPMinimumSize:])
		must(c, err)
		if r.TransactionID != m.TransactionID {
			c.Fatalf("reply to %v, want %v", r.TransactionID, m.TransactionID)
		}
		return r
	case <-time.After(testTimeout):
		c.Fatalf("no reply to %v", m.MessageType())
		return nil
	}
}

func (c *dhcpClient) silent(m *dhcpv4.DHCPv4) {
	c.Helper()
	c.post(m)
	// The next question is answered only after this one was dealt with.
	if r := c.ask(c.discover("02:00:00:00:00:99")); r.MessageType() != dhcpv4.MessageTypeOffer {
		c.Fatalf("%v, want only the offer", r.Summary())
	}
}

func (c *dhcpClient) discover(mac string) *dhcpv4.DHCPv4 {
	c.Helper()
	hw, err := net.ParseMAC(mac)
	must(c, err)
	m, err := dhcpv4.NewDiscovery(hw)
	must(c, err)
	return m
}

// lease does the whole exchange.
func (c *dhcpClient) lease(mac string) *dhcpv4.DHCPv4 {
	c.Helper()
	offer := c.ask(c.discover(mac))
	if offer.MessageType() != dhcpv4.MessageTypeOffer {
		c.Fatalf("not an offer: %s", offer.Summary())
	}
	req, err := dhcpv4.NewRequestFromOffer(offer)
	must(c, err)
	ack := c.ask(req)
	if ack.MessageType() != dhcpv4.MessageTypeAck || !ack.YourIPAddr.Equal(offer.YourIPAddr) {
		c.Fatalf("offered %v, then: %s", offer.YourIPAddr, ack.Summary())
	}
	return ack
}

const guestMACText = "52:54:00:12:34:56"

func TestDHCPLease(t *testing.T) {
	c := newDHCPClient(t, "hostname=vm1,domainname=example.org,dnssearch=a.example,dnssearch=b.example,mtu=9000")
	ack := c.lease(guestMACText)
	got := map[string]any{
		"address": ack.YourIPAddr.String(), "router": ack.Router()[0].String(), "dns": ack.DNS()[0].String(),
		"mask": ack.SubnetMask().String(), "server": ack.ServerIdentifier().String(), "lease": ack.IPAddressLeaseTime(0),
		"hostname": ack.HostName(), "domain": ack.DomainName(), "search": ack.DomainSearch().Labels,
		"mtu": ack.Options.Get(dhcpv4.OptionInterfaceMTU),
	}
	want := map[string]any{
		"address": "10.0.2.15", "router": "10.0.2.2", "dns": "10.0.2.3", "mask": "ffffff00", "server": "10.0.2.2", "lease": leaseTime,
		"hostname": "vm1", "domain": "example.org", "search": []string{"a.example", "b.example"}, "mtu": []byte{9000 >> 8, 9000 & 0xff},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if again := c.lease(guestMACText); !again.YourIPAddr.Equal(ack.YourIPAddr) {
		t.Errorf("the same client got %v, then %v", ack.YourIPAddr, again.YourIPAddr)
	}
	if other := c.lease("02:00:00:00:00:01"); !other.YourIPAddr.Equal(net.IPv4(10, 0, 2, 16)) {
		t.Errorf("a second client got %v", other.YourIPAddr)
	}
	if n := c.dev.Stats().Leases; n != 2 {
		t.Errorf("%d leases, want 2", n)
	}
}

func TestDHCPRequestForAnAddressOfOthers(t *testing.T) {
	c := newDHCPClient(t, "")
	c.lease(guestMACText)
	for _, wanted := range []string{"10.0.2.15", "10.0.2.2", "192.168.1.1", "10.0.2.255"} {
		m := c.discover("02:00:00:00:00:02")
		m.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeRequest))
		m.UpdateOption(dhcpv4.OptRequestedIPAddress(net.ParseIP(wanted)))
		if r := c.ask(m); r.MessageType() != dhcpv4.MessageTypeNak {
			t.Errorf("%s: %s", wanted, r.Summary())
		}
	}
	// To another server: not for us.
	m := c.discover(guestMACText)
	m.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeRequest))
	m.UpdateOption(dhcpv4.OptServerIdentifier(net.IPv4(10, 0, 2, 77)))
	c.silent(m)
}

func TestDHCPInformReleaseDecline(t *testing.T) {
	c := newDHCPClient(t, "")
	ack := c.lease(guestMACText)
	inform := c.discover(guestMACText)
	inform.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeInform))
	inform.ClientIPAddr = ack.YourIPAddr
	if r := c.ask(inform); r.MessageType() != dhcpv4.MessageTypeAck || !r.YourIPAddr.IsUnspecified() || len(r.DNS()) != 1 || r.IPAddressLeaseTime(0) != 0 {
		t.Errorf("inform: %s", r.Summary())
	}
	release, err := dhcpv4.NewReleaseFromACK(ack)
	must(t, err)
	c.silent(release) // whose own question leases the address that became free
	if a := c.lease(guestMACText).YourIPAddr; !a.Equal(net.IPv4(10, 0, 2, 16)) {
		t.Errorf("after release: %v", a)
	}
	decline := c.discover(guestMACText)
	decline.UpdateOption(dhcpv4.OptMessageType(dhcpv4.MessageTypeDecline))
	decline.UpdateOption(dhcpv4.OptRequestedIPAddress(net.IPv4(10, 0, 2, 16)))
	c.silent(decline)
	if a := c.lease(guestMACText).YourIPAddr; !a.Equal(net.IPv4(10, 0, 2, 17)) {
		t.Errorf("after decline: %v", a)
	}
}

func TestDHCPTableIsBounded(t *testing.T) {
	o, err := ParseOptions("net=10.0.0.0/16")
	must(t, err)
	now := time.Unix(1000, 0)
	d := newDHCP4(&o, nil)
	d.now = func() time.Time { return now }
	seen := make(map[netip.Addr]bool)
	for i := range 10 * maxLeases {
		a, ok := d.lease(macAddr{2, 0, 0, 0, byte(i >> 8), byte(i)}, netip.Addr{}, leaseTime)
		if ok != (i < maxLeases) || ok && seen[a] {
			t.Fatalf("client %d: %v, %v", i, a, ok)
		}
		seen[a] = true
	}
	now = now.Add(leaseTime + 1)
	if a, ok := d.lease(macAddr{1}, netip.Addr{}, leaseTime); !ok || a != netip.MustParseAddr("10.0.0.15") {
		t.Errorf("after the leases have ended: %v, %v", a, ok)
	}
}

func TestDHCPRestrictGivesNoWayOut(t *testing.T) {
	c := newDHCPClient(t, "restrict=on")
	if ack := c.lease(guestMACText); len(ack.Router()) != 0 || len(ack.DNS()) != 0 {
		t.Errorf("%s", ack.Summary())
	}
}

func TestDHCPv6Information(t *testing.T) {
	g := newGuest(t, openTest(t, "dnssearch=a.example"), guestOptions{features: offloads, noStack: true})
	replies := g.sniff(func(f []byte) bool {
		return header.Ethernet(f).Type() == header.IPv6ProtocolNumber && header.IPv6(f[ethLen:]).NextHeader() == uint8(header.UDPProtocolNumber)
	})
	m, err := dhcpv6.NewMessage()
	must(t, err)
	m.MessageType = dhcpv6.MessageTypeInformationRequest
	f := udpFrame("fe80::5054:ff:fe12:3456", "ff02::1:2", dhcp6ClientPort, dhcp6ServerPort, m.ToBytes())
	copy(f, "\x33\x33\x00\x01\x00\x02")
	g.send(f)
	select {
	case f := <-replies:
		r, err := dhcpv6.MessageFromBytes(f[ethLen+header.IPv6MinimumSize+header.UDPMinimumSize:])
		must(t, err)
		dns := r.Options.DNS()
		if r.TransactionID != m.TransactionID || len(dns) != 1 || !dns[0].Equal(net.ParseIP("fd00::3")) || r.Options.DomainSearchList().Labels[0] != "a.example" {
			t.Errorf("%s", r.Summary())
		}
	case <-time.After(testTimeout):
		t.Fatal("no reply")
	}
}
