package bench

import (
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// BenchmarkDriver is the guest's thread and a device that returns everything at once, on one core: what is left when the device's
// part (BenchmarkDeviceQueuePop of vring) is taken off bounds the rate that vhostd bench can ask for.
func BenchmarkDriver(b *testing.B) {
	const batch = 32
	for _, packed := range []bool{false, true} {
		b.Run(fmt.Sprintf("packed=%v/batch=%d", packed, batch), func(b *testing.B) {
			c := DefaultConfig()
			c.Packed, c.Batch = packed, batch
			f := rigFeatures
			if packed {
				f |= virtio.FRingPacked
			}
			s := &session{features: f}
			l := c.layout(virtio.NetHdrSize + c.longest())
			var err error
			if s.mem, err = newMemory(l.bytes(), false); err != nil {
				b.Fatal(err)
			}
			defer s.mem.close()
			if s.send, err = newQueue(s.mem, transmitq, l, f); err != nil {
				b.Fatal(err)
			}
			defer s.send.close()
			r, err := guestmem.NewRegion(s.mem.fd, 0, memBase, userBase, uint64(len(s.mem.m.Bytes)))
			if err != nil {
				b.Fatal(err)
			}
			table, err := guestmem.NewTable(r)
			if err != nil {
				b.Fatal(err)
			}
			defer table.Unpin()
			q := s.send
			dev, err := vring.NewDevice(vring.Config{
				Size: c.Size, Features: f, Base: q.base(), UsedBase: q.base(),
				Desc: q.desc.mem, Avail: q.avail.mem, Used: q.used.mem,
			}, guestmem.NewView(table, nil))
			if err != nil {
				b.Fatal(err)
			}
			dev.DisableKick()
			e, err := newEngine(c, s, &atomic.Bool{})
			if err != nil {
				b.Fatal(err)
			}
			chain := vring.Chain{Segs: make([]vring.Seg, 0, 2)}
			for b.Loop() {
				if _, err := e.turn(); err != nil {
					b.Fatal(err)
				}
				for dev.Pop(&chain) == vring.Popped {
					dev.Put(chain.Head, 0)
				}
				dev.Publish()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(e.number), "ns/pkt")
		})
	}
}
