package xdp_test

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/virtio"
)

// TestDevice runs the suite that every device passes, over a cable to a packet socket.
func TestDevice(t *testing.T) {
	for _, c := range []struct {
		name, options string
		mtu           int
	}{
		{"native", "xdp:v0", 1500},
		{"generic", "xdp:v0,mode=generic", 1500},
		{"jumbo", "xdp:v0,mode=copy", 9000},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t, c.mtu, 1)
			netdevtest.Run(t, func(t *testing.T) netdevtest.Harness {
				l := &lab{l.For(t)}
				d := l.device(c.options)
				w := l.wire(l.There)
				return netdevtest.Harness{
					Device: d, MaxFrame: c.mtu + 14, Close: w.Close, Inject: w.Send,
					Capture: func() (virtio.NetHdr, []byte) { return w.capture() },
				}
			})
		})
	}
}

// capture returns the next frame as the suite wants it: a checksum that is left to be completed is described.
func (w *wire) capture() (virtio.NetHdr, []byte) {
	w.Helper()
	frame, unfinished := w.recv()
	frame = bytes.Clone(frame)
	hdr := virtio.NetHdr{}
	if unfinished {
		hdr = describe(frame)
	}
	return hdr, frame
}

// describe is the header of an IPv4 or IPv6 frame of TCP or UDP, without options, whose checksum is to be completed.
func describe(frame []byte) virtio.NetHdr {
	start, proto := 14+20, frame[14+9]
	if frame[12] == 0x86 {
		start, proto = 14+40, frame[14+6]
	}
	off := 16
	if proto == 17 {
		off = 6
	}
	return virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, CsumStart: uint16(start), CsumOffset: uint16(off)}
}

// TestRecvTooBig: a frame that the guest's buffers can never take is lost and counted, the next one arrives.
func TestRecvTooBig(t *testing.T) {
	l := newLab(t, 1500, 1)
	d := l.device("xdp:v0")
	defer d.Close()
	w := l.wire(l.There)
	netdevtest.RecvTooBig(t, d.Queue(0), func(frame []byte) {
		_, err := unix.Write(w.FD, frame)
		must(t, err)
	})
}
