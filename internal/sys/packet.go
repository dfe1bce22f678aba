package sys

import (
	"encoding/binary"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// PacketFanoutIgnoreOutgoing is PACKET_FANOUT_FLAG_IGNORE_OUTGOING (include/uapi/linux/if_packet.h): a group listens for all of its
// sockets, so that their own PACKET_IGNORE_OUTGOING has no say.
const PacketFanoutIgnoreOutgoing = 0x4000

// PacketBind attaches a packet socket to an interface, for frames of all protocols.
func PacketBind(fd, ifindex int) error {
	proto := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
	return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: ifindex})
}

// PacketIndex is the index of the interface that a packet socket is bound to: negative when that interface is gone.
func PacketIndex(fd int) (int, error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return 0, err
	}
	ll, ok := sa.(*unix.SockaddrLinklayer)
	if !ok {
		return 0, unix.EAFNOSUPPORT
	}
	return int(int32(ll.Ifindex)), nil
}

// PacketFanoutNew makes a group of packet sockets that share the frames of their interface, with this one as its first, and returns its number.
func PacketFanoutNew(fd, mode int) (group uint16, err error) {
	err = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_FANOUT, (mode|unix.PACKET_FANOUT_FLAG_UNIQUEID|PacketFanoutIgnoreOutgoing)<<16)
	if err != nil {
		return 0, err
	}
	v, err := unix.GetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_FANOUT)
	return uint16(v), err
}

// PacketFanoutJoin adds a packet socket to a group of PacketFanoutNew. Older kernels want its interface to be up.
func PacketFanoutJoin(fd, mode int, group uint16) error {
	return unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_FANOUT, int(int32(uint32(mode|PacketFanoutIgnoreOutgoing)<<16|uint32(group))))
}

// PacketKick has the kernel send what is requested in the transmit ring of a non-blocking packet socket. It stops at the first frame that
// it cannot send now, or ever.
func PacketKick(fd int) syscall.Errno {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_SENDTO, uintptr(fd), 0, 0, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// Interface is what the kernel says of a network interface.
type Interface struct {
	Index, MTU int
	Ethernet   bool // its frames begin with an Ethernet header
	Up         bool
}

// InterfaceByName looks an interface up in the network namespace of the socket fd.
func InterfaceByName(fd int, name string) (i Interface, err error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return i, fmt.Errorf("interface name %q: %w", name, err)
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr); err != nil {
		return i, err
	}
	i.Index = int(ifr.Uint32())
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFMTU, ifr); err != nil {
		return i, err
	}
	i.MTU = int(ifr.Uint32())
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFHWADDR, ifr); err != nil {
		return i, err
	}
	i.Ethernet = ifr.Uint16() == unix.ARPHRD_ETHER || ifr.Uint16() == unix.ARPHRD_LOOPBACK
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr); err != nil {
		return i, err
	}
	i.Up = ifr.Uint16()&unix.IFF_UP != 0
	return i, nil
}

// InterfaceName is the present name of an interface in the network namespace of the socket fd.
func InterfaceName(fd, index int) (string, error) {
	var ifr unix.Ifreq
	ifr.SetUint32(uint32(index))
	// The kernel takes the index from where it puts all other values.
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFNAME, &ifr); err != nil {
		return "", err
	}
	return ifr.Name(), nil
}

// SetInterfaceMTU sets the MTU of an interface in bytes.
func SetInterfaceMTU(fd int, name string, mtu int) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("interface name %q: %w", name, err)
	}
	ifr.SetUint32(uint32(mtu))
	return unix.IoctlIfreq(fd, unix.SIOCSIFMTU, ifr)
}

// LinkMonitor opens a descriptor that becomes readable when an interface changes its state in the network namespace of the caller. What it
// says is read with DrainMonitor and says no more than that.
func LinkMonitor() (fd int, err error) {
	fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_LINK}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// DrainMonitor reads away what a LinkMonitor has said so far.
func DrainMonitor(fd int) {
	var b [1]byte // the rest of a message goes with its first byte
	for {
		if _, _, err := unix.Recvfrom(fd, b[:], unix.MSG_DONTWAIT); err != nil && err != unix.EINTR && err != unix.ENOBUFS {
			return
		}
	}
}
