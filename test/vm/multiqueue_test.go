//go:build linux

package vm

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/test/vm/rpc"
	"github.com/vhostd/vhostd/virtio"
)

// pairCounters are one queue pair's packets, counted by the guest's driver.
type pairCounters struct{ rx, tx uint64 }

// pairs reads the guest's counters per queue pair.
func (r *rig) pairs(n int) []pairCounters {
	r.t.Helper()
	c := make([]pairCounters, n)
	for line := range strings.Lines(r.exec("ethtool", "-S", "eth0")) {
		var pair int
		var v uint64
		if _, err := fmt.Sscanf(strings.TrimSpace(line), "rx_queue_%d_packets: %d", &pair, &v); err == nil && pair < n {
			c[pair].rx = v
		}
		if _, err := fmt.Sscanf(strings.TrimSpace(line), "tx_queue_%d_packets: %d", &pair, &v); err == nil && pair < n {
			c[pair].tx = v
		}
	}
	return c
}

// pairsUsed runs transfers over many connections and returns what each pair carried meanwhile.
func (r *rig) pairsUsed(n int) []pairCounters {
	r.t.Helper()
	before := r.pairs(n)
	r.tcpArgs(rpc.TCPArgs{Addr: netlab.At(hostIP, r.servers.Stream), Bytes: 64 << 20, Streams: 16})
	used := r.pairs(n)
	for i := range used {
		used[i].rx -= before[i].rx
		used[i].tx -= before[i].tx
		r.logf("queue pair %d carried %d packets to the guest, %d from it", i, used[i].rx, used[i].tx)
	}
	return used
}

// channels sets how many pairs the guest uses.
func (r *rig) channels(n int) {
	r.t.Helper()
	r.exec("ethtool", "-L", "eth0", "combined", fmt.Sprint(n))
	out := strings.Join(strings.Fields(r.exec("ethtool", "-l", "eth0")), " ")
	if !strings.HasSuffix(out, fmt.Sprintf("Combined: %d", n)) {
		r.t.Fatalf("ethtool -l shows %q, want %d combined", out, n)
	}
	r.logf("guest uses %d queue pair(s)", n)
}

// TestMultiqueue: two pairs carry traffic; then one does; then two again.
func TestMultiqueue(t *testing.T) {
	r := newTapRig(t, func(r *rig) {
		r.mopts.CPUs, r.mopts.QueuePairs = 2, 2
		r.dopts.Args = []string{"--queues", "2"}
	})
	r.features(virtio.FNetMQ, 0)
	r.channels(2)
	r.wantBoth(r.pairsUsed(2))

	// The number changes under traffic.
	_, err := r.vm.Traffic(r.ctx, rpc.TrafficArgs{Action: "start", Addr: netlab.At(hostIP, r.servers.Echo), Size: 512, Interval: 1e6})
	must(t, err)
	for range 3 {
		r.channels(1)
		r.channels(2)
	}
	r.channels(1)
	// What the second pair was sent before counts when it is returned, which may still come.
	last := r.pairs(2)[1].tx
	eventually(t, time.Minute, "the second pair's last frames", func() bool {
		was := last
		time.Sleep(time.Second)
		last = r.pairs(2)[1].tx
		return last == was
	})
	if used := r.pairsUsed(2); used[0].rx == 0 || used[0].tx == 0 || used[1].tx != 0 {
		t.Errorf("with one pair in use the pairs carried %+v", used)
	}
	r.channels(2)
	r.wantBoth(r.pairsUsed(2))
	c, err := r.vm.Traffic(r.ctx, rpc.TrafficArgs{Action: "stop"})
	must(t, err)
	r.logf("UDP echo meanwhile: %+v", c)
	if c.Bad != 0 || c.Received == 0 {
		t.Errorf("UDP echo while the number of pairs changed: %+v, want replies and none bad", c)
	}
	r.healthy()
}

// wantBoth wants a share of at least one packet in a hundred on each pair, both ways.
func (r *rig) wantBoth(used []pairCounters) {
	r.t.Helper()
	var sum pairCounters
	for _, c := range used {
		sum.rx += c.rx
		sum.tx += c.tx
	}
	for i, c := range used {
		if c.rx*100 < sum.rx || c.tx*100 < sum.tx || c.rx == 0 || c.tx == 0 {
			r.t.Errorf("queue pair %d carried %+v of %+v", i, c, sum)
		}
	}
}
