package packet

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Bounds of Options.
const (
	MaxQueues = 64
	MinMTU    = 68    // bytes
	MaxMTU    = 65521 // bytes: an Ethernet frame of 65535
)

// Options say which interface to attach to, and how.
type Options struct {
	// Interface is the name of an interface that is there and up.
	Interface string
	// Queues is the number of queue pairs; 0 is one.
	Queues int
	// Fanout says how received frames are spread over several queue pairs.
	Fanout Fanout
	// MTU of the guest in bytes, 0 for the interface's. An interface with a smaller one is set to it.
	MTU int
	// NoPromisc: the interface lets in what is addressed to its own MAC address only, which the guest then must have.
	NoPromisc bool
	// NoVnetHdr: there is no virtio-net header between vhostd and the kernel, and so no offload: frames that come in with one are lost.
	NoVnetHdr bool
	// QdiscBypass: frames go to the driver at once, past the interface's queueing discipline.
	QdiscBypass bool
}

// Fanout is a way to spread received frames over queue pairs. All keep the order within a flow.
type Fanout int

// The ways to spread frames.
const (
	Hash Fanout = unix.PACKET_FANOUT_HASH // by flow
	CPU  Fanout = unix.PACKET_FANOUT_CPU  // by the processor that received the frame
	QM   Fanout = unix.PACKET_FANOUT_QM   // by the receive queue of the network card
)

var fanouts = map[string]Fanout{"hash": Hash, "cpu": CPU, "qm": QM}

// String is the name in options.
func (f Fanout) String() string {
	for name, v := range fanouts {
		if v == f {
			return name
		}
	}
	return strconv.Itoa(int(f))
}

// keys are the options in a string, in the order in which they are listed to people.
var keys = []struct {
	name, value string
	parse       func(*Options, string) error
}{
	{"queues", "N", func(o *Options, v string) (err error) { o.Queues, err = number(v, 1, MaxQueues); return }},
	{"fanout", "hash|cpu|qm", parseFanout},
	{"mtu", "BYTES", func(o *Options, v string) (err error) { o.MTU, err = number(v, MinMTU, MaxMTU); return }},
	{"promisc", "on|off", func(o *Options, v string) error { on, err := onOff(v); o.NoPromisc = !on; return err }},
	{"vnet-hdr", "on|off", func(o *Options, v string) error { on, err := onOff(v); o.NoVnetHdr = !on; return err }},
	{"qdisc-bypass", "on|off", func(o *Options, v string) (err error) { o.QdiscBypass, err = onOff(v); return }},
}

// ParseOptions reads the form of the command line, with or without the leading "packet:" : eth1,queues=2,fanout=hash.
func ParseOptions(s string) (Options, error) {
	o, err := parse(s)
	if err != nil {
		return Options{}, fmt.Errorf("packet options %q: %w", s, err)
	}
	return o, nil
}

func parse(s string) (o Options, err error) {
	if s, _ = strings.CutPrefix(s, "packet:"); s == "packet" {
		s = ""
	}
	seen := map[string]bool{}
	for i, part := range strings.Split(s, ",") {
		key, value, ok := strings.Cut(part, "=")
		switch {
		case i == 0:
			o.Interface = part
			continue
		case !ok:
			return o, fmt.Errorf("%q: want KEY=VALUE, of %s", part, knownKeys())
		case seen[key]:
			return o, fmt.Errorf("%s is given twice", key)
		}
		seen[key] = true
		if err := o.set(key, value); err != nil {
			return o, err
		}
	}
	if seen["fanout"] && o.Queues < 2 {
		return o, errors.New("fanout= is for several queue pairs: add queues=N")
	}
	return o, o.check()
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
	return fmt.Errorf("unknown key %q: known are %s", key, knownKeys())
}

func knownKeys() string {
	var list []string
	for _, k := range keys {
		list = append(list, k.name+"="+k.value)
	}
	return strings.Join(list, ", ")
}

// check holds Options that no string was parsed for to the same bounds.
func (o *Options) check() error {
	if err := checkName(o.Interface); err != nil {
		return err
	}
	switch {
	case o.Queues < 0 || o.Queues > MaxQueues:
		return fmt.Errorf("%d queues: want 1 to %d", o.Queues, MaxQueues)
	case o.MTU != 0 && (o.MTU < MinMTU || o.MTU > MaxMTU):
		return fmt.Errorf("mtu %d: want %d to %d", o.MTU, MinMTU, MaxMTU)
	case o.Fanout != Hash && o.Fanout != CPU && o.Fanout != QM:
		return fmt.Errorf("fanout %v is unknown", o.Fanout)
	}
	return nil
}

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

func parseFanout(o *Options, v string) error {
	f, ok := fanouts[v]
	if !ok {
		return errors.New("want hash, cpu or qm")
	}
	o.Fanout = f
	return nil
}

// checkName holds a name to the kernel's rule for interfaces (dev_valid_name).
func checkName(s string) error {
	if s == "" || len(s) >= unix.IFNAMSIZ || s == "." || s == ".." || strings.ContainsAny(s, "/: \t\n\v\f\r") {
		return fmt.Errorf("%q is no interface name: want packet:NAME, of 1 to %d characters without blanks, slashes and colons", s, unix.IFNAMSIZ-1)
	}
	return nil
}
