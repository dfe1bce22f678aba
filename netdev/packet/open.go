package packet

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/virtio"
)

// Sizes of rings and of what they are made of, in bytes unless they say otherwise.
const (
	// etherMax is the most that an Ethernet frame has beyond the MTU: its header, and a VLAN tag.
	etherMax = 14 + 4

	sendBlock = 1 << 20
	// sendSlots: with 15 slots for frames of 64 KiB in a block these are 8 MiB. Small frames lie far apart in them, which costs nothing.
	sendSlots = 120
	// sendCharge is the least that the kernel charges a frame in flight to the socket's buffer: half of a buffer of sendSlots times twice that
	// is in use when all slots are, which is what keeps poll from saying that the socket can be written.
	sendCharge = 768

	recvBlock = 1 << 18
	recvSlots = 1024
	// maxRecvSlot bounds slots for large MTUs; a frame that is longer comes through the socket's queue.
	maxRecvSlot = 1 << 14
	// recvBuffer is for large frames in the socket's queue: some 60 of 64 KiB.
	recvBuffer = 4 << 20
)

// Open attaches to the interface that o names, in the network namespace of the calling thread.
func Open(o Options) (*Device, error) {
	if err := o.check(); err != nil {
		return nil, fmt.Errorf("packet: %w", err)
	}
	d := &Device{opts: o, uso: kernelHasUSO()}
	if !o.NoVnetHdr {
		d.header = virtio.NetHdrSizeLegacy
	}
	for range max(o.Queues, 1) {
		d.queues = append(d.queues, &queue{dev: d, fd: -1, recv: receiver{monitor: -1}})
	}
	for i := range d.queues {
		if err := d.openQueue(i); err != nil {
			d.Close()
			return nil, err
		}
	}
	return d, nil
}

// openQueue opens the socket of queue pair i.
func (d *Device) openQueue(i int) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: a packet socket: %w: %s", d, err, explainSocket(err))
	}
	q := d.queues[i]
	q.mu.Lock()
	q.fd = fd
	q.mu.Unlock()
	if i == 0 {
		err = d.attach(fd)
	}
	if err == nil {
		err = d.setup(q)
	}
	if err == nil {
		err = d.bind(fd, i)
	}
	if err != nil {
		q.close()
		return err
	}
	return nil
}

// attach finds out about the interface and sets its MTU.
func (d *Device) attach(fd int) (err error) {
	name := d.opts.Interface
	if d.link, err = sys.InterfaceByName(fd, name); err != nil {
		return fmt.Errorf("%s: %w: `ip link` lists the interfaces of this network namespace", d, err)
	}
	switch {
	case !d.link.Ethernet:
		return fmt.Errorf("%s: its frames are not Ethernet's: the guest needs an interface with Ethernet headers", d)
	case !d.link.Up:
		return fmt.Errorf("%s: the interface is down: set it up with `ip link set %s up`", d, name)
	}
	if d.opts.MTU > d.link.MTU {
		if err := sys.SetInterfaceMTU(fd, name, d.opts.MTU); err != nil {
			return fmt.Errorf("%s: setting its mtu from %d to %d: %w: it needs CAP_NET_ADMIN, and an interface that takes it "+
				"(`ip -d link show %s`)", d, d.link.MTU, d.opts.MTU, err, name)
		}
	}
	if d.mtu = d.opts.MTU; d.mtu == 0 {
		d.mtu = min(d.link.MTU, MaxMTU)
	}
	return nil
}

