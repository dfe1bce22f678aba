//go:build linux

package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Addresses that vhostd sends to, and of the ends in between.
const (
	peerIP  = "10.97.2.2"
	sinkMAC = "02:00:00:00:00:99"
)

// ends are the commands that lay each path; HERE is vhostd's namespace, THERE the other one. sink is the namespace that the ifb is in.
var ends = map[string]struct {
	local, sink string
	lay         []string
}{
	"ifb": {"10.97.2.1", "HERE", []string{
		"ip -n HERE address add 10.97.2.1/24 dev sink",
	}},
	"bridge": {"10.97.2.1", "THERE", []string{
		cable, upHere, upThere,
		"ip -n HERE address add 10.97.2.1/24 dev v0",
		"ip -n HERE neighbour replace 10.97.2.2 lladdr " + sinkMAC + " dev v0",
		"ip -n THERE link add br0 type bridge",
		"ip -n THERE link set v0 master br0",
		"ip -n THERE link set sink master br0",
		"ip -n THERE link set br0 up",
		"bridge -n THERE fdb replace " + sinkMAC + " dev sink master static",
	}},
	"forward": {"10.97.1.1", "THERE", []string{
		cable, upHere, upThere,
		"ip -n HERE address add 10.97.1.1/24 dev v0",
		"ip -n THERE address add 10.97.1.2/24 dev v0",
		"ip -n HERE neighbour replace 10.97.1.2 lladdr 02:00:00:00:00:02 dev v0",
		"ip -n HERE route add default via 10.97.1.2",
		"ip -n THERE address add 10.97.2.1/24 dev sink",
		"ip netns exec THERE sysctl -qw net.ipv4.ip_forward=1",
	}},
}

// The cable that joins the two namespaces.
const (
	upHere  = "ip -n HERE link set v0 up"
	upThere = "ip -n THERE link set v0 up"
	cable   = "ip -n HERE link add v0 mtu 65535 address 02:00:00:00:00:01 type veth peer name v0 mtu 65535 address 02:00:00:00:00:02 netns THERE"
)

// lab is a path: two namespaces, and an ifb in one of them that all datagrams end in.
type lab struct {
	here, there string
	local, sink string
	capture     int // packet socket at the ifb; -1: none
}

// layPath makes the namespaces and what is in them. The ifb has a queueing discipline, unless that is "", and a capture if asked for.
func layPath(path, qdisc string, capture bool) (l *lab, err error) {
	e, ok := ends[path]
	if !ok {
		return nil, fmt.Errorf("-paths: no path %q, known are %s", path, strings.Join(pathNames(), ", "))
	}
	name := fmt.Sprintf("vhostd-perf-%d", os.Getpid())
	l = &lab{here: name + "-a", there: name + "-b", local: e.local, capture: -1}
	l.sink = l.fill(e.sink)
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	steps := []string{"ip netns add HERE", "ip netns add THERE"}
	for _, ns := range []string{"HERE", "THERE"} {
		if _, err := os.Stat("/proc/sys/net/ipv6"); err == nil {
			steps = append(steps, "ip netns exec "+ns+" sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1")
		}
	}
	steps = append(steps, "ip -n "+e.sink+" link add sink mtu 65535 type ifb", "ip -n "+e.sink+" link set sink up")
	steps = slices.Concat(steps, e.lay)
	if qdisc != "" {
		steps = append(steps, "tc -n "+e.sink+" qdisc replace dev sink root "+qdisc)
	}
	for _, step := range steps {
		if err := run(l.fill(step)); err != nil {
			return l, err
		}
	}
	if capture {
		err = l.listen()
	}
	return l, err
}

// listen opens a packet socket at the ifb, which nobody reads: what is captured is dropped, after the kernel has copied it.
func (l *lab) listen() error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		ns, err := netns.GetFromName(l.sink)
		if err == nil {
			defer ns.Close()
			err = netns.Set(ns)
		}
		if err == nil {
			all := binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL}) // in network order
			l.capture, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all))
		}
		done <- err
	}()
	if err := <-done; err != nil {
		return fmt.Errorf("capture at the ifb: %w", err)
	}
	return nil
}

func pathNames() (names []string) {
	for n := range ends {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

func (l *lab) fill(command string) string {
	return strings.NewReplacer("THERE", l.there, "HERE", l.here).Replace(command)
}

func (l *lab) close() {
	if l.capture >= 0 {
		_ = unix.Close(l.capture)
	}
	_ = run("ip netns del " + l.here)
	_ = run("ip netns del " + l.there)
}

func run(command string) error {
	args := strings.Fields(command)
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", command, err, out)
	}
	return nil
}

// arrived is how many frames of size bytes the ifb has seen, by its bytes: several frames may leave as one packet, which a card would cut, and
// share the headers then. What it frees it counts as received first, whoever it is from.
func (l *lab) arrived(size int) (uint64, error) {
	out, err := exec.Command("ip", "-n", l.sink, "-j", "-s", "link", "show", "dev", "sink").Output()
	if err != nil {
		return 0, fmt.Errorf("counters of the ifb: %w", err)
	}
	var links []struct {
		Stats struct {
			Rx struct{ Bytes uint64 }
		} `json:"stats64"`
	}
	if err := json.Unmarshal(out, &links); err != nil {
		return 0, fmt.Errorf("counters of the ifb: %w", err)
	}
	if len(links) != 1 {
		return 0, errors.New("counters of the ifb: there is none")
	}
	return links[0].Stats.Rx.Bytes / uint64(size), nil
}

// net is vhostd's --net for a mode.
func (l *lab) net(tunnel string, m mode) string {
	s := fmt.Sprintf("dgram:local=%s:7001,remote=%s:7002", l.local, peerIP)
	if tunnel != "dgram" {
		s = fmt.Sprintf("%s:vni=42,local=%s,remote=%s", tunnel, l.local, peerIP)
	}
	return s + m.options
}
