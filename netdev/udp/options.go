package udp

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vhostd/vhostd/internal/netopt"
	"github.com/vhostd/vhostd/netdev"
)

// Defaults, and bounds of what can be asked for.
const (
	// DefaultZeroCopyMin in bytes lies between the sizes from which a send without a copy took less CPU here than one with: 3 KiB
	// of memory that is in no cache, and 8 KiB of memory that is.
	DefaultZeroCopyMin = 4096
	// DefaultMsgZeroCopyMin is where a send of cold memory took as much CPU as a copy, with MSG_ZEROCOPY (docs/perf/2026-11-22-msg-zerocopy.md).
	DefaultMsgZeroCopyMin = 8192
	// DefaultRegisteredMin is the same for memory that is registered: some 2 KiB of cold memory, and 8 to 9 KiB of warm memory
	// (docs/perf/2026-11-22-udp.md).
	DefaultRegisteredMin   = 3072
	DefaultZeroCopyPending = 256
	DefaultPorts           = 8
	DefaultDrain           = time.Second

	maxPending = 4096
	maxPorts   = 64
	maxRemotes = 256
	minMTU     = 68
	maxMTU     = 65535 - 20 - 8 - etherHdr // of the guest: no datagram is longer
)

// Options say how the network is reached.
type Options struct {
	Mode    Mode
	VNI     uint32           // of VXLAN and Geneve: 0 to 2^24-1
	Local   netip.AddrPort   // address to send from and receive at; the zero address is any, port 0 is Port
	Remotes []netip.AddrPort // peers, at least one, of Local's family, or multicast groups that peers are in; port 0 is Port
	Port    uint16           // that Local and Remotes have where they say none; 0 is the mode's own
	Dev     string           // the interface that the datagrams are bound to, or ""
	MTU     int              // of the guest, in bytes; 0 is what the path to the peers has room for
	TTL     int              // of the datagrams, in hops; 0 is the host's own default, and 1 to groups
	NoLearn bool             // frames go to all peers, whatever comes from where
	Ports   int              // source ports that flows are spread over; 0 is DefaultPorts. Dgram has one, Local's

	ZeroCopy        netdev.Policy
	Engine          Engine
	ZeroCopyMin     int           // bytes; 0 is the engine's default. With On there is no least
	ZeroCopyPending int           // frames in the kernel's hands at most; 0 is DefaultZeroCopyPending
	Drain           time.Duration // that Close waits for the kernel at most; 0 is DefaultDrain
	// NoBalloon says that nobody takes pages away from the guest (no balloon, free page reporting or virtio-mem), so that its memory may
	// be registered: see netdev.Registrar.
	NoBalloon bool
	NoGSO     bool // every frame that leaves without a copy is a send of its own: see ringEngine
}

// keys are the options in a string.
var keys = netopt.Keys[Options]{
	{Name: "vni", Value: "N", Set: func(o *Options, v string) error { n, err := netopt.Number(v, 0, maxVNI); o.VNI = uint32(n); return err }},
	{Name: "local", Value: "ADDR[:PORT]", Set: func(o *Options, v string) (err error) { o.Local, err = address(v); return }},
	{Name: "remote", Value: "ADDR[:PORT][;ADDR...]", Many: true, Set: parseRemotes},
	{Name: "port", Value: "N", Set: parsePort},
	{Name: "dev", Value: "NAME", Set: func(o *Options, v string) error { o.Dev = v; return netopt.CheckInterface(v) }},
	{Name: "mtu", Value: "BYTES", Set: func(o *Options, v string) (err error) { o.MTU, err = netopt.Number(v, minMTU, maxMTU); return }},
	{Name: "ttl", Value: "HOPS", Set: func(o *Options, v string) (err error) { o.TTL, err = netopt.Number(v, 1, 255); return }},
	{Name: "learning", Value: "on|off", Set: parseLearning},
	{Name: "ports", Value: "N", Set: func(o *Options, v string) (err error) { o.Ports, err = netopt.Number(v, 1, maxPorts); return }},
	{Name: "zerocopy", Value: "auto|on|off", Set: parsePolicy},
	{Name: "zerocopy-min", Value: "BYTES", Set: func(o *Options, v string) (err error) { o.ZeroCopyMin, err = netopt.Number(v, 1, 65535); return }},
	{Name: "zerocopy-pending", Value: "N", Set: func(o *Options, v string) (err error) {
		o.ZeroCopyPending, err = netopt.Number(v, 1, maxPending)
		return
	}},
	{Name: "zerocopy-engine", Value: "auto|io_uring|msg_zerocopy", Set: parseEngine},
	{Name: "gso", Value: "on|off", Set: func(o *Options, v string) error { on, err := netopt.OnOff(v); o.NoGSO = !on; return err }},
	{Name: "no-balloon", Value: "on|off", Set: func(o *Options, v string) (err error) { o.NoBalloon, err = netopt.OnOff(v); return }},
}

