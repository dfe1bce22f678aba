package l2switch

import "fmt"

// Reason is why a frame was dropped.
type Reason uint8

// The reasons. Those up to NoReceiver count at the port that sent the frame, the others at the one that it was for.
const (
	DropMalformed      Reason = iota // no Ethernet frame, a source address that is no station's, or headers that lie
	DropReserved                     // for a bridge's own protocols (IEEE 802.1D: 01-80-C2-00-00-00 to -0F)
	DropVLAN                         // tagged on an access port, untagged on a trunk without native VLAN, or of a VLAN that is not the port's
	DropMTU                          // longer than the port's MTU
	DropMAC                          // from an Ethernet address that is not the guest's
	DropIP                           // from an IP address that is not the guest's
	DropARP                          // ARP that claims what is not the guest's
	DropND                           // IPv6 neighbour discovery that claims what is not the guest's
	DropDHCP                         // what a DHCP server sends
	DropRouter                       // what an IPv6 router sends
	DropProtocol                     // of a protocol that a guest with given addresses may not speak, or too intricate to be judged
	DropLimit                        // beyond the port's rate
	DropStormBroadcast               // beyond the rate of broadcasts
	DropStormMulticast               // beyond the rate of multicasts
	DropStormUnknown                 // beyond the rate of frames to nobody in particular
	DropSamePort                     // for a station behind the port that it came from
	DropIsolated                     // for another isolated port
	DropNoReceiver                   // no guest is connected, its ring does not run, or it has failed
	DropBacklog                      // the guest posts buffers too slowly, and enough frames wait for it
	DropTooBig                       // the guest's buffers can never take it
	DropVLANOut                      // of a VLAN that is not the port's, or with a tag inside that would come to light
	DropMTUOut                       // longer than the port's MTU
	DropLimitOut                     // beyond the port's rate
	DropFault                        // its sender's memory went away meanwhile
	NumReasons
)

var reasonNames = [NumReasons]string{
	"malformed", "reserved", "vlan", "mtu", "mac", "ip", "arp", "nd", "dhcp", "router", "protocol", "limit",
	"storm_broadcast", "storm_multicast", "storm_unknown", "same_port", "isolated",
	"no_receiver", "backlog", "too_big", "vlan_out", "mtu_out", "limit_out", "fault",
}

// String is the reason's name in statistics.
func (r Reason) String() string { return reasonNames[r] }

// PortStats is a snapshot of a port.
type PortStats struct {
	Name       string            `json:"name"`
	Uplink     bool              `json:"uplink,omitempty"`
	Connected  bool              `json:"connected"` // somebody is there to receive
	FromGuest  Traffic           `json:"from_guest"`
	ToGuest    Traffic           `json:"to_guest"`
	Flooded    uint64            `json:"flooded"`   // of FromGuest, to all
	Waiting    int               `json:"waiting"`   // frames for it at the moment
	Orphaned   uint64            `json:"orphaned"`  // frames for it that were copied so that the sender got its pages back
	Addresses  int               `json:"addresses"` // learned behind it
	NotLearned uint64            `json:"not_learned,omitempty"`
	Drops      map[string]uint64 `json:"drops,omitempty"` // by Reason
}

// Traffic counts frames and their bytes, as they are on the guest's side.
type Traffic struct {
	Frames uint64 `json:"frames"`
	Bytes  uint64 `json:"bytes"`
}

// Stats is a snapshot of a Switch.
type Stats struct {
	Name         string      `json:"name,omitempty"`
	Addresses    int         `json:"addresses"`
	MaxAddresses int         `json:"max_addresses"`
	Moves        uint64      `json:"moves"`       // of addresses from port to port
	NotLearned   uint64      `json:"not_learned"` // the table was full
	Ports        []PortStats `json:"ports"`
}

// Address is an address that was learned.
type Address struct {
	MAC  string `json:"mac"`
	VLAN uint16 `json:"vlan"`
	Port string `json:"port"`
	Age  int    `json:"age"` // seconds since it was heard of
}

// Table returns what the switch has learned, in no order.
func (s *Switch) Table() []Address {
	v := s.view.Load()
	var all []Address
	s.table.each(stamp(s.clock()), func(vid uint16, mac uint64, port int, age uint32) {
		if port >= len(v.ports) || v.ports[port] == nil {
			return
		}
		all = append(all, Address{MAC: macString(mac), VLAN: vid, Port: v.ports[port].name, Age: int(age)})
	})
	return all
}

func macString(m uint64) string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", byte(m>>40), byte(m>>32), byte(m>>24), byte(m>>16), byte(m>>8), byte(m))
}

// Stats returns a snapshot.
func (s *Switch) Stats() Stats {
	st := Stats{
		Name: s.cfg.Name, Addresses: int(s.table.count.Load()), MaxAddresses: s.cfg.MaxAddresses, Moves: s.table.moves.Load(),
		NotLearned: s.table.refused.Load(), Ports: []PortStats{},
	}
	for _, p := range s.view.Load().ports {
		if p != nil {
			st.Ports = append(st.Ports, p.stats())
		}
	}
	return st
}

func (p *Port) stats() PortStats {
	st := PortStats{
		Name: p.name, Uplink: p.up != nil, Addresses: int(p.learned.count.Load()), NotLearned: p.learned.refused.Load(),
		Flooded: p.flooded.Load(), Drops: map[string]uint64{},
	}
	for i := range p.queues {
		q := &p.queues[i]
		st.FromGuest.Frames += q.frames.Load()
		st.FromGuest.Bytes += q.bytes.Load()
		l := &q.lane
		st.ToGuest.Frames += l.frames.Load()
		st.ToGuest.Bytes += l.bytes.Load()
		st.Waiting += l.waiting()
		st.Orphaned += l.orphaned.Load()
		for why, n := range map[Reason]uint64{DropBacklog: l.starved.Load(), DropTooBig: l.tooBig.Load(), DropFault: l.faulted.Load()} {
			if n > 0 {
				st.Drops[why.String()] += n
			}
		}
		st.Connected = st.Connected || !l.shut.Load()
	}
	for r := range p.drops {
		if n := p.drops[r].Load(); n > 0 {
			st.Drops[Reason(r).String()] += n
		}
	}
	return st
}
