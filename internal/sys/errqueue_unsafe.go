package sys

import (
	"encoding/binary"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Completions is what the kernel says of sends with MSG_ZEROCOPY on one socket (Documentation/networking/msg_zerocopy.rst): those of numbers Lo
// to Hi, counted from 0, modulo 2^32, are done.
type Completions struct {
	Lo, Hi uint32
	Copied bool // the kernel copied their pages. Of a range that it put together, it says so of the first part's
}

// ErrorQueue reads what sends with MSG_ZEROCOPY came to. The zero value is ready.
type ErrorQueue struct {
	msgs    [8]mmsghdr
	control [8][128]byte
	found   [8]Completions
}

// Recv takes what waits in the error queue of fd, up to a bound, and reports whether there may be more. The result is good until the next call.
func (q *ErrorQueue) Recv(fd int) (list []Completions, more bool, errno syscall.Errno) {
	for i := range q.msgs {
		q.msgs[i] = mmsghdr{hdr: unix.Msghdr{Control: &q.control[i][0], Controllen: uint64(len(q.control[i]))}}
	}
	n, errno := mmsg(unix.SYS_RECVMMSG, fd, q.msgs[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
	if errno == unix.EAGAIN {
		return nil, false, 0
	}
	list = q.found[:0]
	for i := range n {
		if c, ok := completions(q.control[i][:q.msgs[i].hdr.Controllen]); ok {
			list = append(list, c)
		}
	}
	return list, n == len(q.msgs), errno
}

// completions finds a struct sock_extended_err of MSG_ZEROCOPY in control messages.
func completions(b []byte) (c Completions, ok bool) {
	for len(b) > 0 {
		hdr, data, rest, err := unix.ParseOneSocketControlMessage(b)
		if err != nil {
			break
		}
		b = rest
		v4, v6 := hdr.Level == unix.SOL_IP && hdr.Type == unix.IP_RECVERR, hdr.Level == unix.SOL_IPV6 && hdr.Type == unix.IPV6_RECVERR
		if (v4 || v6) && len(data) >= int(unsafe.Sizeof(unix.SockExtendedErr{})) && data[4] == unix.SO_EE_ORIGIN_ZEROCOPY {
			return Completions{
				Lo: binary.NativeEndian.Uint32(data[8:]), Hi: binary.NativeEndian.Uint32(data[12:]),
				Copied: data[6]&unix.SO_EE_CODE_ZEROCOPY_COPIED != 0,
			}, true
		}
	}
	return c, false
}
