package vring

import (
	"fmt"
	"testing"

	"github.com/vhostd/vhostd/virtio"
)

// BenchmarkDeviceQueuePop pops, puts and publishes batches from a ring that the driver has filled once: the device end alone, with
// the ring in this core's cache.
func BenchmarkDeviceQueuePop(b *testing.B) {
	for _, chain := range []int{1, 4} {
		for _, indirect := range []bool{false, true} {
			for _, batch := range []int{1, 64} {
				b.Run(fmt.Sprintf("chain=%d/indirect=%v/batch=%d", chain, indirect, batch), func(b *testing.B) {
					benchPop(b, chain, indirect, batch)
				})
			}
		}
	}
}

func benchPop(b *testing.B, chain int, indirect bool, batch int) {
	r := newRigAt(b, 256, virtio.FEventIdx|virtio.FIndirectDesc, 0xff00)
	if !indirect {
		r.drv.tableLen = 0
	}
	bufs := make([]Buf, chain)
	for i := range bufs {
		bufs[i] = r.buf(2048*i, 1500/uint32(chain))
	}
	n := 0
	for ; r.drv.Free() >= chain; n++ {
		id, err := r.drv.Add(bufs, nil)
		if err != nil {
			b.Fatal(err)
		}
		if indirect && chain == 1 { // the Driver would not
			r.drv.RawTable(id)[0] = r.drv.RawDesc()[id]
			r.drv.RawDesc()[id] = virtio.Desc{
				Addr: uint64(r.drv.indirectAddr) + uint64(id)*rigTableLen*virtio.DescSize, Len: virtio.DescSize, Flags: virtio.DescIndirect,
			}
		}
	}
	for i := range r.drv.RawAvail() { // every slot names a chain, so that the index alone makes chains available
		r.drv.RawAvail()[i] = r.drv.RawAvail()[i%n]
	}
	idx := uint16(0xff00)
	b.ReportAllocs()
	for b.Loop() {
		idx += uint16(batch)
		r.drv.RawSetAvailIndex(idx)
		popBatch(b, r, batch)
	}
	perPkt := float64(b.Elapsed().Nanoseconds()) / float64(b.N) / float64(batch)
	b.ReportMetric(perPkt, "ns/pkt")
	b.ReportMetric(1e3/perPkt, "Mpps")
}

func popBatch(b *testing.B, r *rig, batch int) {
	for range batch {
		if s := r.dev.Pop(&r.chain); s != Popped {
			b.Fatal(s, r.dev.Err())
		}
		r.dev.Put(r.chain.Head, 0)
	}
	r.dev.Publish()
	r.dev.NeedsCall()
}

// BenchmarkRing is a whole trip: Add, Publish, Pop, Put, Publish, Reap, both ends on one core.
func BenchmarkRing(b *testing.B) {
	const batch = 64
	r := newRigAt(b, 256, virtio.FEventIdx, 0xff00)
	buf := []Buf{r.buf(0, 1500)}
	b.ReportAllocs()
	for b.Loop() {
		for range batch {
			if _, err := r.drv.Add(buf, nil); err != nil {
				b.Fatal(err)
			}
		}
		r.drv.Publish()
		popBatch(b, r, batch)
		for _, _, ok := r.drv.Reap(); ok; _, _, ok = r.drv.Reap() {
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/batch, "ns/pkt")
}

// BenchmarkPackedRing is BenchmarkRing of a packed ring, of chains of 1 and 4 descriptors.
func BenchmarkPackedRing(b *testing.B) {
	const batch = 32
	for _, chain := range []int{1, 4} {
		b.Run(fmt.Sprintf("chain=%d", chain), func(b *testing.B) {
			r := newRigAt(b, 256, virtio.FEventIdx|virtio.FRingPacked, 1<<15)
			bufs := make([]Buf, chain)
			for i := range bufs {
				bufs[i] = r.buf(2048*i, 1500)
			}
			b.ReportAllocs()
			for b.Loop() {
				for range batch {
					if _, err := r.drv.Add(bufs, nil); err != nil {
						b.Fatal(err)
					}
				}
				r.drv.Publish()
				popBatch(b, r, batch)
				for _, _, ok := r.drv.Reap(); ok; _, _, ok = r.drv.Reap() {
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/batch, "ns/pkt")
		})
	}
}

// BenchmarkPackedDevicePop is the device end of a packed ring: the driver's part is one store a batch, of descriptors that were written
// before.
func BenchmarkPackedDevicePop(b *testing.B) {
	for _, batch := range []int{1, 64} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			r := newRigAt(b, 256, virtio.FEventIdx|virtio.FRingPacked, 1<<15)
			b.ReportAllocs()
			for b.Loop() {
				at := r.dev.packed.next
				for i := range batch {
					r.dev.packed.ring[at.slot] = slot{uint64(r.data), packWord(1500, uint16(i), at.available())}
					at.advance(1, 256)
				}
				popBatch(b, r, batch)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(batch), "ns/pkt")
		})
	}
}
