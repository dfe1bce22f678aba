package udp

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// groups are the peers that are multicast groups.
func (o *Options) groups() (list []netip.Addr) {
	for _, r := range o.Remotes {
		if r.Addr().IsMulticast() {
			list = append(list, r.Addr())
		}
	}
	return list
}

// mreq4 names the interface of a group: by Dev, else by Local, else by the routes.
func (o *Options) mreq4(group netip.Addr) (*unix.IPMreqn, error) {
	m := &unix.IPMreqn{Multiaddr: v4(group), Address: v4(o.Local.Addr())}
	if o.Dev == "" {
		return m, nil
	}
	index, err := ifindex(o.Dev)
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", o.Dev, err)
	}
	m.Ifindex = int32(index)
	return m, nil
}

// join has fd receive what is sent to the groups, and no other group that somebody on this host joins.
func (o *Options) join(fd int) error {
	groups := o.groups()
	if len(groups) == 0 {
		return nil
	}
	level, onlyJoined := unix.IPPROTO_IP, unix.IP_MULTICAST_ALL
	if groups[0].Is6() {
		level, onlyJoined = unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_ALL
	}
	if err := unix.SetsockoptInt(fd, level, onlyJoined, 0); err != nil {
		return fmt.Errorf("groups of this socket alone: %w", err)
	}
	for _, g := range groups {
		if err := o.joinOne(fd, g); err != nil {
			return fmt.Errorf("joining group %s: %w%s", g, err, explainJoin(err))
		}
	}
	return nil
}

func (o *Options) joinOne(fd int, g netip.Addr) error {
	if g.Is4() {
		m, err := o.mreq4(g)
		if err != nil {
			return err
		}
		return unix.SetsockoptIPMreqn(fd, unix.IPPROTO_IP, unix.IP_ADD_MEMBERSHIP, m)
	}
	index, err := ifindex(o.Dev)
	if err != nil {
		return fmt.Errorf("interface %s: %w", o.Dev, err)
	}
	return unix.SetsockoptIPv6Mreq(fd, unix.IPPROTO_IPV6, unix.IPV6_JOIN_GROUP, &unix.IPv6Mreq{Multiaddr: g.As16(), Interface: index})
}

func explainJoin(err error) string {
	switch {
	case errors.Is(err, unix.ENODEV):
		return ": no interface has a route there: name one with dev="
	case errors.Is(err, unix.ENOBUFS):
		return ": net.ipv4.igmp_max_memberships is the most that a socket can join"
	}
	return ""
}

// prepare sets how far fd's datagrams go, and where those to groups do: out of the same interface that the groups are joined at, and not
// back to this host, whose own member would take them for another's.
func (o *Options) prepare(fd int) error {
	v6 := o.Remotes[0].Addr().Is6()
	var ttl = [2]int{unix.IP_TTL, unix.IP_MULTICAST_TTL}
	level, loop := unix.IPPROTO_IP, unix.IP_MULTICAST_LOOP
	if v6 {
		ttl = [2]int{unix.IPV6_UNICAST_HOPS, unix.IPV6_MULTICAST_HOPS}
		level, loop = unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_LOOP
	}
	if o.TTL != 0 {
		for _, opt := range ttl {
			if err := unix.SetsockoptInt(fd, level, opt, o.TTL); err != nil {
				return fmt.Errorf("time to live %d: %w", o.TTL, err)
			}
		}
	}
	groups := o.groups()
	if len(groups) == 0 {
		return nil
	}
	if err := unix.SetsockoptInt(fd, level, loop, 0); err != nil {
		return fmt.Errorf("groups without this host: %w", err)
	}
	var err error
	if v6 {
		var index uint32
		if index, err = ifindex(o.Dev); err == nil {
			err = unix.SetsockoptInt(fd, level, unix.IPV6_MULTICAST_IF, int(index))
		}
	} else {
		var m *unix.IPMreqn
		if m, err = o.mreq4(groups[0]); err == nil {
			err = unix.SetsockoptIPMreqn(fd, level, unix.IP_MULTICAST_IF, m)
		}
	}
	if err != nil {
		return fmt.Errorf("the interface for groups: %w", err)
	}
	return nil
}
