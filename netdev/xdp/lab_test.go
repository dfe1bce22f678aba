package xdp_test

import (
	"bytes"
	"encoding/binary"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/xdp"
)

const patience = vhosttest.Patience

// lab is a cable from the device, here, to the peer.
type lab struct{ *netdevtest.Lab }

// newLab makes a cable with n queues.
func newLab(t testing.TB, mtu, n int) *lab {
	t.Helper()
	return &lab{netdevtest.NewLab(t, "xdp", mtu, n)}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// open opens a device here.
func (l *lab) open(options string) (d *xdp.Device, err error) {
	o, err := xdp.ParseOptions(options)
	if err != nil {
		return nil, err
	}
	err = l.Enter(l.Here, func() (err error) { d, err = xdp.Open(o); return err })
	return d, err
}

// device opens a device here, which the caller closes.
func (l *lab) device(options string) *xdp.Device {
	l.Helper()
	d, err := l.open(options)
	must(l, err)
	return d
}

// attached reports whether an XDP program is on the interface here.
func (l *lab) attached() bool {
	l.Helper()
	out, err := exec.Command("ip", "-n", l.Here, "link", "show", "v0").CombinedOutput()
	must(l, err)
	return bytes.Contains(out, []byte("prog/xdp"))
}

// wire is a packet socket, with room for what it received last.
type wire struct {
	*netdevtest.Wire
	buf [1 << 17]byte
}

// wire opens one at v0 in a namespace.
func (l *lab) wire(ns string) *wire {
	l.Helper()
	w := &wire{Wire: l.Wire(ns, "v0")}
	w.Set(unix.PACKET_AUXDATA, 1)
	return w
}

// recv returns the next frame, and whether its checksum is still to be completed.
func (w *wire) recv() (frame []byte, unfinished bool) {
	w.Helper()
	var oob [64]byte
	for {
		n, m, _, _, err := unix.Recvmsg(w.FD, w.buf[:], oob[:], 0)
		if err == unix.EINTR {
			continue
		}
		must(w, err)
		return w.buf[:n], notReady(oob[:m])
	}
}

// notReady finds TP_STATUS_CSUMNOTREADY in a packet socket's auxiliary data, which begins with the status.
func notReady(oob []byte) bool {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return false
	}
	for _, m := range msgs {
		if m.Header.Level == unix.SOL_PACKET && m.Header.Type == unix.PACKET_AUXDATA && len(m.Data) >= 4 {
			return binary.NativeEndian.Uint32(m.Data)&unix.TP_STATUS_CSUMNOTREADY != 0
		}
	}
	return false
}

// tryRecv is recv for any goroutine: no frame in time is no fault.
func (w *wire) tryRecv(timeout time.Duration) ([]byte, bool) {
	if !netdevtest.Poll(w, w.FD, unix.POLLIN, timeout) {
		return nil, false
	}
	n, _, err := unix.Recvfrom(w.FD, w.buf[:], 0)
	return w.buf[:max(n, 0)], err == nil
}
