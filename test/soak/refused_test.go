//go:build linux

package soak

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/vhostd/vhostd/backend"
)

// refused is how many frames count as refused somewhere on the link, so far: by the daemons, their devices, the kernel's interfaces and its UDP sockets. What
// gets lost and counts nowhere is vhostd's to explain.
func (l *link) refused(t *testing.T) (n uint64) {
	namespaces := map[any]bool{}
	for _, d := range l.daemons {
		n += d.refused(t)
		if !namespaces[d.ns] {
			namespaces[d.ns] = true
			in(t, d.ns, func() error {
				m, err := refusedByKernel()
				n += m
				return err
			})
		}
	}
	return n
}

func (d *daemonOf) refused(t *testing.T) (n uint64) {
	var st backend.Stats
	if err := json.Unmarshal(d.ask(t), &st); err != nil {
		t.Error(err)
	}
	for _, q := range st.Queues {
		n += q.Invalid + q.TooBig + q.SendDropped + q.RecvDropped + q.Malformed
	}
	return n
}

// refusedByKernel reads the counters of this thread's namespace.
func refusedByKernel() (n uint64, err error) {
	dev, err := os.ReadFile("/proc/thread-self/net/dev")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(dev)) {
		_, counters, ok := strings.Cut(line, ":")
		if f := strings.Fields(counters); ok && len(f) == 16 {
			for _, at := range []int{2, 3, 10, 11} { // errors and drops, received and sent
				var v uint64
				_, _ = fmt.Sscan(f[at], &v)
				n += v
			}
		}
	}
	snmp, err := os.ReadFile("/proc/thread-self/net/snmp")
	if err != nil {
		return 0, err
	}
	var names []string
	for line := range strings.Lines(string(snmp)) {
		f := strings.Fields(line)
		switch {
		case f[0] != "Udp:":
		case names == nil:
			names = f
		default:
			for i, name := range names {
				if name == "InErrors" || name == "SndbufErrors" { // InErrors has RcvbufErrors in it
					var v uint64
					_, _ = fmt.Sscan(f[i], &v)
					n += v
				}
			}
		}
	}
	return n, nil
}
