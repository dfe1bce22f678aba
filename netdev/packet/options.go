package packet

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/netopt"
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

// keys are the options in a string.
var keys = netopt.Keys[Options]{
	{Name: "queues", Value: "N", Set: func(o *Options, v string) (err error) { o.Queues, err = netopt.Number(v, 1, MaxQueues); return }},
	{Name: "fanout", Value: "hash|cpu|qm", Set: parseFanout},
	{Name: "mtu", Value: "BYTES", Set: func(o *Options, v string) (err error) { o.MTU, err = netopt.Number(v, MinMTU, MaxMTU); return }},
	{Name: "promisc", Value: "on|off", Set: func(o *Options, v string) error { on, err := netopt.OnOff(v); o.NoPromisc = !on; return err }},
	{Name: "vnet-hdr", Value: "on|off", Set: func(o *Options, v string) error { on, err := netopt.OnOff(v); o.NoVnetHdr = !on; return err }},
	{Name: "qdisc-bypass", Value: "on|off", Set: func(o *Options, v string) (err error) { o.QdiscBypass, err = netopt.OnOff(v); return }},
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
	parts := strings.Split(s, ",")
	o.Interface = parts[0]
	given, err := keys.Parse(&o, slices.Values(parts[1:]))
	if err != nil {
		return o, err
	}
	if given["fanout"] && o.Queues < 2 {
		return o, errors.New("fanout= is for several queue pairs: add queues=N")
	}
	return o, o.check()
}

// check holds Options that no string was parsed for to the same bounds.
func (o *Options) check() error {
	switch {
	case !netopt.IsInterface(o.Interface):
		return fmt.Errorf("%q is no interface name: want packet:NAME, of 1 to %d characters without blanks, slashes and colons", o.Interface, netopt.MaxInterface)
	case o.Queues < 0 || o.Queues > MaxQueues:
		return fmt.Errorf("%d queues: want 1 to %d", o.Queues, MaxQueues)
	case o.MTU != 0 && (o.MTU < MinMTU || o.MTU > MaxMTU):
		return fmt.Errorf("mtu %d: want %d to %d", o.MTU, MinMTU, MaxMTU)
	case o.Fanout != Hash && o.Fanout != CPU && o.Fanout != QM:
		return fmt.Errorf("fanout %v is unknown", o.Fanout)
	}
	return nil
}

func parseFanout(o *Options, v string) error {
	f, ok := fanouts[v]
	if !ok {
		return errors.New("want hash, cpu or qm")
	}
	o.Fanout = f
	return nil
}
