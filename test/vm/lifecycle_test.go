//go:build linux

package vm

import (
	"context"
	"testing"
	"time"

	"github.com/vhostd/vhostd/test/vm/daemon"
	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/test/vm/rpc"
	"github.com/vhostd/vhostd/test/vm/stream"
)

// rounds is how often each of these tests goes through its event: what leaks with each round shows.
const rounds = 3

// flood starts traffic in both directions that nobody waits for: datagrams, and a transfer that will not end well.
func (r *rig) flood() {
	r.t.Helper()
	_, err := r.vm.Traffic(r.ctx, rpc.TrafficArgs{Action: "start", Addr: netlab.At(hostIP, r.servers.Echo), Size: 1400, Interval: time.Millisecond})
	must(r.t, err)
	vm := r.vm
	go func() {
		_, _ = vm.TCP(r.ctx, rpc.TCPArgs{Addr: netlab.At(hostIP, r.servers.Stream), Mode: stream.Sink, Bytes: 4 << 30})
	}()
	go func() {
		_, _ = vm.TCP(r.ctx, rpc.TCPArgs{Addr: netlab.At(hostIP, r.servers.Stream), Mode: stream.Source, Bytes: 4 << 30})
	}()
	r.waitMoved(4 << 20)
}

// works shows that traffic passes.
func (r *rig) works() {
	r.t.Helper()
	r.ping(hostIP, 1472)
	r.tcp(hostIP, 16<<20)
}

// survivor watches a process that must not grow from round to round.
type survivor struct {
	name   string
	pid    int
	vhostd *daemon.Daemon // nil: it is QEMU
	before *daemon.Resources
}

func (s *survivor) look(r *rig) daemon.Resources {
	r.t.Helper()
	now, err := daemon.ResourcesOf(s.pid)
	must(r.t, err)
	if s.vhostd != nil {
		now.Goroutines, err = s.vhostd.Goroutines(r.ctx)
		must(r.t, err)
	}
	return now
}

// check compares with the first round, in the same state, and prints what there is.
func (s *survivor) check(r *rig) {
	r.t.Helper()
	now := s.look(r)
	r.logf("%s holds %v", s.name, now)
	if s.before == nil {
		s.before = &now
		return
	}
	leak := now.Leak(*s.before)
	if leak == "" {
		return
	}
	// Something may be on its way out: a socket of the session before, say.
	eventually(r.t, 20*time.Second, s.name+" to let go of: "+leak, func() bool {
		return s.look(r).Leak(*s.before) == ""
	})
}

// TestGuestReboot: the guest is reset, by QEMU and by itself, while traffic runs.
func TestGuestReboot(t *testing.T) {
	r := newTapRig(t, func(r *rig) { r.mopts.AllowReboot = true })
	vhostd := r.survivor()
	r.works()
	vhostd.check(r)
	for i := range rounds {
		r.flood()
		if i%2 == 0 {
			_, err := r.vm.QMP(r.ctx, "system_reset", nil)
			must(t, err)
		} else {
			go r.vm.WriteFile(r.ctx, "/proc/sysrq-trigger", "b") // is not answered
		}
		r.waitBoot()
		r.configureGuest()
		r.works()
		vhostd.check(r)
	}
}

// survivor watches vhostd, or QEMU where there is none.
func (r *rig) survivor() *survivor {
	r.t.Helper()
	if r.vhostd != nil {
		return &survivor{name: "vhostd", pid: r.vhostd.PID(), vhostd: r.vhostd}
	}
	return r.qemuSurvivor()
}

func (r *rig) qemuSurvivor() *survivor {
	r.t.Helper()
	pid, err := r.vm.PID()
	must(r.t, err)
	return &survivor{name: "QEMU", pid: pid}
}

// TestQEMURestart: QEMU is killed, or told to end, while traffic runs; vhostd serves the next one.
func TestQEMURestart(t *testing.T) {
	needVhostd(t)
	r := newTapRig(t, nil)
	vhostd := r.survivor()
	r.works()
	vhostd.check(r)
	for i := range rounds {
		r.flood()
		if i == 1 {
			ctx, cancel := context.WithTimeout(r.ctx, time.Minute)
			must(t, r.vm.Quit(ctx))
			cancel()
			r.logf("QEMU was told to quit")
		} else {
			r.vm.Kill()
			r.logf("QEMU was killed")
		}
		r.boot()
		r.configureGuest()
		r.works()
		vhostd.check(r)
	}
}

// TestQEMURestartClient: the same with QEMU listening and vhostd dialing, again and again.
func TestQEMURestartClient(t *testing.T) {
	needVhostd(t)
	r := newTapRig(t, func(r *rig) { r.dopts.Client, r.mopts.Listen = true, true })
	vhostd := r.survivor()
	r.works()
	vhostd.check(r)
	r.flood()
	r.vm.Kill()
	r.logf("QEMU was killed")
	r.boot()
	r.configureGuest()
	r.works()
	vhostd.check(r)
}

// TestQEMURestartQueuePairs: the same with two queue pairs, for each of which QEMU announces and withdraws all memory.
func TestQEMURestartQueuePairs(t *testing.T) {
	needVhostd(t)
	r := newTapRig(t, func(r *rig) {
		r.dopts.Client, r.mopts.Listen = true, true
		r.mopts.CPUs, r.mopts.QueuePairs = 2, 2
		r.dopts.Args = []string{"--queues", "2"}
	})
	vhostd := r.survivor()
	for i := range rounds {
		r.channels(2)
		r.wantBoth(r.pairsUsed(2))
		r.ping(hostIP, 1472)
		r.healthy()
		vhostd.check(r)
		switch i {
		case 0:
			r.vm.Kill()
			r.logf("QEMU was killed")
		case 1:
			ctx, cancel := context.WithTimeout(r.ctx, time.Minute)
			must(t, r.vm.Quit(ctx))
			cancel()
			r.logf("QEMU was told to quit")
		default:
			return
		}
		r.boot()
		r.configureGuest()
	}
}

// TestVhostdRestart: vhostd is killed, or told to end, in the middle of a transfer. QEMU dials the next one, and the
// same transfer goes on to its good end; the guest does nothing about it.
func TestVhostdRestart(t *testing.T) {
	needVhostd(t)
	needSplit(t, "a packed ring's position is in no memory that outlives a back-end, without VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD")
	r := newTapRig(t, func(r *rig) { r.mopts.Reconnect = true })
	qemu := r.qemuSurvivor()
	r.works()
	qemu.check(r)
	for i := range rounds {
		mode := []stream.Mode{stream.Sink, stream.Source}[i%2]
		transfer := r.background(rpc.TCPArgs{Addr: netlab.At(hostIP, r.servers.Stream), Mode: mode, Bytes: transferSize, Seed: 9})
		r.waitMoved(16 << 20)
		if i == 1 {
			ctx, cancel := context.WithTimeout(r.ctx, 20*time.Second)
			must(t, r.vhostd.Stop(ctx))
			cancel()
			r.logf("vhostd ended after SIGTERM")
		} else {
			r.vhostd.Kill()
			r.logf("vhostd was killed")
		}
		r.startVhostd()
		r.configureHost()
		transfer()
		r.works()
		qemu.check(r)
	}
}
