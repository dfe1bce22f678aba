//go:build linux

package soak

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
)

// The guest of --net user, which answers ARP and sends datagrams, from ports that change, to a server of the host that returns them.
const udpLen = 8

var (
	guestMAC  = []byte{0x52, 0x54, 0, 0x12, 0x34, 0x56}
	guestIP   = []byte{10, 0, 2, 15}
	gatewayIP = []byte{10, 0, 2, 2}
)

func openUser(t *testing.T) *link {
	ns := newNamespace(t)
	var echo net.PacketConn
	in(t, ns, func() (err error) {
		echo, err = net.ListenPacket("udp", "127.0.0.1:0")
		return err
	})
	t.Cleanup(func() { echo.Close() })
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := echo.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = echo.WriteTo(b[:n], from)
			}
		}
	}()
	port := uint16(echo.LocalAddr().(*net.UDPAddr).Port)
	return &link{daemons: []*daemonOf{run(t, ns, "user")}, host: true, traffic: func(t *testing.T, rd *round, g *vhosttest.Guest) {
		u := &userGuest{g: g, rd: rd, port: port}
		if err := u.play(); err != nil {
			t.Error(err)
		}
	}}
}

// userGuest is a guest behind the user-mode network.
type userGuest struct {
	g       *vhosttest.Guest
	rd      *round
	port    uint16 // of the server
	gateway []byte // its MAC address, once known
}

// play has datagrams go there and back, one by one.
func (u *userGuest) play() error {
	if err := u.resolve(); err != nil {
		return err
	}
	s := &stream{id: streams.Add(1)}
	for i, end := 0, time.Now().Add(u.rd.lasts); time.Now().Before(end); i++ {
		from := uint16(20000 + i/16%20000)
		p := make([]byte, 1+u.rd.r.IntN(mss))
		s.fill(p, s.sent)
		s.sent += uint64(len(p))
		if err := u.g.Send(0, virtio.NetHdr{}, u.datagram(from, p), vhosttest.Flat); err != nil {
			return err
		}
		if err := u.answer(from, p); err != nil {
			return fmt.Errorf("datagram %d: %w", i, err)
		}
		u.rd.frames++
		u.rd.bytes += uint64(len(p))
	}
	return nil
}

// resolve asks for the router's address.
func (u *userGuest) resolve() error {
	if err := u.g.Send(0, virtio.NetHdr{}, arp(1, bytes.Repeat([]byte{0xff}, 6), make([]byte, 6)), vhosttest.Flat); err != nil {
		return err
	}
	for u.gateway == nil {
		if _, err := u.recv(); err != nil {
			return fmt.Errorf("router's address: %w", err)
		}
	}
	return nil
}

// arp is a request (1) or an answer (2) to the router.
func arp(op byte, to, target []byte) []byte {
	f := make([]byte, 60)
	copy(f, to)
	copy(f[6:], guestMAC)
	copy(f[12:], []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, op})
	copy(f[22:], guestMAC)
	copy(f[28:], guestIP)
	copy(f[32:], target)
	copy(f[38:], gatewayIP)
	return f
}

// recv receives a frame, and answers what is ARP.
func (u *userGuest) recv() ([]byte, error) {
	_, f, err := u.g.Recv(0, vhosttest.Patience)
	if err != nil || len(f) < 42 || f[12] != 8 || f[13] != 6 {
		return f, err
	}
	if f[21] == 2 {
		u.gateway = bytes.Clone(f[22:28])
		return nil, nil
	}
	if !bytes.Equal(f[38:42], guestIP) {
		return nil, nil
	}
	return nil, u.g.Send(0, virtio.NetHdr{}, arp(2, f[22:28], f[22:28]), vhosttest.Flat)
}

func (u *userGuest) datagram(from uint16, p []byte) []byte {
	f := make([]byte, ethLen+ipLen+udpLen+len(p))
	copy(f, u.gateway)
	copy(f[6:], guestMAC)
	f[12] = 8
	ip := f[ethLen:]
	ip[0], ip[8], ip[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	copy(ip[12:], guestIP)
	copy(ip[16:], gatewayIP)
	binary.BigEndian.PutUint16(ip[10:], offload.Checksum(0, ip[:ipLen]))
	d := ip[ipLen:]
	binary.BigEndian.PutUint16(d, from)
	binary.BigEndian.PutUint16(d[2:], u.port)
	binary.BigEndian.PutUint16(d[4:], uint16(len(d)))
	copy(d[udpLen:], p)
	binary.BigEndian.PutUint16(d[6:], checksumUDP(ip, d))
	return f
}

func checksumUDP(ip, d []byte) uint16 {
	var s offload.Sum
	s.Add(ip[12:20])
	s.AddWord(17)
	s.AddWord(uint16(len(d)))
	s.Add(d)
	if sum := ^s.Fold(); sum != 0 {
		return sum
	}
	return 0xffff
}

// answer waits for the datagram's return.
func (u *userGuest) answer(port uint16, p []byte) error {
	for {
		f, err := u.recv()
		if err != nil {
			return err
		}
		if len(f) < ethLen+ipLen+udpLen || f[ethLen+9] != 17 {
			continue
		}
		d := f[ethLen+ipLen : ethLen+int(binary.BigEndian.Uint16(f[ethLen+2:]))]
		if binary.BigEndian.Uint16(d[2:]) != port {
			continue
		}
		if !bytes.Equal(d[udpLen:], p) {
			return fmt.Errorf("%d bytes went, others came back", len(p))
		}
		return nil
	}
}
