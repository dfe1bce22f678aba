//go:build linux

package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/test/vm/rpc"
	"github.com/vhostd/vhostd/test/vm/stream"
)

const (
	icmpHeader = 8
	pingSeed   = 0x70696e67
)

// pinger is one ICMP echo socket. The kernel owns its identifier and checksum.
type pinger struct {
	fd      int
	to      unix.Sockaddr
	request byte // ICMP type
	pattern *stream.Pattern
}

// ping sends requests one after the other, each when the one before is answered or overdue.
func ping(a rpc.PingArgs) (rpc.PingResult, error) {
	p, err := newPinger(a)
	if err != nil {
		return rpc.PingResult{}, err
	}
	defer unix.Close(p.fd)
	var r rpc.PingResult
	for seq := range a.Count {
		start := time.Now()
		if err := p.send(seq, a.Size); err != nil {
			return r, fmt.Errorf("echo request %d of %d bytes to %s: %w", seq, a.Size, a.Addr, err)
		}
		r.Sent++
		ok, bad := p.receive(seq, a.Size, start.Add(a.Timeout))
		r.Bad += bad
		if !ok {
			continue
		}
		rtt := time.Since(start)
		if r.Received++; r.Received == 1 || rtt < r.Fastest {
			r.Fastest = rtt
		}
		r.Slowest = max(r.Slowest, rtt)
	}
	return r, nil
}

func newPinger(a rpc.PingArgs) (*pinger, error) {
	ip, err := netip.ParseAddr(a.Addr)
	if err != nil {
		return nil, err
	}
	// Echo sockets are for the groups named here; the kernel's default is none.
	if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 0"), 0); err != nil {
		return nil, err
	}
	p := &pinger{pattern: stream.NewPattern(pingSeed)}
	if ip.Is4() {
		p.request, p.to = 8, &unix.SockaddrInet4{Addr: ip.As4()}
		p.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	} else {
		p.request, p.to = 128, &unix.SockaddrInet6{Addr: ip.As16()}
		p.fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
	}
	if err != nil {
		return nil, fmt.Errorf("echo socket: %w", err)
	}
	if err := p.setFragment(ip.Is4(), a.DF); err != nil {
		unix.Close(p.fd)
		return nil, err
	}
	return p, nil
}

// setFragment forbids fragments (and ignores what path MTU discovery believes), or allows them.
func (p *pinger) setFragment(v4, df bool) error {
	value := unix.IP_PMTUDISC_DONT
	if df {
		value = unix.IP_PMTUDISC_PROBE
	}
	if v4 {
		return unix.SetsockoptInt(p.fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, value)
	}
	return unix.SetsockoptInt(p.fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, value)
}

func (p *pinger) send(seq, size int) error {
	b := make([]byte, icmpHeader+size)
	b[0] = p.request
	binary.BigEndian.PutUint16(b[6:], uint16(seq))
	p.pattern.Fill(b[icmpHeader:], uint64(seq)*stream.BlockSize)
	return unix.Sendto(p.fd, b, 0, p.to)
}

// receive waits for the reply of one sequence number, and counts replies whose payload differs.
func (p *pinger) receive(seq, size int, until time.Time) (ok bool, bad int) {
	b, want := make([]byte, 65536), make([]byte, size)
	p.pattern.Fill(want, uint64(seq)*stream.BlockSize)
	for {
		left := time.Until(until)
		if left <= 0 {
			return false, bad
		}
		fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
		if n, _ := unix.Poll(fds, int(left.Milliseconds())+1); n <= 0 {
			continue
		}
		n, _, err := unix.Recvfrom(p.fd, b, unix.MSG_DONTWAIT)
		if err != nil || n < icmpHeader || int(binary.BigEndian.Uint16(b[6:])) != seq&0xffff {
			continue // an error message or a late reply
		}
		if bytes.Equal(b[icmpHeader:n], want) {
			return true, bad
		}
		bad++
	}
}