// setup makes the rings of a socket that is not bound yet: no frame comes before everything is there.
func (d *Device) setup(q *queue) error {
	type option struct {
		what       string
		opt, value int
	}
	opts := []option{
		{"rings of version 2", unix.PACKET_VERSION, unix.TPACKET_V2},
		{"receiving no outgoing frames (Linux 4.20)", unix.PACKET_IGNORE_OUTGOING, 1},
		{"large frames beside the ring", unix.PACKET_COPY_THRESH, 1},
	}
	if d.header > 0 {
		opts = append(opts, option{"virtio-net headers (Linux 4.6; try vnet-hdr=off)", unix.PACKET_VNET_HDR, 1})
	}
	if d.opts.QdiscBypass {
		opts = append(opts, option{"qdisc-bypass", unix.PACKET_QDISC_BYPASS, 1})
	}
	for _, o := range opts {
		if err := unix.SetsockoptInt(q.fd, unix.SOL_PACKET, o.opt, o.value); err != nil {
			return fmt.Errorf("%s: %s: %w", d, o.what, err)
		}
	}
	send, recv := d.shapes()
	if err := buffers(q.fd, send.slots()*sendCharge, recvBuffer); err != nil {
		return fmt.Errorf("%s: %w", d, err)
	}
	if err := recv.set(q.fd, unix.PACKET_RX_RING); err != nil {
		return fmt.Errorf("%s: a receive ring of %d KiB: %w", d, recv.bytes()>>10, err)
	}
	if err := send.set(q.fd, unix.PACKET_TX_RING); err != nil {
		return fmt.Errorf("%s: a transmit ring of %d KiB: %w", d, send.bytes()>>10, err)
	}
	mem, err := unix.Mmap(q.fd, 0, recv.bytes()+send.bytes(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("%s: mapping its rings: %w", d, err)
	}
	q.ring = mem
	recvRing, err := recv.cut(mem[:recv.bytes()])
	if err != nil {
		return fmt.Errorf("%s: receive ring: %w", d, err)
	}
	sendRing, err := send.cut(mem[recv.bytes():])
	if err != nil {
		return fmt.Errorf("%s: transmit ring: %w", d, err)
	}
	q.recv.start(q, recvRing)
	q.send.start(q, sendRing)
	return nil
}

// shapes are those of the transmit and the receive ring.
func (d *Device) shapes() (send, recv shape) {
	size := sendData + d.mtu + etherMax
	if d.header > 0 {
		size = sendData + d.header + virtio.MaxFrame
	}
	slot := 1 << 11 // a power of two, or as many as are needed
	for need := min(recvHead+d.mtu+etherMax, maxRecvSlot); slot < need; {
		slot += 1 << 11
	}
	n := recvSlots
	if slot > 1<<12 {
		n /= 2
	}
	return shapeOf(sendSlots, size, sendBlock), shapeOf(n, slot, recvBlock)
}

// buffers sets the socket's limits in bytes, as far as they may be set.
func buffers(fd, send, recv int) error {
	// The kernel doubles both. The first is below what anybody may set.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, send); err != nil {
		return fmt.Errorf("a send buffer of %d KiB: %w", send>>10, err)
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, recv/2) == nil {
		return nil
	}
	// Without CAP_NET_ADMIN: as much as net.core.rmem_max allows.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, recv/2); err != nil {
		return fmt.Errorf("a receive buffer of %d KiB: %w", recv>>10, err)
	}
	return nil
}

// bind lets frames come.
func (d *Device) bind(fd, i int) error {
	if err := sys.PacketBind(fd, d.link.Index); err != nil {
		return fmt.Errorf("%s: binding queue %d: %w", d, i, err)
	}
	if i == 0 && !d.opts.NoPromisc {
		// Of the socket, so that it ends with it, however vhostd ends.
		m := unix.PacketMreq{Ifindex: int32(d.link.Index), Type: unix.PACKET_MR_PROMISC}
		if err := unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &m); err != nil {
			return fmt.Errorf("%s: promiscuous mode: %w: try promisc=off, and give the guest the interface's MAC address", d, err)
		}
	}
	if len(d.queues) == 1 {
		return nil
	}
	var err error
	if i == 0 {
		d.group, err = sys.PacketFanoutNew(fd, int(d.opts.Fanout))
	} else {
		err = sys.PacketFanoutJoin(fd, int(d.opts.Fanout), d.group)
	}
	if err != nil {
		return fmt.Errorf("%s: spreading frames over queue %d by %v: %w: is the interface up?", d, i, d.opts.Fanout, err)
	}
	return nil
}

// explainSocket says what to do when a packet socket cannot be had.
func explainSocket(err error) string {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return "give vhostd CAP_NET_RAW: run it as root, or set AmbientCapabilities=CAP_NET_RAW in the systemd unit"
	case errors.Is(err, unix.EAFNOSUPPORT):
		return "the kernel has none: try `modprobe af_packet`"
	}
	return "see `vhostd doctor`"
}

// kernelHasUSO: the kernel knows UDP segmentation in virtio-net headers since 6.2, and no socket tells by itself.
func kernelHasUSO() bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	major, rest, _ := strings.Cut(unix.ByteSliceToString(u.Release[:]), ".")
	minor, _, _ := strings.Cut(rest, ".")
	a, errA := strconv.Atoi(major)
	b, errB := strconv.Atoi(strings.TrimRightFunc(minor, func(r rune) bool { return r < '0' || r > '9' }))
	return errA == nil && errB == nil && (a > 6 || a == 6 && b >= 2)
}
