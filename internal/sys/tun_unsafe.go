package sys

import (
	"net"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ifreqHwaddr is struct ifreq with a struct sockaddr in its union (include/uapi/linux/if.h).
type ifreqHwaddr struct {
	name   [unix.IFNAMSIZ]byte
	family uint16
	data   [14]byte
	_      [8]byte
}

// TunHardwareAddr returns the MAC address of the interface that fd is a queue of, in whatever network namespace it is.
func TunHardwareAddr(fd int) (net.HardwareAddr, error) {
	var ifr ifreqHwaddr
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCGIFHWADDR, uintptr(unsafe.Pointer(&ifr)))
	if errno != 0 {
		return nil, errno
	}
	return net.HardwareAddr(ifr.data[:6:6]), nil
}
