package user

import (
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/vhostd/vhostd/offload"
)

// ethLen is the length in bytes of an Ethernet header.
const ethLen = header.EthernetMinimumSize

// link is the stack's end of the cable: an Ethernet link with segmentation offload whose packets go to the outboxes.
type link struct {
	mac        tcpip.LinkAddress
	mtu        uint32
	accept     atomic.Uint32 // offload.Set of the guest's driver
	dispatcher atomic.Pointer[stack.NetworkDispatcher]
	out        *outboxes
}

var (
	_ stack.LinkEndpoint = (*link)(nil)
	_ stack.GSOEndpoint  = (*link)(nil)
)

func (l *link) MTU() uint32                           { return l.mtu }
func (l *link) SetMTU(uint32)                         {}
func (l *link) MaxHeaderLength() uint16               { return ethLen }
func (l *link) LinkAddress() tcpip.LinkAddress        { return l.mac }
func (l *link) SetLinkAddress(tcpip.LinkAddress)      {}
func (l *link) Wait()                                 {}
func (l *link) Close()                                {}
func (l *link) SetOnCloseAction(func())               {}
func (l *link) IsAttached() bool                      { return l.dispatcher.Load() != nil }
func (*link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareEther }

// Capabilities: the checksums of what is delivered have been verified (see ingress), or need not be.
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityResolutionRequired | stack.CapabilityRXChecksumOffload
}

// GSOMaxSize is the largest packet that TCP makes, in bytes.
func (l *link) GSOMaxSize() uint32 { return 1 << 16 }

// SupportedGSO is asked once per connection. A connection outlives a change of the driver, whose frames are then cut by Posted.
func (l *link) SupportedGSO() stack.SupportedGSO {
	if l.takes()&(offload.TSO4|offload.TSO6) != 0 {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}

func (l *link) takes() offload.Set { return offload.Set(l.accept.Load()) }

func (l *link) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		l.dispatcher.Store(nil)
		return
	}
	l.dispatcher.Store(&d)
}

func (l *link) AddHeader(pkt *stack.PacketBuffer) {
	header.Ethernet(pkt.LinkHeader().Push(ethLen)).Encode(&header.EthernetFields{
		SrcAddr: pkt.EgressRoute.LocalLinkAddress,
		DstAddr: pkt.EgressRoute.RemoteLinkAddress,
		Type:    pkt.NetworkProtocolNumber,
	})
}

func (l *link) ParseHeader(pkt *stack.PacketBuffer) bool {
	_, ok := pkt.LinkHeader().Consume(ethLen)
	return ok
}

// WritePackets takes every packet: the outbox counts what it has to drop, which TCP makes good.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for _, pkt := range pkts.AsSlice() {
		if !l.out.put(pkt) {
			return 0, &tcpip.ErrNoBufferSpace{}
		}
	}
	return pkts.Len(), nil
}

// deliver hands a packet of the guest's to the stack, and with it the reference.
func (l *link) deliver(proto tcpip.NetworkProtocolNumber, pkt *stack.PacketBuffer) {
	if d := l.dispatcher.Load(); d != nil {
		(*d).DeliverNetworkPacket(proto, pkt)
	}
	pkt.DecRef()
}
