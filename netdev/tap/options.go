package tap

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/vhostd/vhostd/internal/netopt"
)

// Bounds of Options.
const (
	MaxQueues = 256   // queues of one tap (MAX_TAP_QUEUES)
	MinMTU    = 68    // bytes
	MaxMTU    = 65521 // bytes: an Ethernet frame of 65535
)

// Options say which tap to attach to, and how. At most one of Name, FDs and Macvtap is set; with none the kernel picks a name.
type Options struct {
	// Name of the tap, which is created if there is none.
	Name string
	// FDs are descriptors of a tap that somebody else has opened, one per queue. Open takes them over: they become non-blocking, and
	// are closed by Close, or by Open if it fails.
	FDs []int
	// Macvtap is a device node ("/dev/tap7") or the name of a macvtap interface.
	Macvtap string
	// Queues is the number of queue pairs; 0 is one, or one for each of FDs.
	Queues int
	// Bridge is the interface's master, or "" for what it has already.
	Bridge string
	// MTU of the interface in bytes, 0 for what it has already.
	MTU int
	// MAC is the address of the host's interface, nil for what it has already. With Macvtap it is the one that the guest must have.
	MAC net.HardwareAddr
	// Up sets the interface up or down; nil is up, except with FDs, where it is left alone.
	Up *bool
	// Persist lets the tap outlive vhostd.
	Persist bool
	// IOUring says when frames are handed to the kernel many at a time.
	IOUring Batching
}

// Batching says when frames from the guest go to the kernel many at a time, through an io_uring.
type Batching uint8

const (
	BatchAuto   Batching = iota // from a few frames on, where the host has what it takes
	BatchAlways                 // even single ones; a host that lacks what it takes is an error
	BatchNever                  // a system call for every frame
)

// keys are the options in a string.
var keys = netopt.Keys[Options]{
	{Name: "queues", Value: "N", Set: func(o *Options, v string) (err error) { o.Queues, err = netopt.Number(v, 1, MaxQueues); return }},
	{Name: "bridge", Value: "NAME", Set: func(o *Options, v string) error { o.Bridge = v; return netopt.CheckInterface(v) }},
	{Name: "mtu", Value: "BYTES", Set: func(o *Options, v string) (err error) { o.MTU, err = netopt.Number(v, MinMTU, MaxMTU); return }},
	{Name: "mac", Value: "ADDRESS", Set: parseMAC},
	{Name: "up", Value: "on|off", Set: func(o *Options, v string) error { up, err := netopt.OnOff(v); o.Up = &up; return err }},
	{Name: "persist", Value: "on|off", Bare: "on", Set: func(o *Options, v string) (err error) { o.Persist, err = netopt.OnOff(v); return }},
	{Name: "io-uring", Value: "auto|on|off", Set: parseBatching},
	{Name: "fd", Value: "N", Set: parseFDs},
	{Name: "fds", Value: "N:N...", Set: parseFDs},
	{Name: "macvtap", Value: "/dev/tapN|NAME", Set: func(o *Options, v string) error { o.Macvtap = v; return checkMacvtap(v) }},
}

// ParseOptions reads the form of the command line, with or without the leading "tap:" : vnet0,bridge=br0,mtu=9000,queues=2.
func ParseOptions(s string) (Options, error) {
	o, err := parse(s)
	if err != nil {
		return Options{}, fmt.Errorf("tap options %q: %w", s, err)
	}
	return o, nil
}

func parse(s string) (o Options, err error) {
	s, _ = strings.CutPrefix(s, "tap:")
	if s == "tap" || s == "" {
		return o, nil
	}
	parts := strings.Split(s, ",")
	if !strings.Contains(parts[0], "=") {
		o.Name = parts[0]
		if err := netopt.CheckInterface(o.Name); err != nil {
			return o, err
		}
		parts = parts[1:]
	}
	if _, err := keys.Parse(&o, slices.Values(parts)); err != nil {
		return o, err
	}
	return o, o.check()
}

// check looks for what contradicts itself.
func (o *Options) check() error {
	ways := 0
	for _, set := range []bool{o.Name != "", len(o.FDs) > 0, o.Macvtap != ""} {
		if set {
			ways++
		}
	}
	switch {
	case ways > 1:
		return errors.New("a name, fd=, fds= and macvtap= exclude each other")
	case len(o.FDs) > 0 && o.Queues != 0 && o.Queues != len(o.FDs):
		return fmt.Errorf("queues=%d, but %d descriptors are given: there is one queue for each", o.Queues, len(o.FDs))
	case o.Queues < 0 || o.Queues > MaxQueues || len(o.FDs) > MaxQueues:
		return fmt.Errorf("%d queues: want 1 to %d", max(o.Queues, len(o.FDs)), MaxQueues)
	case o.Persist && o.Macvtap != "":
		return errors.New("a macvtap persists by itself: leave persist out")
	}
	return nil
}

func parseBatching(o *Options, v string) error {
	i := slices.Index([]string{"auto", "on", "off"}, v)
	if i < 0 {
		return errors.New("want auto, on or off")
	}
	o.IOUring = Batching(i)
	return nil
}

func parseMAC(o *Options, v string) error {
	mac, err := net.ParseMAC(v)
	if err != nil || len(mac) != 6 {
		return errors.New("want an address like 52:54:00:12:34:56")
	}
	if mac[0]&1 != 0 {
		return errors.New("that is a multicast address: its first byte must be even")
	}
	o.MAC = mac
	return nil
}

func parseFDs(o *Options, v string) error {
	if o.FDs != nil {
		return errors.New("give either fd= or fds=")
	}
	for s := range strings.SplitSeq(v, ":") {
		fd, err := netopt.Number(s, 0, 1<<20)
		if err != nil {
			return errors.New("want descriptor numbers, with colons between them")
		}
		if slices.Contains(o.FDs, fd) {
			return fmt.Errorf("descriptor %d is given twice", fd)
		}
		o.FDs = append(o.FDs, fd)
	}
	return nil
}

func checkMacvtap(v string) error {
	if strings.HasPrefix(v, "/") {
		return nil
	}
	return netopt.CheckInterface(v)
}
