package packet

import (
	"fmt"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
	"github.com/vhostd/vhostd/zerocopy"
)

// BenchmarkSend is the CPU time of a frame from Send to where a device would have sent it: an ifb frees it at once.
func BenchmarkSend(b *testing.B) {
	for _, n := range []int{64, 1514, 9014, 65000} {
		b.Run(fmt.Sprintf("len=%d", n), func(b *testing.B) {
			inNetns(b)
			attrs := netlink.NewLinkAttrs()
			attrs.Name, attrs.MTU = "ifb0", testMTU
			if err := netlink.LinkAdd(&netlink.Ifb{LinkAttrs: attrs}); err != nil {
				require.Skip(b, part, "an ifb cannot be made: %v", err)
			}
			must(b, netlink.LinkSetUp(netdevtest.Link(b, "ifb0")))
			q := open(b, "packet:ifb0").Queue(0)
			hdr, f := virtio.NetHdr{}, netdevtest.Frame(n, 1)
			if n > testMTU+14 {
				hdr, f = udpFrame(n-42, 1)
				hdr.GSOType, hdr.GSOSize = virtio.GSOUDPL4, 1400
			}
			batch := make([]*zerocopy.Buffer, 32)
			for i := range batch {
				batch[i] = zerocopy.NewBuffer(hdr, f[:14], f[14:])
			}
			b.SetBytes(int64(n))
			b.ResetTimer()
			from := threadTime(b)
			for i := 0; i < b.N; i += len(batch) {
				for _, x := range batch {
					x.Retain()
				}
				if q.Send(batch) != len(batch) {
					b.Fatal("Send took less than all")
				}
			}
			b.ReportMetric(float64(threadTime(b)-from)/float64(b.N), "cpu-ns/frame")
			if c := q.Counters(); c.SendDropped != 0 {
				b.Fatalf("%d frames dropped", c.SendDropped)
			}
		})
	}
}

// BenchmarkRecv is the CPU time of a frame from the ring, or the socket's queue, into buffers of 4 KiB. What the kernel spends on copying a
// frame into the ring is spent by its sender, and not in here; for a frame beside the ring it is.
func BenchmarkRecv(b *testing.B) {
	for _, n := range []int{64, 1514, 9014, 65000} {
		b.Run(fmt.Sprintf("len=%d", n), func(b *testing.B) {
			inNetns(b)
			d, w := open(b, "packet:"+devName), newWire(b)
			f := largeRecv | virtio.FNetGuestUSO4 | virtio.FNetGuestUSO6
			must(b, d.SetOffloads(offload.ToGuest(f)))
			hdr, frame := virtio.NetHdr{}, netdevtest.Frame(n, 1)
			if n > testMTU+14 {
				hdr, frame = udpFrame(n-42, 1)
				hdr.GSOType, hdr.GSOSize = virtio.GSOUDPL4, 1400
			}
			per := (n + virtio.NetHdrSize + 4095) / 4096
			ring := netdevtest.NewGuest(b, 1024, f)
			posted, q := zerocopy.NewPosted(ring.Ring, f), d.queues[0]
			round := min(50, 1024/per)
			b.SetBytes(int64(n))
			b.ResetTimer()
			var spent int64
			for i := 0; i < b.N; i += round {
				b.StopTimer()
				for range round {
					w.SendHdr(hdr, frame)
				}
				for range round * per {
					addBuffer(b, ring.Driver)
				}
				ring.Driver.Publish()
				for got := 0; got < round; {
					netdevtest.Poll(b, q.fd, unix.POLLIN, testTimeout)
					b.StartTimer()
					from := threadTime(b)
					n, _, err := q.Recv(posted, round-got)
					spent += threadTime(b) - from
					b.StopTimer()
					if got += n; err != nil {
						b.Fatal(err)
					}
				}
				ring.Ring.Publish()
				for _, _, ok := ring.Driver.Reap(); ok; _, _, ok = ring.Driver.Reap() {
				}
				b.StartTimer()
			}
			b.ReportMetric(float64(spent)/float64(b.N), "cpu-ns/frame")
		})
	}
}

// threadTime is the processor time of this thread in nanoseconds: others on the machine do not count.
func threadTime(b *testing.B) int64 {
	b.Helper()
	var ts unix.Timespec
	must(b, unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts))
	return ts.Nano()
}

// addBuffer posts the same 4 KiB again and again: nobody looks at what is in there.
func addBuffer(b *testing.B, drv *vring.Driver) {
	b.Helper()
	if _, err := drv.Add(nil, []vring.Buf{{GPA: 0x4000_0000 + 1<<20, Len: 4096}}); err != nil {
		b.Fatal(err)
	}
}
