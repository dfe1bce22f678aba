package user

import (
	"context"
	"encoding/binary"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	// advertInterval is the time between unsolicited advertisements, a third of what RFC 4861 §6.2.1 takes by default, as a guest that
	// missed one has no other way to learn of a change.
	advertInterval = 200 * time.Second
	routerLifetime = 1800  // seconds
	validLifetime  = 86400 // seconds
	preferLifetime = 14400 // seconds
	// solicitedGap is the least time between answers to solicitations, which go to all nodes (RFC 4861 §6.2.6 has 3 s for real links).
	solicitedGap = 50 * time.Millisecond
)

var allNodes = netip.MustParseAddr("ff02::1")

const allNodesMAC = "\x33\x33\x00\x00\x00\x01"

// advertiser sends router advertisements (RFC 4861 §4.2), from which guests make their addresses, and learn of the router and its
// name server (RFC 8106).
type advertiser struct {
	opts *Options
	link *link
	gw   netip.Addr
	last atomic.Int64 // when the last answer was sent, in Unix nanoseconds
}

// run advertises until ctx ends.
func (a *advertiser) run(ctx context.Context) {
	tick := time.NewTicker(advertInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			a.send()
		case <-ctx.Done():
			return
		}
	}
}

// solicited answers a router solicitation, to all nodes.
func (a *advertiser) solicited() {
	now, last := time.Now().UnixNano(), a.last.Load()
	if now-last < int64(solicitedGap) && now > last || !a.last.CompareAndSwap(last, now) {
		return
	}
	a.send()
}

func (a *advertiser) send() {
	body := a.message()
	const neverForwarded = 255 // hops, RFC 4861 §6.1.2
	f, l4 := a.link.ipFrame(allNodesMAC, a.gw, allNodes, header.ICMPv6ProtocolNumber, neverForwarded, len(body))
	copy(l4, body)
	icmp := header.ICMPv6(l4)
	icmp.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: icmp, Src: stackAddr(a.gw), Dst: stackAddr(allNodes)}))
	a.link.sendFrame(f)
}

// Options of neighbor discovery (RFC 4861 §4.6, RFC 8106 §5). Lengths count 8 bytes.
const (
	ndSourceLink = 1
	ndPrefix     = 3
	ndMTU        = 5
	ndRDNSS      = 25
	ndDNSSL      = 31
)

// message is the advertisement, its checksum left 0.
func (a *advertiser) message() []byte {
	const otherConfig = 0x40 // flag: DHCPv6 knows more
	lifetime := uint16(routerLifetime)
	if a.opts.Restrict {
		lifetime = 0 // not a way out
	}
	b := []byte{byte(header.ICMPv6RouterAdvert), 0, 0, 0, defaultHops, otherConfig}
	b = binary.BigEndian.AppendUint16(b, lifetime)
	b = append(b, make([]byte, 8)...) // reachable time and retransmission timer: unspecified
	b = append(append(b, ndSourceLink, 1), a.link.mac...)
	b = binary.BigEndian.AppendUint32(append(b, ndMTU, 1, 0, 0), uint32(a.opts.MTU))

	const onLink, autonomous = 0x80, 0x40
	b = append(b, ndPrefix, 4, byte(a.opts.Net6.Bits()), onLink|autonomous)
	b = binary.BigEndian.AppendUint32(b, validLifetime)
	b = binary.BigEndian.AppendUint32(b, preferLifetime)
	b = append(append(b, 0, 0, 0, 0), a.opts.Net6.Addr().AsSlice()...)

	if !a.opts.Restrict {
		b = binary.BigEndian.AppendUint32(append(b, ndRDNSS, 3, 0, 0), routerLifetime)
		b = append(b, a.opts.DNS6.AsSlice()...)
	}
	return a.appendSearch(b)
}

// appendSearch appends the DNS search list (RFC 8106 §5.2).
func (a *advertiser) appendSearch(b []byte) []byte {
	if len(a.opts.DNSSearch) == 0 {
		return b
	}
	var names []byte
	for _, name := range a.opts.DNSSearch {
		for label := range strings.SplitSeq(name, ".") {
			names = append(append(names, byte(len(label))), label...)
		}
		names = append(names, 0)
	}
	for len(names)%8 != 0 {
		names = append(names, 0)
	}
	b = binary.BigEndian.AppendUint32(append(b, ndDNSSL, byte(1+len(names)/8), 0, 0), routerLifetime)
	return append(b, names...)
}
