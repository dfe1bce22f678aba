package user

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv6"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/vhostd/vhostd/virtio"
)

// FuzzFrames is a guest that sends a few frames of all kinds, with checksums made right where that is asked for, so that they get far. What
// comes back is well-formed, comes from the router or from where the guest has sent to, fits the MTU, and is not more than was sent: several answers to one frame would
// make the router an amplifier.
func FuzzFrames(f *testing.F) {
	add := func(flags uint8, start, offset uint16, frames ...[]byte) {
		var b []byte
		for _, fr := range frames {
			b = append(binary.LittleEndian.AppendUint16(b, uint16(len(fr))), fr...)
		}
		f.Add(flags, start, offset, b)
	}
	query := []byte("\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x00\x00\x01\x00\x01")
	add(0, 0, 0, udpFrame("10.0.2.15", "10.0.2.3", 1, 53, query))
	add(1, 34, 16, synFrame("10.0.2.15", "10.0.2.3", 1, 53))
	add(repairSums, 0, 0, synFrame("fd00::15", "fd00::3", 1, 53), synFrame("10.0.2.15", "10.0.2.3", 2, 53), udpFrame("10.0.2.15", "10.0.2.2", 7, 7, nil))
	add(0, 0, 0, arpFrame(header.ARPRequest, "10.0.2.15", "10.0.2.2"), solicit("fd00::15", "fe80::2"))
	add(repairSums, 0, 0, udpFrame("0.0.0.0", "255.255.255.255", 68, 67, discoverBytes()), udpFrame("fe80::15", "ff02::1:2", 546, 547, []byte{11, 1, 2, 3}))
	add(repairSums, 0, 0, guestFrame("10.0.2.15", "10.0.2.2", header.ICMPv4ProtocolNumber, []byte{8, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3}),
		guestFrame("fd00::15", "fd00::2", header.ICMPv6ProtocolNumber, []byte{128, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3}),
		guestFrame("fe80::15", "ff02::2", header.ICMPv6ProtocolNumber, []byte{133, 0, 0, 0, 0, 0, 0, 0}))
	// Nothing of what a fuzzer finds may leave the process.
	d := openTest(f, "restrict=on")
	must(f, d.SetPairs(1))
	must(f, d.SetOffloads(0))
	g := &guest{TB: f, dev: d, queues: []*guestQueue{{}}}
	asked, answered := 0, 0
	const waiting = 512                    // answers that wait for the guest's addresses, at most
	known := map[netip.Addr]bool{{}: true} // what the guest has sent to: a refusal comes from there
	f.Fuzz(func(t *testing.T, flags uint8, start, offset uint16, frames []byte) {
		d.out.boxes[0].flush() // what comes late, from timers
		sent := 0
		for len(frames) > 2 && sent < 8 {
			n := min(int(binary.LittleEndian.Uint16(frames)), len(frames)-2)
			frame := append([]byte{}, frames[2:][:n]...)
			if frames = frames[2+n:]; flags&repairSums != 0 {
				repair(frame)
			}
			hdr := virtio.NetHdr{Flags: flags &^ repairSums, CsumStart: start, CsumOffset: offset}
			known[destination(summed(hdr, frame))] = true
			g.sendHdr(hdr, frame)
			sent++
		}
		got := toGuest(d)
		// One each, and what the stack asks for itself: an address to be resolved, and a solicited advertisement. Answers wait for an address
		// to be resolved, which a later frame may bring about for many of them.
		asked, answered = asked+sent, answered+len(got)
		if answered > 3*asked+waiting {
			t.Errorf("%d frames in answer to %d, by now", answered, asked)
		}
		for _, frame := range got {
			if src := checkAnswer(t, d, frame); !d.ingress.own(src) && !known[src] {
				t.Fatalf("a packet from %v, which is none of the router's addresses and none that the guest sent to", src)
			}
		}
	})
}

// repairSums in the flags asks for right checksums.
const repairSums = 0x80