// ofTunnels are those that Dgram has not.
var ofTunnels = []string{"vni", "port", "ttl", "learning", "ports"}

// keys are those of a mode.
func (m Mode) keys() netopt.Keys[Options] {
	if m != Dgram {
		return keys
	}
	return slices.DeleteFunc(slices.Clone(keys), func(k netopt.Key[Options]) bool { return slices.Contains(ofTunnels, k.Name) })
}

// ParseOptions reads the form of the command line:
//
//	vxlan:vni=42,local=10.0.0.1,remote=10.0.0.2;10.0.0.3
//	dgram:local=127.0.0.1:7001,remote=127.0.0.1:7002
func ParseOptions(s string) (Options, error) {
	o, err := parse(s)
	if err != nil {
		return Options{}, fmt.Errorf("udp options %q: %w", s, err)
	}
	return o, nil
}

func parse(s string) (o Options, err error) {
	name, rest, _ := strings.Cut(s, ":")
	for _, m := range []Mode{VXLAN, Geneve, Dgram} {
		if m.String() == name {
			o.Mode = m
		}
	}
	if o.Mode == 0 {
		return o, fmt.Errorf("unknown mode %q: known are vxlan, geneve and dgram", name)
	}
	given, err := o.Mode.keys().Parse(&o, netopt.Split(rest))
	if err != nil {
		return o, err
	}
	if o.Mode != Dgram && !given["vni"] {
		return o, fmt.Errorf("vni=N is missing: the number of the network, 0 to %d", maxVNI)
	}
	_, err = o.complete()
	return o, err
}

// complete returns o with what was left out, unless something contradicts itself.
func (o Options) complete() (Options, error) {
	port := o.Port
	if port == 0 {
		port = map[Mode]uint16{VXLAN: vxlanPort, Geneve: genevePort}[o.Mode]
	}
	if len(o.Remotes) == 0 || len(o.Remotes) > maxRemotes {
		return o, fmt.Errorf("%d peers, want 1 to %d: name them with remote=", len(o.Remotes), maxRemotes)
	}
	o.Remotes = slices.Clone(o.Remotes)
	for i, r := range o.Remotes {
		if r.Port() == 0 {
			r = netip.AddrPortFrom(r.Addr(), port)
		}
		switch {
		case r.Port() == 0:
			return o, fmt.Errorf("peer %s has no port: want remote=ADDR:PORT", r.Addr())
		case r.Addr().IsUnspecified() || r.Addr() == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
			return o, fmt.Errorf("peer %s is neither one host nor a multicast group", r.Addr())
		case r.Addr().IsMulticast() && o.Mode == Dgram:
			return o, fmt.Errorf("peer %s is not one host, which dgram wants", r.Addr())
		case r.Addr().IsMulticast() && r.Addr().Is6() && o.Dev == "":
			return o, fmt.Errorf("group %s may be on any interface: name one with dev=", r.Addr())
		case r.Addr().Is4() != o.Remotes[0].Addr().Is4() || o.Local.Addr().IsValid() && r.Addr().Is4() != o.Local.Addr().Is4():
			return o, errors.New("addresses must be all IPv4 or all IPv6")
		case slices.Contains(o.Remotes[:i], r):
			return o, fmt.Errorf("peer %s is given twice", r)
		}
		o.Remotes[i] = r
	}
	if !o.Local.Addr().IsValid() {
		o.Local = netip.AddrPortFrom(unspecified(o.Remotes[0].Addr().Is6()), port)
	}
	if o.Local.Port() == 0 {
		o.Local = netip.AddrPortFrom(o.Local.Addr(), port)
	}
	return o.checkNumbers()
}

