package tap

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
)

// openMacvtap opens the macvtap of a device node or interface name n times: each is a queue of its own.
func openMacvtap(s string, n int) (*Device, error) {
	node, link, err := macvtapNode(s)
	if err != nil {
		return nil, err
	}
	d := &Device{macvtap: true, multi: true}
	for range n {
		fd, err := openNode(node)
		if err != nil {
			d.Close()
			return nil, err
		}
		d.queues = append(d.queues, newQueue(fd, hdrSize))
		// The name does not matter: the node is the interface's.
		if _, err = sys.TunSetIff(fd, "", sys.TunTap|sys.TunNoPI|sys.TunVnetHdr); err == nil {
			d.name, _, err = sys.TunGetIff(fd)
		}
		if err != nil {
			d.Close()
			return nil, fmt.Errorf("macvtap %s: %w: is it the node of a macvtap interface?", node, err)
		}
	}
	d.mark()
	if err := d.checkNode(node, link); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// macvtapNode returns the device node of a macvtap interface: /dev/tap and the interface's index. link is nil if s is a node already.
func macvtapNode(s string) (node string, link netlink.Link, err error) {
	if strings.HasPrefix(s, "/") {
		return s, nil, nil
	}
	link, err = netlink.LinkByName(s)
	if err != nil {
		return "", nil, fmt.Errorf("macvtap %s: %w: create it with `ip link add %s link DEVICE type macvtap mode bridge`", s, err, s)
	}
	if t := link.Type(); t != "macvtap" && t != "ipvtap" {
		return "", nil, fmt.Errorf("macvtap %s: the interface is a %s: use one of type macvtap", s, t)
	}
	return "/dev/tap" + strconv.Itoa(link.Attrs().Index), link, nil
}

// checkNode makes sure that the node is that of link: interfaces of two network namespaces can have the same index, but only one of
// them gets the node that is named after it.
func (d *Device) checkNode(node string, link netlink.Link) error {
	if link == nil {
		return nil
	}
	mac, err := sys.TunHardwareAddr(d.queues[0].fd)
	if err != nil {
		return fmt.Errorf("%s: its address: %w", d, err)
	}
	a := link.Attrs()
	if d.name != a.Name || !bytes.Equal(mac, a.HardwareAddr) {
		return fmt.Errorf("macvtap %s: %s belongs to %s with address %v in another network namespace: make a node for this one with "+
			"`mknod PATH c NUMBERS` (they are in /sys/class/net/%s/tap%d/dev) and pass macvtap=PATH", a.Name, node, d.name, mac, a.Name, a.Index)
	}
	return nil
}

// isMacvtapFD reports whether fd is a macvtap's node, not the one that all taps are made from.
func isMacvtapFD(fd int) bool {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return false
	}
	const miscMajor, tunMinor = 10, 200
	return unix.Major(st.Rdev) != miscMajor || unix.Minor(st.Rdev) != tunMinor
}
