package l2switch

import (
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/vhostd/vhostd/virtio"
)

// Config is what a Switch is made of. The zero Config is good.
type Config struct {
	Name         string
	MaxAddresses int           // learned addresses of all ports; 0: DefaultMaxAddresses
	Ageing       time.Duration // after which an address that was not heard of is forgotten; 0: DefaultAgeing
	MTU          int           // of ports that do not say; 0: no limit
	// Hold is how long the pages of a sender wait for a receiver that has posted too little; then they are copied, and given back. 0: DefaultHold.
	Hold time.Duration
	// Backlog is how many frames wait for each receiveq at most; what comes on top is dropped. 0: DefaultBacklog. It is rounded up to a power of two.
	Backlog int
	// BacklogBytes bounds the memory of the copies among them: 2 KiB each, 16 of longer ones, 64 of those beyond. 0: DefaultBacklogBytes.
	BacklogBytes int
	// Start is closed when uplinks are to begin to receive. Until then they have no thread that waits in the kernel. nil: they begin at once.
	Start <-chan struct{}
	Log   *slog.Logger // nil: none
}

// Defaults of Config.
const (
	DefaultMaxAddresses = 8192
	DefaultAgeing       = 300 * time.Second
	DefaultHold         = 2 * time.Millisecond
	DefaultBacklog      = 1024
	DefaultBacklogBytes = 4 << 20
)

// DefaultPortAddresses is how many addresses are learned on a guest's port, if its configuration does not say. Uplinks have the table's size.
const DefaultPortAddresses = 256

// Bounds of Config.
const (
	minAddresses = 16
	maxAddresses = 1 << 20
	minBacklog   = 1
	maxBacklog   = 1 << 15
	minMTU       = 68 // of IPv4
	maxMTU       = 65535
	maxPairs     = 128
	maxPorts     = 1 << 15
	maxHold      = time.Minute
)

