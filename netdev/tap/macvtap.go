package tap

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
)

// openMacvtap opens the macvtap of a device node or interface name n times: each is a queue of its own.
func openMacvtap(node string, n int) (*Device, error) {
	node, err := macvtapNode(node)
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
	return d, nil
}

// macvtapNode returns the device node of a macvtap interface: /dev/tap and the interface's index.
func macvtapNode(s string) (string, error) {
	if strings.HasPrefix(s, "/") {
		return s, nil
	}
	link, err := netlink.LinkByName(s)
	if err != nil {
		return "", fmt.Errorf("macvtap %s: %w: create it with `ip link add %s link DEVICE type macvtap mode bridge`", s, err, s)
	}
	if t := link.Type(); t != "macvtap" && t != "ipvtap" {
		return "", fmt.Errorf("macvtap %s: the interface is a %s: use one of type macvtap", s, t)
	}
	index := link.Attrs().Index
	node := "/dev/tap" + strconv.Itoa(index)
	return node, checkNode(s, node, index)
}

// checkNode compares the device number of a node with the one that the interface has: interfaces of two network namespaces can have
// the same index, and only one of them gets the node.
func checkNode(name, node string, index int) error {
	b, err := os.ReadFile(fmt.Sprintf("/sys/class/net/%s/tap%d/dev", name, index))
	if err != nil {
		return nil // this sysfs is another namespace's: there is nothing to compare with
	}
	want := strings.TrimSpace(string(b))
	major, minor, _ := strings.Cut(want, ":")
	var st unix.Stat_t
	if err := unix.Stat(node, &st); err != nil {
		return fmt.Errorf("macvtap %s: %s: %w: make it with `mknod %s c %s %s`", name, node, err, node, major, minor)
	}
	if got := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)); got != want {
		return fmt.Errorf("macvtap %s: %s is device %s, the interface's is %s: make another node with `mknod PATH c %s %s` and pass macvtap=PATH",
			name, node, got, want, major, minor)
	}
	return nil
}

// isMacvtapFD reports whether fd is a macvtap's node, not the one that all taps are made from.
func isMacvtapFD(fd int) bool {
	var st, tun unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return false
	}
	if unix.Stat(sys.TunPath, &tun) == nil {
		return st.Rdev != tun.Rdev
	}
	const miscMajor, tunMinor = 10, 200
	return unix.Major(st.Rdev) != miscMajor || unix.Minor(st.Rdev) != tunMinor
}
