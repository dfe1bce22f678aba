package tap

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// shown is a name for people.
func shown(name string) string {
	if name == "" {
		return "(name picked by the kernel)"
	}
	return name
}

// openError is a device node that cannot be opened.
type openError struct {
	path string
	err  error
}

func (e *openError) Error() string {
	return fmt.Sprintf("opening %s: %v: %s", e.path, e.err, explainOpen(e.err, e.path))
}

func (e *openError) Unwrap() error { return e.err }

// explainOpen says what to do when a device node cannot be opened.
func explainOpen(err error, path string) string {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return "is the driver there? Try `modprobe tun` (or `modprobe macvtap`); a container needs the node passed in"
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Sprintf("this user may not open it: try `setfacl -m u:$USER:rw %s`; a container's device rules must allow it too", path)
	case errors.Is(err, unix.EBUSY):
		return "somebody else holds all of its queues: stop that process"
	}
	return "see `vhostd doctor`"
}

// explainAttach says what to do when TUNSETIFF fails for n queues of the tap called name.
func explainAttach(err error, name string, n int) string {
	multi := ""
	if n > 1 {
		multi = " multi_queue"
	}
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Sprintf("give vhostd CAP_NET_ADMIN, or make the tap for its user beforehand: "+
			"`ip tuntap add dev %s mode tap user $USER vnet_hdr%s`", orExample(name), multi)
	case errors.Is(err, unix.EBUSY):
		return "another process holds it: stop that one, or use another name (`fuser -v /dev/net/tun` lists the candidates)"
	case errors.Is(err, unix.E2BIG):
		return fmt.Sprintf("it has no room for %d more queues: lower queues=", n)
	case errors.Is(err, unix.EINVAL):
		return explainMismatch(name, n)
	}
	return "see `vhostd doctor`"
}

func orExample(name string) string {
	if name == "" {
		return "vnet0"
	}
	return name
}

// explainMismatch says why the kernel will not take an interface that exists for the tap that was asked for.
func explainMismatch(name string, n int) string {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return "the kernel refuses these flags: it may be too old for a virtio-net header"
	}
	tun, ok := link.(*netlink.Tuntap)
	switch {
	case !ok:
		return fmt.Sprintf("the interface is a %s: use another name, or macvtap= for a macvtap", link.Type())
	case tun.Mode != netlink.TUNTAP_MODE_TAP:
		return "the interface is a tun, which carries no Ethernet frames: use another name"
	case n > 1 && tun.Flags&netlink.TUNTAP_MULTI_QUEUE == 0:
		return fmt.Sprintf("it exists with a single queue: use queues=1, or remove it and add it with `ip tuntap add dev %s mode tap multi_queue`", name)
	}
	return "see `ip -d link show " + name + "`"
}

// isMultiQueue reports whether the tap exists and was made for several queues.
func isMultiQueue(name string) bool {
	if name == "" {
		return false
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return false
	}
	tun, ok := link.(*netlink.Tuntap)
	return ok && tun.Flags&netlink.TUNTAP_MULTI_QUEUE != 0
}

// explainFD says what is wrong with an inherited descriptor.
func explainFD(err error) string {
	switch {
	case errors.Is(err, unix.EBADF):
		return "it is not open here: the parent must leave it open across exec (no FD_CLOEXEC)"
	case errors.Is(err, unix.EBADFD):
		return "no interface is attached to it, or the interface is gone: TUNSETIFF comes before it is passed on"
	}
	return "it is no tap: pass the descriptor of /dev/net/tun after TUNSETIFF, or of /dev/tapN"
}
