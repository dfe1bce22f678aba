//go:build linux

package main

import (
	"fmt"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/zerocopy"
)

// Bounds beyond which a turn is noisy, as parts of its time.
const (
	maxStolen  = 0.02 // by the hypervisor
	maxForeign = 0.06 // somebody else on vhostd's processor; ticks are good to some hundredths
	minGuest   = 0.90 // the guest on its processor, at least
)

// count makes figures of two readings.
func (t *turn) count(from, to reading) {
	wall := to.at.Sub(from.at)
	back, softirqd, busy := to.back-from.back, to.softirqd-from.softirqd, to.busy-from.busy
	stolen, guest := to.stolen-from.stolen, to.guest-from.guest
	t.VhostdNs, t.SoftirqdNs = int64(back), int64(softirqd)
	for i := range to.kthreads {
		t.KthreadsNs += int64(max(to.kthreads[i]-from.kthreads[i], 0))
	}
	t.IrqNs, t.GuestNs, t.BusyNs, t.StolenNs = int64(to.irq-from.irq), int64(guest), int64(busy), int64(stolen)
	t.CPUNs = t.VhostdNs + t.SoftirqdNs
	if irqTimeApart() {
		t.CPUNs += t.IrqNs
	}
	part := func(d time.Duration) float64 { return float64(d) / float64(wall) }
	switch foreign := busy - time.Duration(t.CPUNs); {
	case part(stolen) > 2*maxStolen: // of two processors
		t.Noise = fmt.Sprintf("%.0f %% stolen", 50*part(stolen))
	case part(foreign) > maxForeign:
		t.Noise = fmt.Sprintf("others had %.0f %% of vhostd's processor", 100*part(foreign))
	case part(guest) < minGuest:
		t.Noise = fmt.Sprintf("the guest had %.0f %% of its processor", 100*part(guest))
	}
}

// prove checks that the mode did what it says. With a capture on the path nothing can be said of a mode that is not off.
func (t *turn) prove(m mode, before, after backend.QueueStats, capture bool) {
	t.Outcomes = map[string]uint64{}
	var all uint64
	for o, n := range after.Outcomes {
		if n -= before.Outcomes[o]; n > 0 {
			t.Outcomes[o] = n
			all += n
		}
	}
	t.MaxPending, t.MaxWaitNs = after.MaxPending, after.MaxWaitNs
	if m.off() || !capture {
		t.Unproven = t.doubt(m, all)
	}
}

// doubt says why a turn is not what its mode says; "" if it is. A frame that lost its way between two readings of a counter would be one in a thousand.
func (t *turn) doubt(m mode, all uint64) string {
	const most = 0.999
	zero, small := t.share(zerocopy.ZeroCopied), t.share(zerocopy.CopiedSmall)
	pending := t.share(zerocopy.CopiedCap)
	switch {
	case all != t.Frames:
		return fmt.Sprintf("%d of %d frames were counted", all, t.Frames)
	case float64(t.Arrived) < most*float64(t.Frames):
		return fmt.Sprintf("%d of %d frames arrived", t.Arrived, t.Frames)
	case m.off() && t.share(zerocopy.Copied) < most:
		return "not all frames were copied"
	case m.off() || small >= most:
		return ""
	case zero+pending < most:
		return fmt.Sprintf("%.1f %% zero-copy", 100*zero)
	}
	return ""
}
