//go:build linux

package vm

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/pair"
	"github.com/vhostd/vhostd/test/vm/rpc"
)

// guestRAM is the memory of a guest, seen from beside its QEMU: it can be read for as long as the file is open, whatever
// becomes of QEMU, and is not mapped for that.
type guestRAM struct{ *os.File }

// openRAM opens a guest's memory. File offsets are guest physical addresses: the guests here have less than 2 GiB.
func (e *end) openRAM() guestRAM {
	e.t.Helper()
	pid, err := e.vm.PID()
	must(e.t, err)
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	must(e.t, err)
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && strings.HasPrefix(target, "/memfd:memory-backend-memfd") {
			f, err := os.Open(fd)
			must(e.t, err)
			e.t.Cleanup(func() { f.Close() })
			return guestRAM{f}
		}
	}
	e.t.Fatalf("QEMU (process %d) has no memory file", pid)
	return guestRAM{}
}

// mappings is how often this process maps the guest's memory: each region of it counts.
func (m guestRAM) mappings(t *testing.T) (n int) {
	t.Helper()
	info, err := m.Stat()
	must(t, err)
	maps, err := os.ReadFile("/proc/self/maps")
	must(t, err)
	inode := fmt.Sprint(info.Sys().(*syscall.Stat_t).Ino)
	for line := range strings.Lines(string(maps)) {
		if f := strings.Fields(line); len(f) > 4 && f[4] == inode {
			n++
		}
	}
	return n
}

func (m guestRAM) u16(t *testing.T, at int64) uint16 {
	t.Helper()
	var b [2]byte
	_, err := m.ReadAt(b[:], at)
	must(t, err)
	return binary.LittleEndian.Uint16(b[:])
}

// transmitq is where the guest's driver has put its split ring (virtio-v1.2 §2.7), as QEMU knows it.
type transmitq struct {
	Size  int64 `json:"num"`
	Avail int64 `json:"avail-phys"` // guest physical addresses
	Used  int64 `json:"used-phys"`
}

// transmitq asks QEMU. (x-query-virtio-queue-status would not do: it sends GET_VRING_BASE, which stops the ring.)
func (e *end) transmitq() (q transmitq) {
	e.t.Helper()
	reply, err := e.vm.QMP(e.ctx, "x-query-virtio-vhost-queue-status",
		map[string]any{"path": "/machine/peripheral/net0/virtio-backend", "queue": 1})
	must(e.t, err)
	must(e.t, json.Unmarshal(reply, &q))
	if q.Size == 0 || q.Avail == 0 || q.Used == 0 {
		e.t.Fatalf("QEMU says of the transmitq: %s", reply)
	}
	return q
}

// ringState is a split ring, read at one moment: the indices, and the heads of the chains in the order in which the driver
// made them available and in which the device used them, from slot 0.
type ringState struct {
	availIndex, usedIndex uint16
	avail, used           []uint16
}

func (q transmitq) read(t *testing.T, m guestRAM) (s ringState) {
	t.Helper()
	s.availIndex, s.usedIndex = m.u16(t, q.Avail+2), m.u16(t, q.Used+2)
	for i := range q.Size {
		s.avail = append(s.avail, m.u16(t, q.Avail+4+2*i))
		s.used = append(s.used, m.u16(t, q.Used+4+8*i)) // the low half of le32 id
	}
	return s
}

// returned checks that the chains between the used indices from and s.usedIndex were each returned once: those that were
// made available there, in that order, and no chain twice.
func (s ringState) returned(t *testing.T, from uint16) {
	t.Helper()
	seen := map[uint16]bool{}
	for i := from; i != s.usedIndex; i++ {
		slot := int(i) % len(s.avail)
		head := s.used[slot]
		if head != s.avail[slot] {
			t.Errorf("used ring slot %d holds head %d, the chain made available there has head %d", slot, head, s.avail[slot])
		}
		if seen[head] {
			t.Errorf("head %d was returned twice", head)
		}
		seen[head] = true
	}
	if open := s.availIndex - s.usedIndex; int(open) > len(s.avail) {
		t.Errorf("available index %d, used index %d: more chains were returned than there were", s.availIndex, s.usedIndex)
	}
}

// hold makes the guest send until the device has at least n frames more, that nobody receives, and returns how many it
// holds then. The other guest is stopped.
func (e *end) hold(to *end, n int) int {
	e.t.Helper()
	had := e.dev.Held()
	_, err := e.vm.Traffic(e.ctx, rpc.TrafficArgs{Action: "start", Addr: to.ip + ":7", Size: 512, Interval: 2 * time.Millisecond})
	must(e.t, err)
	eventually(e.t, time.Minute, fmt.Sprintf("%d frames held by the device", n), func() bool { return e.dev.Held() >= had+n })
	_, err = e.vm.Traffic(e.ctx, rpc.TrafficArgs{Action: "stop"})
	must(e.t, err)
	return e.dev.Held()
}

