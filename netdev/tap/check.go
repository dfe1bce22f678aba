package tap

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/netdev"
)

// Check finds out what this host can do for taps. It creates and changes nothing.
func Check() []netdev.Fact {
	facts := []netdev.Fact{checkNetAdmin()}
	fd, err := openNode(sys.TunPath)
	if err != nil {
		return append(facts, netdev.Fact{What: sys.TunPath, Detail: errors.Unwrap(err).Error(), Fix: explainOpen(err, sys.TunPath)})
	}
	defer unix.Close(fd)
	facts = append(facts, netdev.Fact{What: sys.TunPath, OK: true, Detail: "opens"})
	return append(facts, checkFeatures(fd))
}

func checkFeatures(fd int) netdev.Fact {
	f := netdev.Fact{What: "tap features"}
	flags, err := sys.TunFeatures(fd)
	if err != nil {
		f.Detail, f.Fix = fmt.Sprintf("TUNGETFEATURES: %v", err), "use a kernel that has it (2.6.27 or newer)"
		return f
	}
	var have, lack []string
	for _, x := range []struct {
		name string
		flag uint16
	}{
		{"Ethernet frames", sys.TunTap}, {"virtio-net header", sys.TunVnetHdr}, {"several queues", sys.TunMultiQueue},
	} {
		if flags&x.flag != 0 {
			have = append(have, x.name)
		} else {
			lack = append(lack, x.name)
		}
	}
	f.OK, f.Detail = len(lack) == 0, strings.Join(have, ", ")
	if !f.OK {
		f.Detail += "; without " + strings.Join(lack, ", ")
		f.Fix = "use a kernel that has them (3.8 or newer)"
	}
	return f
}

// checkNetAdmin looks for CAP_NET_ADMIN among the thread's effective capabilities.
func checkNetAdmin() netdev.Fact {
	f := netdev.Fact{What: "CAP_NET_ADMIN", Fix: "needed to create taps and to set them up: run as root, set AmbientCapabilities=CAP_NET_ADMIN in the " +
		"systemd unit, or make the tap beforehand: `ip tuntap add dev vnet0 mode tap user $USER vnet_hdr && ip link set vnet0 up`"}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		f.Detail = fmt.Sprintf("capget: %v", err)
		return f
	}
	if data[0].Effective&(1<<unix.CAP_NET_ADMIN) == 0 {
		f.Detail = "not held: only taps made for this user can be used, as they are"
		return f
	}
	return netdev.Fact{What: f.What, OK: true, Detail: "held"}
}
