package xdp

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

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

// keys are the options in a string, in the order in which they are listed to people.
var keys = []struct {
	name, value string
	parse       func(*Options, string) error
}{
	{"queue", "N", func(o *Options, v string) (err error) { o.Queue, err = number(v, 0, maxQueue); return }},
	{"mode", strings.Join(modes, "|"), parseMode},
	{"mtu", "BYTES", func(o *Options, v string) (err error) { o.MTU, err = number(v, minMTU, maxMTU); return }},
	{"promisc", "on|off", func(o *Options, v string) error { on, err := onOff(v); o.NoPromisc = !on; return err }},
	{"no-balloon", "on|off", func(o *Options, v string) (err error) { o.NoBalloon, err = onOff(v); return }},
	{"zerocopy", "auto|on|off", func(o *Options, v string) (err error) { o.ZeroCopy, err = netdev.ParsePolicy(v); return }},
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
	if o.Name = name; len(name) >= unix.IFNAMSIZ || strings.ContainsAny(name, "/: \t\n\v\f\r") {
		return o, fmt.Errorf("%q is no interface name: want 1 to %d characters without blanks, slashes and colons", name, unix.IFNAMSIZ-1)
	}
	seen := map[string]bool{}
	for part := range strings.SplitSeq(rest, ",") {
		key, value, ok := strings.Cut(part, "=")
		switch {
		case part == "":
			continue
		case !ok:
			return o, fmt.Errorf("%q: want KEY=VALUE, of %s", part, known())
		case seen[key]:
			return o, fmt.Errorf("%s is given twice", key)
		}
		seen[key] = true
		if err := o.set(key, value); err != nil {
			return o, err
		}
	}
	return o, nil
}

func (o *Options) set(key, value string) error {
	for _, k := range keys {
		if k.name != key {
			continue
		}
		if err := k.parse(o, value); err != nil {
			return fmt.Errorf("%s=%s: %w", key, value, err)
		}
		return nil
	}
	return fmt.Errorf("unknown key %q: known are %s", key, known())
}

func known() string {
	var list []string
	for _, k := range keys {
		list = append(list, k.name+"="+k.value)
	}
	return strings.Join(list, ", ")
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

func number(s string, lo, hi int) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < lo || n > hi {
		return 0, fmt.Errorf("want a number from %d to %d", lo, hi)
	}
	return n, nil
}

func onOff(s string) (bool, error) {
	switch s {
	case "on":
		return true, nil
	case "off":
		return false, nil
	}
	return false, errors.New("want on or off")
}

func parseMode(o *Options, v string) error {
	i := slices.Index(modes, v)
	if i < 0 {
		return fmt.Errorf("want one of %s", strings.Join(modes, ", "))
	}
	o.Mode = Mode(i)
	return nil
}