// repair makes lengths and checksums of a frame right, as far as it has any.
func repair(frame []byte) {
	if len(frame) < ethLen+header.IPv4MinimumSize {
		return
	}
	switch ip := frame[ethLen:]; header.Ethernet(frame).Type() {
	case header.IPv4ProtocolNumber:
		n := int(ip[0]&15) * 4
		if n < header.IPv4MinimumSize || n > len(ip) {
			return
		}
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
		ip[10], ip[11] = 0, 0
		binary.BigEndian.PutUint16(ip[10:], ^naive(ip[:n]))
		repairL4(ip[n:], ip[9], ip[12:20])
	case header.IPv6ProtocolNumber:
		if len(ip) >= header.IPv6MinimumSize {
			binary.BigEndian.PutUint16(ip[4:], uint16(len(ip)-header.IPv6MinimumSize))
			repairL4(ip[header.IPv6MinimumSize:], ip[6], ip[8:40])
		}
	}
}

func repairL4(l4 []byte, proto byte, addrs []byte) {
	at, ok := sumAt(l4, proto)
	if ok {
		l4[at], l4[at+1] = 0, 0
		binary.BigEndian.PutUint16(l4[at:], ^naive(pseudo(l4, proto, addrs), l4))
	}
}

// sumAt is where a protocol has its checksum.
func sumAt(l4 []byte, proto byte) (at int, ok bool) {
	at, ok = map[byte]int{1: 2, 58: 2, 6: 16, 17: 6}[proto]
	return at, ok && len(l4) >= at+2
}

// pseudo is the pseudo-header of l4, which ICMPv4 has none of.
func pseudo(l4 []byte, proto byte, addrs []byte) []byte {
	if proto == 1 {
		return nil
	}
	return append(append([]byte{}, addrs...), 0, 0, byte(len(l4)>>8), byte(len(l4)), 0, 0, 0, proto)
}

