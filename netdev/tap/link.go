package tap

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
)

// txQueueLen is the kernel's default length of a tap's queue, in frames.
const txQueueLen = 1000

// configure brings the interface into the state that o asks for and returns its MTU in bytes, 0 when that is unknown. What is already
// as it should be is not touched, so that an interface prepared by an administrator needs no privilege.
func configure(d *Device, o *Options) (mtu int, err error) {
	link, err := d.link()
	if link == nil {
		if o.MTU != 0 || o.Bridge != "" || o.MAC != nil || o.Up != nil {
			return 0, fmt.Errorf("%s: the interface cannot be set up from here: %w: do that where it is, and leave mtu, bridge, mac and up out", d, err)
		}
		return 0, nil
	}
	if tun, ok := link.(*netlink.Tuntap); ok && tun.Flags&netlink.TUNTAP_NO_PI == 0 {
		// TUNGETIFF does not tell: it has another meaning for the bit.
		return 0, fmt.Errorf("%s: it puts packet information in front of frames: whoever opens it must use IFF_NO_PI", d)
	}
	c := config{dev: d, link: link}
	if o.MAC != nil && !bytes.Equal(link.Attrs().HardwareAddr, o.MAC) {
		c.set("address "+o.MAC.String(), netlink.LinkSetHardwareAddr(link, o.MAC))
	}
	mtu = link.Attrs().MTU
	if o.MTU != 0 && mtu != o.MTU {
		c.set(fmt.Sprintf("mtu %d", o.MTU), netlink.LinkSetMTU(link, o.MTU))
		mtu = o.MTU
	}
	if link.Attrs().TxQLen == 0 {
		// It is the length of the queue to the guest: with 0 the kernel drops every frame.
		c.set(fmt.Sprintf("txqueuelen %d", txQueueLen), netlink.LinkSetTxQLen(link, txQueueLen))
	}
	if o.Bridge != "" {
		c.attach(o.Bridge)
	}
	isUp := link.Attrs().RawFlags&unix.IFF_UP != 0
	switch {
	case o.Up == nil && d.inherited:
	case (o.Up == nil || *o.Up) && !isUp:
		c.set("up", netlink.LinkSetUp(link))
	case o.Up != nil && !*o.Up && isUp:
		c.set("down", netlink.LinkSetDown(link))
	}
	return mtu, c.err
}

// link finds the interface, or returns nil and why: an inherited descriptor's can be in another network namespace, where
// another one may have its name here.
func (d *Device) link() (netlink.Link, error) {
	link, err := netlink.LinkByName(d.name)
	if err != nil {
		return nil, err
	}
	mac, err := sys.TunHardwareAddr(d.queues[0].fd)
	if err == nil && !bytes.Equal(mac, link.Attrs().HardwareAddr) {
		return nil, fmt.Errorf("the %s in this network namespace is another one", d.name)
	}
	return link, nil
}

// config sets properties of an interface; the first error is kept.
type config struct {
	dev  *Device
	link netlink.Link
	err  error
}

func (c *config) set(what string, err error) {
	if err != nil && c.err == nil {
		c.err = fmt.Errorf("%s: setting %s: %w: %s", c.dev, what, err, explainLink(err, c.dev.name, what))
	}
}

// explainLink says what to do when `ip link set NAME WHAT` fails.
func explainLink(err error, name, what string) string {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Sprintf("give vhostd CAP_NET_ADMIN, or run `ip link set %s %s` beforehand", name, what)
	case errors.Is(err, unix.ENETDOWN):
		return "the interface below it is down: set that up first"
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ERANGE):
		return fmt.Sprintf("the interface does not take it: `ip -d link show %s` lists its bounds", name)
	}
	return fmt.Sprintf("try `ip link set %s %s`", name, what)
}

// attach makes the interface a port of a bridge.
func (c *config) attach(bridge string) {
	if c.err != nil {
		return
	}
	master, err := netlink.LinkByName(bridge)
	switch {
	case err != nil:
		c.err = fmt.Errorf("%s: bridge %s: %w: create it with `ip link add %s type bridge && ip link set %s up`", c.dev, bridge, err, bridge, bridge)
	case master.Type() == "openvswitch":
		c.err = fmt.Errorf("%s: %s is an Open vSwitch bridge: leave bridge= out and run `ovs-vsctl add-port %s %s`", c.dev, bridge, bridge, c.dev.name)
	case master.Type() != "bridge":
		c.err = fmt.Errorf("%s: %s is a %s: name an interface of type bridge", c.dev, bridge, master.Type())
	case c.link.Attrs().MasterIndex == master.Attrs().Index:
	case c.link.Attrs().MasterIndex != 0:
		c.err = fmt.Errorf("%s: it is a port of another bridge: take it out with `ip link set %s nomaster`", c.dev, c.dev.name)
	default:
		c.set("master "+bridge, netlink.LinkSetMaster(c.link, master))
	}
}
