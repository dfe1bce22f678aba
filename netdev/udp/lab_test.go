package udp_test

import (
	"fmt"
	"os/exec"
	"testing"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/udp"
)

// lab is a cable with addresses: here 10.9.0.1, there 10.9.0.2.
type lab struct{ *netdevtest.Lab }

const (
	hereIP  = "10.9.0.1"
	thereIP = "10.9.0.2"
)

func newLab(t testing.TB, mtu int) *lab {
	t.Helper()
	require.Tool(t, "netns", "tc")
	l := &lab{netdevtest.NewLab(t, "netns", mtu, 0)}
	l.Run("ip -n " + l.Here + " address add " + hereIP + "/24 dev v0")
	l.Run("ip -n " + l.There + " address add " + thereIP + "/24 dev v0")
	// No ARP is on the cable.
	l.Run("ip -n " + l.Here + " neighbour replace " + thereIP + " lladdr 02:00:00:00:00:02 dev v0")
	l.Run("ip -n " + l.There + " neighbour replace " + hereIP + " lladdr 02:00:00:00:00:01 dev v0")
	return l
}

// sink makes an interface here that takes pages as a network card does, and frees every frame at once: the way to 10.8.0.2.
func (l *lab) sink() {
	l.Helper()
	if err := l.Try("ip -n " + l.Here + " link add i0 mtu 65535 type ifb"); err != nil {
		require.Skip(l, "ifb", "the kernel has no ifb: %v", err)
	}
	l.Run("ip -n " + l.Here + " address add 10.8.0.1/24 dev i0")
	l.Run("ip -n " + l.Here + " link set i0 up")
}

// device opens a device here, which the caller closes. edit has the last word on its options.
func (l *lab) device(options string, edit ...func(o *udp.Options)) (d *udp.Device) {
	l.Helper()
	o, err := udp.ParseOptions(options)
	must(l, err)
	for _, f := range edit {
		f(&o)
	}
	l.In(l.Here, func() (err error) { d, err = udp.Open(o); return err })
	return d
}

// peer makes a tunnel of the kernel's there, or ends the test where the kernel has none of this kind.
func (l *lab) peer(kind, name string, mtu int) {
	l.Helper()
	args := map[string]string{
		"vxlan":  "id 42 local " + thereIP + " remote " + hereIP + " dstport 4789",
		"geneve": "id 42 remote " + hereIP + " dstport 6081",
	}
	if err := l.Try(fmt.Sprintf("ip -n %s link add %s type %s %s", l.There, name, kind, args[kind])); err != nil {
		if kind == "geneve" {
			// Many a kernel is built without, and nothing that could be installed changes that: no part that can be required.
			l.Skipf("skipped: the kernel has no %s: %v", kind, err)
		}
		require.Skip(l, kind, "the kernel has no %s: %v", kind, err)
	}
	l.Run(fmt.Sprintf("ip -n %s link set %s mtu %d up", l.There, name, mtu))
	// Else the kernel puts the segments that it gets together again.
	l.Run(fmt.Sprintf("ip netns exec %s %s -K %s gro off", l.There, require.Tool(l, "netns", "ethtool"), name))
}

// inOrder has one processor deliver there, or frames that left here by two would overtake each other.
func (l *lab) inOrder() {
	l.Helper()
	must(l, exec.Command("ip", "netns", "exec", l.There, "sh", "-c", "echo 1 > /sys/class/net/v0/queues/rx-0/rps_cpus").Run())
}

// bucket is how many bytes pass a held interface before frames wait.
const bucket = 20000

// hold has frames wait in the queueing discipline of an interface here once bucket bytes have passed: for minutes, if nobody releases them.
func (l *lab) hold(dev string) {
	l.Helper()
	l.Run(fmt.Sprintf("tc -n %s qdisc replace dev %s root tbf rate 1kbit burst %d limit 10000000", l.Here, dev, bucket))
}

// release lets the frames that wait go with the next one that is sent.
func (l *lab) release(dev string) {
	l.Helper()
	l.Run("tc -n " + l.Here + " qdisc change dev " + dev + " root tbf rate 10gbit burst 10000000 limit 10000000")
}

// purge drops the frames that wait.
func (l *lab) purge(dev string) {
	l.Helper()
	l.Run("tc -n " + l.Here + " qdisc delete dev " + dev + " root")
}
