package sys

import (
	"fmt"
	"math"

	"golang.org/x/sys/unix"
)

// TunPath is the device node from which taps are made.
const TunPath = "/dev/net/tun"

// TunQueueFlags are the flags of TunIFF that say what a queue is.
const (
	TunTap        = unix.IFF_TAP         // Ethernet frames; without it IP packets
	TunNoPI       = unix.IFF_NO_PI       // no struct tun_pi in front of every frame
	TunVnetHdr    = unix.IFF_VNET_HDR    // a virtio-net header in front of every frame
	TunMultiQueue = unix.IFF_MULTI_QUEUE // several descriptors, one queue each
)

// TunSetIff makes fd a queue of the tap called name, which is created if there is none, and returns its name: the kernel
// replaces a %d in it.
func TunSetIff(fd int, name string, flags uint16) (string, error) {
	ifr, err := tunIfreq(name)
	if err != nil {
		return "", err
	}
	ifr.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return "", err
	}
	return ifr.Name(), nil
}

// tunIfreq is unix.NewIfreq that takes no name, for which the kernel picks one.
func tunIfreq(name string) (*unix.Ifreq, error) {
	if name == "" {
		return new(unix.Ifreq), nil
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return nil, fmt.Errorf("interface name %q: %w", name, err)
	}
	return ifr, nil
}

// TunGetIff returns the name and the flags of the interface that fd is a queue of. It fails with EBADFD when there is none, or no longer, and
// with ENOTTY when fd is something else. TunNoPI is not among them: the bit stands for the absence of a filter here.
func TunGetIff(fd int) (name string, flags uint16, err error) {
	var ifr unix.Ifreq
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, &ifr); err != nil {
		return "", 0, err
	}
	return ifr.Name(), ifr.Uint16(), nil
}

// TunSetQueue attaches fd to the queues that the kernel spreads frames over, as the last of them, or detaches it.
func TunSetQueue(fd int, attach bool) error {
	var ifr unix.Ifreq
	ifr.SetUint16(unix.IFF_DETACH_QUEUE)
	if attach {
		ifr.SetUint16(unix.IFF_ATTACH_QUEUE)
	}
	return unix.IoctlIfreq(fd, unix.TUNSETQUEUE, &ifr)
}

// TunFeatures returns the flags that this kernel knows, of any descriptor of TunPath.
func TunFeatures(fd int) (uint16, error) {
	f, err := unix.IoctlGetUint32(fd, unix.TUNGETFEATURES)
	return uint16(f), err
}

// TunSetVnetHdrSize sets the length in bytes of the virtio-net header in front of every frame, and that it is little-endian.
func TunSetVnetHdrSize(fd, n int) error {
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, n); err != nil {
		return fmt.Errorf("TUNSETVNETHDRSZ %d: %w", n, err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETLE, 1); err != nil {
		return fmt.Errorf("TUNSETVNETLE: %w", err)
	}
	return nil
}

// TunVnetHdrSize returns the length in bytes of the virtio-net header.
func TunVnetHdrSize(fd int) (int, error) { return unix.IoctlGetInt(fd, unix.TUNGETVNETHDRSZ) }

// TunSetOffload says which offloads (unix.TUN_F_*) the reader of the tap handles. EINVAL: one that the kernel does not know.
func TunSetOffload(fd int, flags uint) error {
	return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, int(flags))
}

// TunSetPersist makes the interface outlive its descriptors, or not.
func TunSetPersist(fd int, persist bool) error {
	v := 0
	if persist {
		v = 1
	}
	return unix.IoctlSetInt(fd, unix.TUNSETPERSIST, v)
}

// TunSendBuffer returns the size in bytes of the send buffer of fd's queue: frames that were written and have not left yet count
// against it, and a write that finds it full is refused with EAGAIN. TunUnbounded is a tap's, unless somebody set it.
func TunSendBuffer(fd int) (int, error) { return unix.IoctlGetInt(fd, unix.TUNGETSNDBUF) }

// TunUnbounded is the size of a send buffer that is never full.
const TunUnbounded = math.MaxInt32
