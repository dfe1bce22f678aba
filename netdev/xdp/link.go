package xdp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
)

// findInterface looks the interface up, sets it up, and returns how many queues it has.
func (d *Device) findInterface() (queues int, err error) {
	link, err := netlink.LinkByName(d.opts.Name)
	if err != nil {
		return 0, fmt.Errorf("%w: `ip link` lists the interfaces there are", err)
	}
	a := link.Attrs()
	d.ifindex, d.mtu = a.Index, min(a.MTU, maxMTU)
	if d.opts.MTU > d.mtu {
		return 0, fmt.Errorf("mtu=%d: the interface has %d: `ip link set %s mtu %d` changes that", d.opts.MTU, a.MTU, d.opts.Name, d.opts.MTU)
	}
	if d.opts.MTU != 0 {
		d.mtu = d.opts.MTU
	}
	d.frame = d.mtu + tagged
	if a.RawFlags&unix.IFF_UP == 0 {
		if err := netlink.LinkSetUp(link); err != nil {
			return 0, fmt.Errorf("setting it up: %w: `ip link set %s up` beforehand", err, d.opts.Name)
		}
	}
	queues = sys.Channels(d.opts.Name)
	if d.opts.Queue >= queues {
		return 0, fmt.Errorf("queue=%d: the interface has %d: 0 to %d", d.opts.Queue, queues, queues-1)
	}
	return queues, nil
}

// promiscuous has the interface take frames for any address for as long as the descriptor is open.
func promiscuous(ifindex int) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0) // protocol 0: it receives nothing
	if err != nil {
		return -1, err
	}
	m := unix.PacketMreq{Ifindex: int32(ifindex), Type: unix.PACKET_MR_PROMISC}
	if err := unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &m); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// features are what a driver can do for AF_XDP.
type features struct {
	zerocopy bool
	segs     int  // pieces of a frame, at most
	csum     bool // it completes checksums in zero-copy mode
}

// Constants of include/uapi/linux/netdev.h.
const (
	netdevDevGet      = 1
	attrIfindex       = 1
	attrFeatures      = 3
	attrZeroCopySegs  = 4
	attrSocketFeature = 6

	featZeroCopy  = 1 << 3 // NETDEV_XDP_ACT_XSK_ZEROCOPY
	featChecksum  = 1 << 1 // NETDEV_XSK_FLAGS_TX_CHECKSUM
	attrTypeMask  = 0x3fff
	genlHeaderLen = 4
)

// askFeatures asks the kernel (6.3 or newer). One that does not answer is taken for one whose drivers might be able to.
func askFeatures(ifindex int) features {
	unknown := features{zerocopy: true, segs: 1}
	family, err := netlink.GenlFamilyGet("netdev")
	if err != nil {
		return unknown
	}
	req := nl.NewNetlinkRequest(int(family.ID), 0)
	req.AddData(&nl.Genlmsg{Command: netdevDevGet, Version: 1})
	req.AddData(nl.NewRtAttr(attrIfindex, binary.NativeEndian.AppendUint32(nil, uint32(ifindex))))
	msgs, err := req.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil || len(msgs) == 0 || len(msgs[0]) < genlHeaderLen {
		return unknown
	}
	attrs, err := nl.ParseRouteAttr(msgs[0][genlHeaderLen:])
	if err != nil {
		return unknown
	}
	f := features{segs: 1}
	for _, a := range attrs {
		switch v := a.Value; a.Attr.Type & attrTypeMask {
		case attrFeatures:
			f.zerocopy = len(v) >= 8 && binary.NativeEndian.Uint64(v)&featZeroCopy != 0
		case attrZeroCopySegs:
			if len(v) >= 4 {
				f.segs = int(binary.NativeEndian.Uint32(v))
			}
		case attrSocketFeature:
			f.csum = len(v) >= 8 && binary.NativeEndian.Uint64(v)&featChecksum != 0
		}
	}
	return f
}

// namespace is a network namespace. A socket belongs to the one that its thread is in.
type namespace struct{ fd int }

const ownNamespace = "/proc/thread-self/ns/net"

func thisNamespace() (namespace, error) {
	fd, err := unix.Open(ownNamespace, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return namespace{-1}, fmt.Errorf("%s: %w", ownNamespace, err)
	}
	return namespace{fd}, nil
}

func (n namespace) close() error {
	if n.fd < 0 {
		return nil
	}
	return unix.Close(n.fd)
}

// inNamespace runs f on a thread that is in the namespace of the interface.
func (d *Device) inNamespace(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var here, there unix.Stat_t
	if err := errors.Join(unix.Stat(ownNamespace, &here), unix.Fstat(d.ns.fd, &there)); err != nil {
		return err
	}
	if here.Ino == there.Ino && here.Dev == there.Dev {
		return f()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		err := unix.Setns(d.ns.fd, unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

func explainProgram(err error) string {
	switch {
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		return ": another XDP program is there: `ip link show` names it, `ip link set DEV xdp off` takes it away"
	case errors.Is(err, unix.EPERM):
		return ": vhostd needs CAP_NET_ADMIN and CAP_BPF (CAP_SYS_ADMIN before Linux 5.8)"
	case errors.Is(err, unix.EOPNOTSUPP):
		return ": the driver has no native XDP: mode=generic, or leave mode out"
	case errors.Is(err, unix.ERANGE), errors.Is(err, unix.EINVAL):
		return ": the interface's MTU may be too large for XDP"
	}
	return ""
}
