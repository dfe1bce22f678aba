//go:build linux

package main

import (
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/test/vm/rpc"
)

// configureLink sets what is asked for, in the order in which the kernel wants it, and returns what there is then.
func configureLink(a rpc.LinkArgs) (rpc.LinkResult, error) {
	link, err := waitLink(a.Name, a.Wait)
	if err != nil {
		return rpc.LinkResult{}, err
	}
	if a.MTU != 0 {
		if err := netlink.LinkSetMTU(link, a.MTU); err != nil {
			return rpc.LinkResult{}, fmt.Errorf("mtu %d: %w", a.MTU, err)
		}
	}
	if a.Up {
		if err := netlink.LinkSetUp(link); err != nil {
			return rpc.LinkResult{}, fmt.Errorf("up: %w", err)
		}
	}
	for _, cidr := range a.Addrs {
		if err := addAddr(link, cidr); err != nil {
			return rpc.LinkResult{}, err
		}
	}
	if a.Gateway != "" {
		if err := setGateway(link, a.Gateway); err != nil {
			return rpc.LinkResult{}, err
		}
	}
	return describe(a.Name)
}

func waitLink(name string, wait time.Duration) (netlink.Link, error) {
	for end := time.Now().Add(wait); ; time.Sleep(20 * time.Millisecond) {
		link, err := netlink.LinkByName(name)
		if err == nil || time.Now().After(end) {
			return link, err
		}
	}
}

func addAddr(link netlink.Link, cidr string) error {
	addr, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	if addr.IP.To4() == nil {
		addr.Flags = unix.IFA_F_NODAD // usable at once
	}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("address %s: %w", cidr, err)
	}
	return nil
}

func setGateway(link netlink.Link, gateway string) error {
	ip := net.ParseIP(gateway)
	if ip == nil {
		return fmt.Errorf("gateway %q is no IP address", gateway)
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: ip}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("default route via %s: %w", gateway, err)
	}
	return nil
}

func describe(name string) (rpc.LinkResult, error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return rpc.LinkResult{}, err
	}
	at := link.Attrs()
	r := rpc.LinkResult{
		MAC: at.HardwareAddr.String(), MTU: at.MTU, Queues: at.NumTxQueues,
		Up:      at.Flags&net.FlagUp != 0,
		Carrier: at.OperState == netlink.OperUp || at.OperState == netlink.OperUnknown,
	}
	if s := at.Statistics; s != nil {
		r.RxPackets, r.TxPackets, r.RxBytes, r.TxBytes = s.RxPackets, s.TxPackets, s.RxBytes, s.TxBytes
		r.RxErrors, r.TxErrors, r.RxDropped = s.RxErrors, s.TxErrors, s.RxDropped
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return r, fmt.Errorf("addresses: %w", err)
	}
	for _, a := range addrs {
		r.Addrs = append(r.Addrs, a.IPNet.String())
	}
	r.Gateways, err = gateways(link)
	return r, err
}

func gateways(link netlink.Link) (list []string, err error) {
	routes, err := netlink.RouteList(link, netlink.FAMILY_ALL)
	for _, route := range routes {
		if route.Gw != nil && (route.Dst == nil || route.Dst.IP.IsUnspecified()) {
			list = append(list, route.Gw.String())
		}
	}
	return list, err
}
