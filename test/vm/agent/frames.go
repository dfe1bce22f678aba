//go:build linux

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/test/vm/rpc"
)

// frames are the packet sockets, by link.
type frames struct {
	mu  sync.Mutex
	fds map[string]int
}

// watch opens a link's socket anew: what came before is forgotten.
func (f *frames) watch(a rpc.FramesArgs) (struct{}, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fds == nil {
		f.fds = map[string]int{}
	}
	if fd, ok := f.fds[a.Link]; ok {
		unix.Close(fd)
		delete(f.fds, a.Link)
	}
	fd, err := openPacket(a.Link)
	if err != nil {
		return struct{}{}, err
	}
	f.fds[a.Link] = fd
	return struct{}{}, nil
}

// every is ETH_P_ALL as the kernel wants it.
const every = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00

func openPacket(link string) (fd int, err error) {
	i, err := net.InterfaceByName(link)
	if err != nil {
		return -1, err
	}
	if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, every); err != nil {
		return -1, fmt.Errorf("packet socket: %w", err)
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000}),
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: every, Ifindex: i.Index}),
		unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &unix.PacketMreq{Ifindex: int32(i.Index), Type: unix.PACKET_MR_PROMISC}),
	)
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("packet socket on %s: %w", link, err)
	}
	return fd, nil
}

// do sends and collects.
func (f *frames) do(a rpc.FramesArgs) (r rpc.FramesResult, err error) {
	f.mu.Lock()
	fd, ok := f.fds[a.Link]
	f.mu.Unlock()
	if !ok {
		return r, fmt.Errorf("nobody watches %s", a.Link)
	}
	for _, b := range a.Send {
		if _, err := unix.Write(fd, b); err != nil {
			return r, fmt.Errorf("sending a frame of %d bytes: %w", len(b), err)
		}
	}
	for end := time.Now().Add(a.Timeout); a.Until != nil && time.Now().Before(end); {
		b, err := receiveFrame(fd)
		if err != nil {
			return r, err
		}
		if b == nil || !bytes.Contains(b, a.Mark) {
			continue
		}
		r.Frames = append(r.Frames, b)
		if bytes.Contains(b, a.Until) {
			break
		}
	}
	return r, nil
}

// receiveFrame returns the next frame from outside with its VLAN tag, which the kernel has taken off; nil when none comes.
func receiveFrame(fd int) ([]byte, error) {
	var b [70000]byte
	var oob [256]byte
	n, oobn, _, from, err := unix.Recvmsg(fd, b[:], oob[:], 0)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING || n < 14 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	for _, m := range msgs {
		// struct tpacket_auxdata: status at 0, vlan_tci at 16
		if m.Header.Level != unix.SOL_PACKET || m.Header.Type != unix.PACKET_AUXDATA || len(m.Data) < 20 {
			continue
		}
		if binary.NativeEndian.Uint32(m.Data)&unix.TP_STATUS_VLAN_VALID == 0 {
			continue
		}
		tag := binary.BigEndian.AppendUint16([]byte{0x81, 0}, binary.NativeEndian.Uint16(m.Data[16:]))
		return append(append(append([]byte(nil), b[:12]...), tag...), b[12:n]...), nil
	}
	return append([]byte(nil), b[:n]...), nil
}
