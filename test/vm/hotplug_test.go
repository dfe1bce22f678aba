//go:build linux

package vm

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/vhostd/vhostd/test/vm/daemon"
	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/test/vm/rpc"
	"github.com/vhostd/vhostd/test/vm/stream"
)

// memTotal is the guest's memory in MiB.
func (r *rig) memTotal() int {
	r.t.Helper()
	text, err := r.vm.ReadFile(r.ctx, "/proc/meminfo")
	must(r.t, err)
	var kib int
	if _, err := fmt.Sscanf(text, "MemTotal: %d kB", &kib); err != nil {
		r.t.Fatalf("/proc/meminfo: %v", err)
	}
	return kib >> 10
}

// zoneNormal is how many pages the guest has above 4 GiB, where plugged memory goes and where its kernel takes the
// pages for frames from first.
func (r *rig) zoneNormal() (managed int) {
	r.t.Helper()
	text, err := r.vm.ReadFile(r.ctx, "/proc/zoneinfo")
	must(r.t, err)
	_, zone, _ := strings.Cut(text, "zone   Normal")
	for line := range strings.Lines(zone) {
		if _, err := fmt.Sscanf(strings.TrimSpace(line), "managed %d", &managed); err == nil {
			return managed
		}
	}
	return 0
}

// plug adds a module of memory to the running guest.
func (r *rig) plug(id string, mib int) {
	r.t.Helper()
	_, err := r.vm.QMP(r.ctx, "object-add", map[string]any{
		"qom-type": "memory-backend-memfd", "id": "mem-" + id, "size": mib << 20, "share": true})
	must(r.t, err)
	_, err = r.vm.QMP(r.ctx, "device_add", map[string]any{"driver": "pc-dimm", "id": id, "memdev": "mem-" + id})
	must(r.t, err)
}

// TestMemoryHotplug: memory is plugged in while traffic runs, and then carries traffic itself.
func TestMemoryHotplug(t *testing.T) {
	r := newTapRig(t, func(r *rig) { r.mopts.MaxMemMiB = 2048 })
	must(t, r.vm.WriteFile(r.ctx, "/sys/devices/system/memory/auto_online_blocks", "online"))
	before, mappings := r.memTotal(), r.guestMappings()
	r.logf("before: guest has %d MiB, %d pages above 4 GiB; vhostd maps %d regions", before, r.zoneNormal(), mappings)

	transfer := r.background(rpc.TCPArgs{Addr: netlab.At(hostIP, r.servers.Stream), Mode: stream.Sink, Bytes: transferSize, Seed: 1})
	r.waitMoved(16 << 20)
	r.plug("dimm1", 512)
	eventually(t, time.Minute, "the plugged memory in the guest", func() bool { return r.memTotal() >= before+500 })
	r.logf("after: guest has %d MiB, %d pages above 4 GiB; vhostd maps %d regions", r.memTotal(), r.zoneNormal(), r.guestMappings())
	if r.zoneNormal() == 0 {
		t.Error("no plugged page is in use")
	}
	if !qemuBackend() && r.guestMappings() <= mappings {
		t.Errorf("vhostd maps %d regions of guest memory, as before", mappings)
	}
	transfer()

	// More than the guest had: what is sent from now on lies in plugged memory.
	must(t, r.vm.Hold(r.ctx, before+50))
	r.tcp(hostIP, 64<<20)
	r.plug("dimm2", 256)
	r.tcp(hostIP, 64<<20)
	r.ping(hostIP, 1472)
	r.healthy()
}

// TestMemoryUnplugQueuePairs: memory comes and goes again under traffic. QEMU 7.2 announces and withdraws it once for each
// of the two queue pairs; it is mapped once, until the last has withdrawn it.
func TestMemoryUnplugQueuePairs(t *testing.T) {
	needVhostd(t)
	r := newTapRig(t, func(r *rig) {
		r.mopts.MaxMemMiB, r.mopts.CPUs, r.mopts.QueuePairs = 1024, 2, 2
		r.dopts.Args = []string{"--queues", "2"}
	})
	r.channels(2)
	// Movable memory can be given back.
	must(t, r.vm.WriteFile(r.ctx, "/sys/devices/system/memory/auto_online_blocks", "online_movable"))
	before, mappings := r.memTotal(), r.guestMappings()
	transfer := r.background(rpc.TCPArgs{Addr: netlab.At(hostIP, r.servers.Stream), Mode: stream.Source, Bytes: transferSize, Seed: 1})
	for range 2 {
		r.plug("dimm1", 256)
		eventually(t, time.Minute, "the plugged memory in the guest", func() bool { return r.memTotal() >= before+250 })
		r.logf("plugged: guest has %d MiB, vhostd maps %d regions", r.memTotal(), r.guestMappings())
		if n := r.guestMappings(); n != mappings+1 {
			t.Errorf("vhostd maps %d regions with the plugged one, %d without", n, mappings)
		}
		r.unplug("dimm1")
		eventually(t, time.Minute, "the end of vhostd's mapping", func() bool { return r.guestMappings() == mappings })
		r.logf("unplugged: guest has %d MiB, vhostd maps %d regions", r.memTotal(), r.guestMappings())
	}
	transfer()
	r.wantBoth(r.pairsUsed(2))
	r.healthy()
}

// unplug asks the guest to give a module of memory back, and waits until it has.
func (r *rig) unplug(id string) {
	r.t.Helper()
	_, err := r.vm.QMP(r.ctx, "device_del", map[string]any{"id": id})
	must(r.t, err)
	eventually(r.t, time.Minute, "the guest's leave to take "+id, func() bool {
		_, err := r.vm.QMP(r.ctx, "object-del", map[string]any{"id": "mem-" + id})
		return err == nil
	})
}

// guestMappings is how many mappings of guest memory vhostd has.
func (r *rig) guestMappings() int {
	r.t.Helper()
	if r.vhostd == nil {
		return 0
	}
	res, err := daemon.ResourcesOf(r.vhostd.PID())
	must(r.t, err)
	return res.Memory
}

// background starts a transfer and returns what waits for its good end.
func (r *rig) background(a rpc.TCPArgs) (wait func()) {
	r.t.Helper()
	type outcome struct {
		res stream.Result
		err error
	}
	done := make(chan outcome, 1)
	vm := r.vm
	go func() {
		res, err := vm.TCP(r.ctx, a)
		done <- outcome{res, err}
	}()
	return func() {
		r.t.Helper()
		o := <-done
		must(r.t, o.err)
		r.logf("TCP in the background: %v", o.res)
		r.checkServed(max(a.Streams, 1), a.Bytes)
	}
}

// waitMoved waits until the tap device has carried that many bytes from the guest, beyond what it had.
func (r *rig) waitMoved(n uint64) {
	r.t.Helper()
	start, err := r.ns.Stats(tapName)
	must(r.t, err)
	eventually(r.t, time.Minute, fmt.Sprintf("%d bytes from the guest", n), func() bool {
		now, err := r.ns.Stats(tapName)
		return err == nil && now.RxBytes+now.TxBytes-start.RxBytes-start.TxBytes >= n
	})
}