func (c Config) withDefaults() (Config, error) {
	for _, d := range []struct {
		value *int
		is    int
	}{
		{&c.MaxAddresses, DefaultMaxAddresses}, {&c.Backlog, DefaultBacklog}, {&c.BacklogBytes, DefaultBacklogBytes},
	} {
		if *d.value == 0 {
			*d.value = d.is
		}
	}
	if c.Ageing == 0 {
		c.Ageing = DefaultAgeing
	}
	if c.Hold == 0 {
		c.Hold = DefaultHold
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c, c.check()
}

func (c Config) check() error {
	switch {
	case c.MaxAddresses < minAddresses || c.MaxAddresses > maxAddresses:
		return fmt.Errorf("%d addresses, must be %d to %d", c.MaxAddresses, minAddresses, maxAddresses)
	case c.Ageing < time.Second:
		return fmt.Errorf("ageing time %v, must be 1s at least", c.Ageing)
	case c.Hold < 0 || c.Hold > maxHold:
		return fmt.Errorf("hold time %v, must be at most %v", c.Hold, maxHold)
	case c.Backlog < minBacklog || c.Backlog > maxBacklog:
		return fmt.Errorf("backlog of %d frames, must be %d to %d", c.Backlog, minBacklog, maxBacklog)
	case c.BacklogBytes < virtio.MaxFrame:
		return fmt.Errorf("backlog of %d bytes, must hold one frame of %d", c.BacklogBytes, virtio.MaxFrame)
	}
	return checkMTU(c.MTU)
}

func checkMTU(mtu int) error {
	if mtu != 0 && (mtu < minMTU || mtu > maxMTU) {
		return fmt.Errorf("MTU %d, must be %d to %d", mtu, minMTU, maxMTU)
	}
	return nil
}

// MAC is an Ethernet address.
type MAC = [6]byte

// PortConfig is what a port is made of. All but Name and Pairs can be changed while frames flow (Switch.Update).
type PortConfig struct {
	Name  string // unique in its switch
	Pairs int    // queue pairs; 0 means 1
	MTU   int    // largest IP packet in bytes, both ways; 0: the switch's
	VLAN  VLAN
	// Isolated ports exchange frames only with ports that are not.
	Isolated bool
	Guard    Guard
	// FromGuest and ToGuest limit what the port sends and gets.
	FromGuest, ToGuest Limit
	Storm              Storm
	MaxAddresses       int // learned here; 0: DefaultPortAddresses
}

// VLAN says which VLANs a port is in. The zero VLAN is an access port of VLAN 1.
type VLAN struct {
	// Access is the VLAN of an access port: its frames carry no tag, and tagged ones are dropped.
	Access uint16
	// Trunk are the VLANs of a trunk port, whose frames are tagged, and Native the one, if any, whose frames are not. Native is in Trunk or not.
	Trunk  []VLANRange
	Native uint16
}

// VLANRange is the VLANs from First to Last.
type VLANRange struct{ First, Last uint16 }

// defaultVLAN is that of ports which do not say.
const defaultVLAN = 1

// maxVLAN is the largest VLAN identifier (IEEE 802.1Q: 4095 is reserved).
const maxVLAN = 4094

// Guard says what a guest may claim to be. The zero Guard lets everything pass.
type Guard struct {
	// MACs are the only source addresses that frames may have, in the Ethernet header, in ARP and in neighbour discovery. No other port can claim one of
	// them. Empty: any.
	MACs []MAC
	// IPs are the only addresses that the guest may claim, of IPv4 and of IPv6, in packets, in ARP and in neighbour discovery. Other protocols are
	// dropped then. Link-local IPv6 addresses that follow from MACs are added. Empty: any.
	IPs []netip.Prefix
	// NoDHCPServer drops what only a DHCP or DHCPv6 server sends, NoRouter IPv6 router advertisements and redirects.
	NoDHCPServer, NoRouter bool
}

// Limit is a rate. Zero is no limit; a burst of zero is a tenth of a second's worth.
type Limit struct {
	Frames, Bytes           uint64 // per second
	BurstFrames, BurstBytes uint64
}

// Storm limits the frames per second of a kind that a port sends, each of which goes to many ports. Zero is no limit.
type Storm struct{ Broadcast, Multicast, UnknownUnicast uint64 }

func (c PortConfig) withDefaults(sw Config) (PortConfig, error) {
	if c.Pairs == 0 {
		c.Pairs = 1
	}
	if c.MTU == 0 {
		c.MTU = sw.MTU
	}
	if c.MaxAddresses == 0 {
		c.MaxAddresses = DefaultPortAddresses
	}
	if c.VLAN.Access == 0 && len(c.VLAN.Trunk) == 0 && c.VLAN.Native == 0 {
		c.VLAN.Access = defaultVLAN
	}
	if err := c.check(); err != nil {
		return c, fmt.Errorf("port %q: %w", c.Name, err)
	}
	return c, nil
}

func (c PortConfig) check() error {
	switch {
	case c.Name == "":
		return fmt.Errorf("a port needs a name")
	case c.Pairs < 1 || c.Pairs > maxPairs:
		return fmt.Errorf("%d queue pairs, must be 1 to %d", c.Pairs, maxPairs)
	case c.MaxAddresses < 1 || c.MaxAddresses > maxAddresses:
		return fmt.Errorf("%d addresses, must be 1 to %d", c.MaxAddresses, maxAddresses)
	}
	if err := checkMTU(c.MTU); err != nil {
		return err
	}
	if err := c.VLAN.check(); err != nil {
		return err
	}
	return c.Guard.check()
}

func (v VLAN) check() error {
	if v.Access != 0 && (len(v.Trunk) > 0 || v.Native != 0) {
		return fmt.Errorf("VLAN %d as access port, and a trunk: a port is one of them", v.Access)
	}
	if v.Access > maxVLAN || v.Native > maxVLAN {
		return fmt.Errorf("VLAN %d, must be 1 to %d", max(v.Access, v.Native), maxVLAN)
	}
	for _, r := range v.Trunk {
		if r.First < 1 || r.Last > maxVLAN || r.First > r.Last {
			return fmt.Errorf("VLANs %d to %d, must be within 1 to %d", r.First, r.Last, maxVLAN)
		}
	}
	return nil
}

func (g Guard) check() error {
	for _, m := range g.MACs {
		if m[0]&1 != 0 || m == (MAC{}) {
			return fmt.Errorf("address %x is no station's", m)
		}
	}
	for _, p := range g.IPs {
		if !p.IsValid() {
			return fmt.Errorf("an address in the list of IPs is no prefix")
		}
	}
	return nil
}