// naive sums words; all parts but the last have an even length.
func naive(parts ...[]byte) uint16 {
	sum := 0
	for _, p := range parts {
		for i, b := range p {
			sum += int(b) << (8 * (1 - i%2))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// toGuest takes what waits for the guest.
func toGuest(d *Device) (frames [][]byte) {
	batch := make([]*stack.PacketBuffer, 64)
	for n := d.out.boxes[0].take(batch); n > 0; n = d.out.boxes[0].take(batch) {
		for _, pkt := range batch[:n] {
			v := pkt.ToView()
			frames = append(frames, append([]byte{}, v.AsSlice()...))
			v.Release()
			pkt.DecRef()
		}
	}
	return frames
}

// summed is the frame with the checksum that its header asks for, which may be anywhere: over the addresses, too.
func summed(hdr virtio.NetHdr, frame []byte) []byte {
	at := int(hdr.CsumStart) + int(hdr.CsumOffset)
	if hdr.Flags&virtio.NetHdrNeedsCsum == 0 || at+2 > len(frame) {
		return frame
	}
	frame = append([]byte{}, frame...)
	sum := ^naive(frame[hdr.CsumStart:])
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(frame[at:], sum)
	return frame
}

// destination is the address that a frame goes to, if it is IP's.
func destination(frame []byte) (a netip.Addr) {
	if len(frame) < ethLen {
		return a
	}
	switch ip := frame[ethLen:]; {
	case header.Ethernet(frame).Type() == header.IPv4ProtocolNumber && len(ip) >= 20:
		a = netip.AddrFrom4([4]byte(ip[16:20]))
	case header.Ethernet(frame).Type() == header.IPv6ProtocolNumber && len(ip) >= 40:
		a = netip.AddrFrom16([16]byte(ip[24:40]))
	}
	return a
}

// checkAnswer checks a frame to the guest, and returns the address that it comes from, if it is IP's and has one.
func checkAnswer(t *testing.T, d *Device, frame []byte) (src netip.Addr) {
	t.Helper()
	if len(frame) < ethLen || len(frame) > ethLen+int(d.link.mtu) || header.Ethernet(frame).SourceAddress() != d.link.mac {
		t.Fatalf("frame of %d bytes, MTU %d: %x", len(frame), d.link.mtu, frame)
	}
	ip := frame[ethLen:]
	var l4, addrs []byte
	var proto byte
	switch header.Ethernet(frame).Type() {
	case header.ARPProtocolNumber:
		if !header.ARP(ip).IsValid() {
			t.Fatalf("malformed ARP %x", ip)
		}
		return src
	case header.IPv4ProtocolNumber:
		h := header.IPv4(ip)
		if !h.IsValid(len(ip)) || int(h.TotalLength()) != len(ip) || naive(ip[:h.HeaderLength()]) != 0xffff || h.More() || h.FragmentOffset() != 0 {
			t.Fatalf("malformed IPv4 %x", ip)
		}
		src, proto, l4, addrs = netip.AddrFrom4([4]byte(ip[12:16])), ip[9], ip[h.HeaderLength():], ip[12:20]
	case header.IPv6ProtocolNumber:
		if len(ip) < 40 || ip[0]>>4 != 6 || int(binary.BigEndian.Uint16(ip[4:])) != len(ip)-40 {
			t.Fatalf("malformed IPv6 %x", ip)
		}
		src, proto, l4, addrs = netip.AddrFrom16([16]byte(ip[8:24])), ip[6], ip[40:], ip[8:40]
	default:
		t.Fatalf("a frame of type %v", header.Ethernet(frame).Type())
	}
	if at, ok := sumAt(l4, proto); ok && naive(pseudo(l4, proto, addrs), l4) != 0xffff && (proto != 17 || l4[at] != 0 || l4[at+1] != 0) {
		t.Fatalf("wrong checksum of protocol %d in %x", proto, ip)
	}
	if src.IsUnspecified() { // duplicate address detection
		return netip.Addr{}
	}
	return src
}

// FuzzDHCP asks for addresses: what is given is of the pool, never to two clients at a time, and bounded in number; answers are ones that a
// client understands.
func FuzzDHCP(f *testing.F) {
	f.Add(discoverBytes())
	f.Add([]byte{11, 1, 2, 3, 0, 1, 0, 0})
	request, err := dhcpv4.FromBytes(discoverBytes())
	must(f, err)
	for _, kind := range []dhcpv4.MessageType{dhcpv4.MessageTypeRequest, dhcpv4.MessageTypeInform, dhcpv4.MessageTypeRelease, dhcpv4.MessageTypeDecline} {
		request.UpdateOption(dhcpv4.OptMessageType(kind))
		request.UpdateOption(dhcpv4.OptRequestedIPAddress([]byte{10, 0, 2, 15}))
		f.Add(request.ToBytes())
	}
	d := openTest(f, "dnssearch=a.example")
	must(f, d.SetPairs(1))
	f.Fuzz(func(t *testing.T, payload []byte) {
		fr := frame{data: udpFrame("0.0.0.0", "255.255.255.255", 68, 67, payload[:min(len(payload), maxDHCP)])}
		d.ingress.dhcp4.input(&fr, payload)
		d.ingress.dhcp6.input(&fr, netip.MustParseAddr("fe80::15"), payload)
		got := toGuest(d)
		if len(got) > 3 { // an answer each, and an advertisement now and then
			t.Errorf("%d answers", len(got))
		}
		for _, frame := range got {
			checkAnswer(t, d, frame)
			checkDHCP(t, d, frame, payload)
		}
		if n := d.ingress.dhcp4.count(); n > maxLeases {
			t.Errorf("%d leases", n)
		}
	})
}

// checkDHCP checks an answer to the request in payload.
func checkDHCP(t *testing.T, d *Device, frame, payload []byte) {
	t.Helper()
	ip := frame[ethLen:]
	if ip[0]>>4 == 6 {
		if ip[6] != 17 { // an advertisement
			return
		}
		if r, err := dhcpv6.MessageFromBytes(ip[48:]); err != nil || r.Type() != dhcpv6.MessageTypeReply || [3]byte(r.TransactionID[:]) != [3]byte(payload[1:4]) {
			t.Fatalf("DHCPv6 answer %v, %v", r, err)
		}
		return
	}
	r, err := dhcpv4.FromBytes(ip[28:])
	req, reqErr := dhcpv4.FromBytes(payload)
	if err != nil || reqErr != nil || r.TransactionID != req.TransactionID || r.ClientHWAddr.String() != req.ClientHWAddr.String() {
		t.Fatalf("DHCP answer %v, %v to %v, %v", r, err, req, reqErr)
	}
	a := addr4(r.YourIPAddr)
	if !a.IsValid() {
		return
	}
	s := d.ingress.dhcp4
	s.mu.Lock()
	defer s.mu.Unlock()
	if l, ok := s.leases[a]; !ok || l.mac != macAddr(req.ClientHWAddr) || !s.pool(a) {
		t.Fatalf("%v was given to %v, and is held by %x (%v)", a, req.ClientHWAddr, l.mac, ok)
	}
}
