package xdp

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vhostd/vhostd/internal/netopt"
	"github.com/vhostd/vhostd/netdev"
)

// Mode says which of the ways to attach are tried.
type Mode uint8

// The modes. In all of them but ZeroCopy the kernel may copy.
const (
	Auto     Mode = iota // in the driver, else in the kernel's stack; zero-copy where the driver has it
	Native               // in the driver; zero-copy where it has it
	Generic              // in the kernel's stack, which every interface can
	Copy                 // as Auto, never zero-copy
	ZeroCopy             // in the driver, and zero-copy
)

var modes = []string{"auto", "native", "generic", "copy", "zerocopy"}

// String is the mode's name in options.
func (m Mode) String() string { return modes[m] }

// DefaultDrain is how long frames in flight are waited for.
const DefaultDrain = time.Second

// AllQueues stands for every queue of the interface.
const AllQueues = -1

// Bounds of Options.
const (
	maxQueue = 4095
	minMTU   = 68
	maxMTU   = 65521
)

// Options say which interface to attach to, and how.
type Options struct {
	Name  string // of the interface
	Queue int    // of the interface: the one that the guest gets, or AllQueues
	Mode  Mode
	// MTU of the guest in bytes; 0 is the interface's, which is the most that it can be.
	MTU int
	// NoPromisc: the interface takes only frames for its own address, which the guest must have then.
	NoPromisc bool
	// NoBalloon is the user's word that the VMM never takes a page from the guest: its memory may be registered.
	NoBalloon bool
	// ZeroCopy Off has frames copied whatever NoBalloon says; On wants guest memory registered, or no device.
	ZeroCopy netdev.Policy
	Drain    time.Duration // that frames in flight are waited for, at most; 0 is DefaultDrain
}

// keys are the options in a string.
var keys = netopt.Keys[Options]{
	{Name: "queue", Value: "N", Set: func(o *Options, v string) (err error) { o.Queue, err = netopt.Number(v, 0, maxQueue); return }},
	{Name: "mode", Value: strings.Join(modes, "|"), Set: parseMode},
	{Name: "mtu", Value: "BYTES", Set: func(o *Options, v string) (err error) { o.MTU, err = netopt.Number(v, minMTU, maxMTU); return }},
	{Name: "promisc", Value: "on|off", Set: func(o *Options, v string) error { on, err := netopt.OnOff(v); o.NoPromisc = !on; return err }},
	{Name: "no-balloon", Value: "on|off", Set: func(o *Options, v string) (err error) { o.NoBalloon, err = netopt.OnOff(v); return }},
	{Name: "zerocopy", Value: "auto|on|off", Set: func(o *Options, v string) (err error) { o.ZeroCopy, err = netdev.ParsePolicy(v); return }},
}

// ParseOptions reads the form of the command line, with or without the leading "xdp:" : eth1,queue=3,mode=zerocopy,no-balloon=on.
func ParseOptions(s string) (Options, error) {
	o, err := parse(s)
	if err != nil {
		return Options{}, fmt.Errorf("xdp options %q: %w", s, err)
	}
	return o, nil
}

func parse(s string) (Options, error) {
	o := Options{Queue: AllQueues}
	s, _ = strings.CutPrefix(s, "xdp:")
	name, rest, _ := strings.Cut(s, ",")
	if name == "xdp" || name == "" || strings.Contains(name, "=") {
		return o, errors.New("name an interface: xdp:NAME")
	}
	o.Name = name
	if err := netopt.CheckInterface(name); err != nil {
		return o, err
	}
	_, err := keys.Parse(&o, netopt.Split(rest))
	return o, err
}

// check looks for what contradicts itself.
func (o *Options) check() error {
	switch {
	case o.Name == "":
		return errors.New("no interface is named")
	case o.Queue < AllQueues || o.Queue > maxQueue:
		return fmt.Errorf("queue %d: want 0 to %d", o.Queue, maxQueue)
	case o.ZeroCopy == netdev.On && !o.NoBalloon:
		return errors.New("zerocopy=on: frames leave from the guest's pages only where its memory may be registered: add no-balloon=on if the VM has no balloon")
	}
	return nil
}

// registers reports whether guest memory is to be registered.
func (o *Options) registers() bool { return o.NoBalloon && o.ZeroCopy != netdev.Off }

func parseMode(o *Options, v string) error {
	i := slices.Index(modes, v)
	if i < 0 {
		return fmt.Errorf("want one of %s", strings.Join(modes, ", "))
	}
	o.Mode = Mode(i)
	return nil
}
