package netdevtest

import (
	"encoding/binary"
	"fmt"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/virtio"
)

// wireBuffer is what a Wire's socket buffers, each way, in bytes.
const wireBuffer = 64 << 20

// Wire is a packet socket on an interface, which gets what comes in there: the far end of a device's wire.
type Wire struct {
	testing.TB
	FD int // negative when it is closed
}

// NewWire opens a packet socket on an interface of the thread's namespace, for as long as the test runs.
func NewWire(t testing.TB, name string) *Wire {
	t.Helper()
	fd, err := openWire(name)
	must(t, err)
	w := &Wire{t, fd}
	t.Cleanup(w.Close)
	return w
}

// Wire opens a packet socket on an interface of a namespace, for as long as the test runs.
func (l *Lab) Wire(ns, name string) *Wire {
	l.Helper()
	w := &Wire{TB: l, FD: -1}
	l.In(ns, func() (err error) { w.FD, err = openWire(name); return err })
	l.Cleanup(w.Close)
	return w
}

func openWire(name string) (int, error) {
	link, err := net.InterfaceByName(name)
	if err != nil {
		return -1, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	tv := unix.NsecToTimeval(patience.Nanoseconds())
	for _, err := range []error{
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, wireBuffer),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, wireBuffer),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		sys.PacketBind(fd, link.Index),
	} {
		if err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("packet socket on %s: %w", name, err)
		}
	}
	return fd, nil
}

// Set sets an option of the level SOL_PACKET.
func (w *Wire) Set(option, value int) {
	w.Helper()
	must(w, unix.SetsockoptInt(w.FD, unix.SOL_PACKET, option, value))
}

// Close closes the socket before the end of the test.
func (w *Wire) Close() {
	if w.FD >= 0 {
		unix.Close(w.FD)
		w.FD = -1
	}
}

// Send sends a frame to the device.
func (w *Wire) Send(frame []byte) {
	w.Helper()
	must(w, w.TrySend(frame))
}

// TrySend is Send for any goroutine.
func (w *Wire) TrySend(frame []byte) error {
	if _, err := unix.Write(w.FD, frame); err != nil {
		return fmt.Errorf("sending %d bytes: %w", len(frame), err)
	}
	return nil
}

// Recv returns the next frame of the device's that pick takes.
func (w *Wire) Recv(pick func(frame []byte) bool) []byte {
	w.Helper()
	b := make([]byte, 1<<17)
	for {
		n, err := unix.Read(w.FD, b)
		if err == unix.EINTR {
			continue
		}
		must(w, err)
		if n >= 14 && pick(b[:n]) {
			return b[:n]
		}
	}
}

// SendHdr is Send with a header, for a socket with PACKET_VNET_HDR.
func (w *Wire) SendHdr(hdr virtio.NetHdr, frame []byte) {
	w.Helper()
	b := make([]byte, virtio.NetHdrSizeLegacy, virtio.NetHdrSizeLegacy+len(frame))
	hdr.Encode(b)
	w.Send(append(b, frame...))
}

// Inject is for Harness.Inject, with PACKET_VNET_HDR.
func (w *Wire) Inject(frame []byte) {
	w.Helper()
	w.SendHdr(virtio.NetHdr{}, frame)
}

// Capture is for Harness.Capture, with PACKET_VNET_HDR.
func (w *Wire) Capture() (virtio.NetHdr, []byte) {
	w.Helper()
	b := make([]byte, 1<<17)
	for {
		n, err := unix.Read(w.FD, b)
		if err == unix.EINTR || err == unix.EINVAL {
			continue // EINVAL: a frame that lied, of a kind for which the socket has no header
		}
		must(w, err)
		hdr, f := virtio.DecodeNetHdr(b[:virtio.NetHdrSizeLegacy]), b[virtio.NetHdrSizeLegacy:n]
		switch binary.BigEndian.Uint16(f[12:]) {
		case EtherType, unix.ETH_P_IP, unix.ETH_P_IPV6:
			if hdr.Flags&virtio.NetHdrNeedsCsum == 0 {
				hdr = virtio.NetHdr{}
			}
			return hdr, f
		}
	}
}