// unbind takes the driver from the device, and returns the ring as it was when the back-end had stopped it: the guest is
// still waiting for that then.
func (e *end) unbind(device string, q transmitq, m guestRAM) ringState {
	t := e.t
	t.Helper()
	rings := make(chan ringState, 1)
	e.log.onLog(func(r slog.Record) {
		if r.Message != "queue stopped" {
			return
		}
		r.Attrs(func(a slog.Attr) bool {
			if a.Key == "queue" && a.Value.Int64() == 1 {
				select {
				case rings <- q.read(t, m):
				default:
				}
			}
			return true
		})
	})
	defer e.log.onLog(nil)
	start := time.Now()
	must(t, e.vm.WriteFile(e.ctx, "/sys/bus/virtio/drivers/virtio_net/unbind", device))
	e.logf("guest %s: unbinding %s from virtio_net took %v, of which at most %v for the drain", e.mopts.Name, device,
		time.Since(start).Round(time.Millisecond), drainTimeout)
	if len(rings) == 0 {
		t.Fatal("the transmitq did not stop when its driver went")
	}
	return <-rings
}

// TestUnbindInFlight: the driver goes while a device still reads the guest's pages. Every chain comes back exactly once, at
// the drain's deadline; the memory stays until the device has done with it, and what it does then harms nobody.
func TestUnbindInFlight(t *testing.T) {
	needSplit(t, "it reads the indices of a split ring in the guest's memory")
	vhosttest.NoLeaks(t)
	a, b := join(t, pair.Options{Hold: true}, nil)
	a.ping(b.ip, 1472)
	device, err := a.vm.VirtioDevice(a.ctx, "eth0")
	must(t, err)
	ram, q := a.openRAM(), a.transmitq()
	a.logf("guest a: transmitq of %d entries; its memory is mapped %d times", q.Size, ram.mappings(t))

	b.pause(true)
	held := a.hold(b, 40)
	before := q.read(t, ram)
	a.logf("the device holds %d frames; available index %d, used index %d", held, before.availIndex, before.usedIndex)
	if before.usedIndex == before.availIndex {
		t.Errorf("every chain was returned while the device held %d frames", held)
	}
	after := a.unbind(device, q, ram)
	held = a.dev.Held() // the driver may have sent some more before it went
	a.logf("after the drain the device still holds %d frames; available index %d, used index %d", held, after.availIndex, after.usedIndex)
	after.returned(t, before.usedIndex)
	if n := int(after.usedIndex - before.usedIndex); n != held {
		t.Errorf("%d chains were returned, want %d: those of the frames in flight", n, held)
	}
	a.faultless(uint64(held))

	// The device is done with some frames late, and with the others once the driver is back.
	released := a.dev.Release(held / 2)
	a.logf("released late: %d frames; the guest's memory is mapped %d times", released, ram.mappings(t))
	must(t, a.vm.WriteFile(a.ctx, "/sys/bus/virtio/drivers/virtio_net/bind", device))
	a.configure()
	b.pause(false)
	a.ping(b.ip, 1472)
	a.transfer(b, smallSize)
	a.faultless(uint64(held))
	b.faultless(0)
	a.dieInFlight(b, ram)

	sent, received := a.be.Stats().Queues[1], b.be.Stats().Queues[0]
	all := sent.Frames - sent.Outcomes["dropped"] + sent.GivenUp
	a.logf("guest a sent %d frames in all, %d went nowhere, guest b received %d", all, released, received.Frames)
	if received.Frames != all-uint64(released) {
		t.Errorf("guest b received %d frames, want %d of %d", received.Frames, all-uint64(released), all)
	}
}

// dieInFlight ends QEMU while the device holds frames: they are delivered all the same, out of memory that nobody else has.
func (e *end) dieInFlight(to *end, ram guestRAM) {
	t := e.t
	t.Helper()
	to.pause(true)
	held := e.hold(to, 40)
	e.vm.Kill()
	eventually(t, time.Minute, "the end of the session", func() bool { return !e.be.Stats().Connected })
	mapped := ram.mappings(t)
	e.logf("QEMU of guest %s is gone; the device holds %d frames, the guest's memory is mapped %d times", e.mopts.Name, e.dev.Held(), mapped)
	if e.dev.Held() < held || mapped == 0 {
		t.Errorf("%d frames are in flight, of %d; memory is mapped %d times", e.dev.Held(), held, mapped)
	}
	held = e.dev.Held()
	to.pause(false)
	eventually(t, time.Minute, "delivery of what was in flight", func() bool { return e.dev.Held() == 0 })
	eventually(t, time.Minute, "the end of the mappings", func() bool { return ram.mappings(t) == 0 })
	e.logf("%d frames were delivered late; the guest's memory is mapped %d times", held, ram.mappings(t))
	to.faultless(0)
}

// pause stops the guest, device and all, or lets it go on: meanwhile it receives nothing.
func (e *end) pause(stop bool) {
	e.t.Helper()
	command := map[bool]string{true: "stop", false: "cont"}[stop]
	_, err := e.vm.QMP(e.ctx, command, nil)
	must(e.t, err)
	e.logf("guest %s: %s", e.mopts.Name, command)
}
