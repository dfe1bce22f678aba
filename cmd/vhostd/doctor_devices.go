package main

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys/uring"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/tap"
	"github.com/vhostd/vhostd/netdev/xdp"
)

// checkPing looks for the right to send pings without privilege.
func checkPing() []finding {
	f := finding{
		What: "pings for --net user", Detail: "allowed",
		Fix: `sudo sysctl -w net.ipv4.ping_group_range="0 2147483647" (and a line in /etc/sysctl.d to keep it)`,
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err == nil {
		unix.Close(fd)
	} else {
		allowed, _ := os.ReadFile("/proc/sys/net/ipv4/ping_group_range")
		err = fmt.Errorf("%w; net.ipv4.ping_group_range is %q", err, strings.Join(strings.Fields(string(allowed)), " "))
		f.Meaning = "a guest can ping its router, and no host beyond it; TCP, UDP and DNS work"
	}
	return one(f, err, verdictWarn)
}

func checkTap() []finding { return told("tap", tap.Check()) }

func checkXDP() []finding { return told("xdp", xdp.Check()) }

// told passes on what a device's package knows.
func told(kind string, facts []netdev.Fact) []finding {
	var all []finding
	for _, fact := range facts {
		f := finding{What: "--net " + kind + ": " + fact.What, Verdict: verdictOK, Detail: fact.Detail, Fix: fact.Fix}
		if !fact.OK {
			f.Verdict = verdictWarn
		}
		all = append(all, f)
	}
	return all
}

// checkPacket looks for the right to attach to interfaces of the host.
func checkPacket() []finding {
	f := finding{
		What: "--net packet: CAP_NET_RAW", Detail: "held",
		Fix: "needed for packet sockets: run as root, or set AmbientCapabilities=CAP_NET_RAW in the systemd unit",
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	return one(f, err, verdictWarn)
}

func checkLockedMemory() []finding {
	f := finding{What: "locked memory", Meaning: "pages that a tunnel has in flight count against it, unless vhostd has CAP_IPC_LOCK"}
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l); err != nil {
		return one(f, err, verdictWarn)
	}
	f.Verdict, f.Detail = verdictOK, "at most "+limit(l.Cur, "bytes")
	return []finding{f}
}

func checkHugePages() []finding {
	f := finding{What: "huge pages", Verdict: verdictOK, Meaning: "not needed; a guest may be given some (memory-backend-memfd,hugetlb=on)"}
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return one(f, err, verdictWarn)
	}
	var total, free int
	for line := range strings.Lines(string(b)) {
		_, _ = fmt.Sscanf(line, "HugePages_Total: %d", &total)
		_, _ = fmt.Sscanf(line, "HugePages_Free: %d", &free)
	}
	f.Detail = fmt.Sprintf("%d reserved, %d free", total, free)
	return []finding{f}
}

// checkIOURing makes a ring as the tunnels do.
func checkIOURing() []finding {
	f := finding{What: "io_uring", Verdict: verdictOK, Detail: "available", Meaning: "tunnels (--net vxlan, geneve, dgram) send large frames from the guest's pages, and taps take frames in batches"}
	r, err := uring.New(8, 8)
	if err == nil {
		_ = r.Close()
		return []finding{f}
	}
	f.Verdict, f.Detail, f.Meaning = verdictWarn, err.Error(), "tunnels (--net vxlan, geneve, dgram) send large frames by MSG_ZEROCOPY instead, which takes more CPU"
	if b, err := os.ReadFile("/proc/sys/kernel/io_uring_disabled"); err == nil && strings.TrimSpace(string(b)) != "0" {
		f.Detail += ": kernel.io_uring_disabled is " + strings.TrimSpace(string(b))
		f.Fix = "sudo sysctl -w kernel.io_uring_disabled=0"
	}
	return []finding{f}
}

// checkZeroCopySend prepares a socket as the tunnels do without io_uring.
func checkZeroCopySend() []finding {
	f := finding{What: "MSG_ZEROCOPY", Verdict: verdictOK, Detail: "available for UDP",
		Meaning: "where there is no io_uring tunnels send large frames from the guest's pages by it"}
	if b, err := os.ReadFile("/proc/sys/net/core/optmem_max"); err == nil {
		f.Detail += "; net.core.optmem_max, which limits the frames in flight, is " + strings.TrimSpace(string(b)) + " bytes"
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1)
		unix.Close(fd)
	}
	if err != nil {
		f.Verdict, f.Detail, f.Meaning = verdictWarn, err.Error(), "where there is no io_uring either tunnels copy every frame; nothing else is lost"
	}
	return []finding{f}
}
