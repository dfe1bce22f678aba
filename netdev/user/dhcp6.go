package user

import (
	"net"
	"net/netip"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	dhcp6ClientPort = 546
	dhcp6ServerPort = 547
)

// dhcp6 answers information requests (RFC 8415 §18.3.6): the addresses themselves come from router advertisements.
type dhcp6 struct {
	opts *Options
	link *link
	gw   netip.Addr // the router's link-local address
}

func (d *dhcp6) input(f *frame, src netip.Addr, payload []byte) verdict {
	if len(payload) > maxDHCP || !src.IsLinkLocalUnicast() || src == d.gw {
		return refuse
	}
	req, err := dhcpv6.MessageFromBytes(payload)
	if err != nil {
		return refuse
	}
	if req.Type() != dhcpv6.MessageTypeInformationRequest {
		return done
	}
	from := netip.AddrPortFrom(d.gw, dhcp6ServerPort)
	d.link.sendUDP(header.Ethernet(f.data).SourceAddress(), from, netip.AddrPortFrom(src, dhcp6ClientPort), d.reply(req).ToBytes())
	return done
}

func (d *dhcp6) reply(req *dhcpv6.Message) *dhcpv6.Message {
	r := &dhcpv6.Message{MessageType: dhcpv6.MessageTypeReply, TransactionID: req.TransactionID}
	if id := req.GetOneOption(dhcpv6.OptionClientID); id != nil {
		r.AddOption(id)
	}
	r.AddOption(dhcpv6.OptServerID(&dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: net.HardwareAddr(d.link.mac)}))
	if !d.opts.Restrict {
		dhcpv6.WithDNS(d.opts.DNS6.AsSlice())(r)
	}
	if len(d.opts.DNSSearch) > 0 {
		dhcpv6.WithDomainSearchList(d.opts.DNSSearch...)(r)
	}
	return r
}