func (o Options) checkNumbers() (Options, error) {
	switch {
	case o.Local.Addr().IsMulticast():
		return o, fmt.Errorf("local=%s is a group: it belongs to remote=", o.Local.Addr())
	case o.TTL < 0 || o.TTL > 255:
		return o, fmt.Errorf("time to live of %d hops, want 1 to 255", o.TTL)
	case o.Mode == Dgram && len(o.Remotes) != 1:
		return o, fmt.Errorf("dgram has one peer, not %d", len(o.Remotes))
	case o.Mode == Dgram && o.Local.Port() == 0:
		return o, errors.New("local=ADDR:PORT is missing: where the peer sends to")
	case o.VNI > maxVNI:
		return o, fmt.Errorf("vni %d, at most %d", o.VNI, maxVNI)
	case o.ZeroCopy == netdev.Off && (o.ZeroCopyMin != 0 || o.ZeroCopyPending != 0 || o.Engine != AnyEngine):
		return o, errors.New("zerocopy=off leaves nothing for zerocopy-min, zerocopy-pending and zerocopy-engine to say")
	case o.ZeroCopy == netdev.On && o.ZeroCopyMin != 0:
		return o, errors.New("zerocopy=on knows no least size: zerocopy-min is for auto")
	}
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	def(&o.ZeroCopyPending, DefaultZeroCopyPending)
	def(&o.Ports, DefaultPorts)
	if o.Drain == 0 {
		o.Drain = DefaultDrain
	}
	if o.ZeroCopy == netdev.On {
		o.ZeroCopyMin = 1
	}
	if o.ZeroCopyPending < 1 || o.ZeroCopyPending > maxPending || o.Ports < 1 || o.Ports > maxPorts {
		return o, fmt.Errorf("%d frames pending, want 1 to %d; %d ports, want 1 to %d", o.ZeroCopyPending, maxPending, o.Ports, maxPorts)
	}
	return o, nil
}

// least is the size in bytes from which frames leave without a copy, where def is the engine's default.
func (o *Options) least(def int) int {
	if o.ZeroCopyMin != 0 {
		return o.ZeroCopyMin
	}
	return def
}

// address reads 10.0.0.1, 10.0.0.1:4789, fd00::1 and [fd00::1]:4789.
func address(s string) (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return plain(netip.AddrPortFrom(a, 0))
	}
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		return a, errors.New("want an address like 10.0.0.1, 10.0.0.1:4789, [fd00::1]:4789 or fd00::1, for instance")
	}
	return plain(a)
}

func plain(a netip.AddrPort) (netip.AddrPort, error) {
	if a.Addr().Zone() != "" {
		return a, errors.New("no zone here: dev= names the interface")
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), nil
}

func parseRemotes(o *Options, v string) error {
	for s := range strings.SplitSeq(v, ";") {
		a, err := address(s)
		if err != nil {
			return err
		}
		o.Remotes = append(o.Remotes, a)
	}
	return nil
}

// parsePort sets the port that local= and remote= leave open. It may come before local=.
func parsePort(o *Options, v string) error {
	n, err := netopt.Number(v, 1, 65535)
	o.Port = uint16(n)
	return err
}

func parseLearning(o *Options, v string) error {
	on, err := netopt.OnOff(v)
	o.NoLearn = !on && err == nil
	return err
}

func parsePolicy(o *Options, v string) (err error) {
	o.ZeroCopy, err = netdev.ParsePolicy(v)
	return err
}
