package tap

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
	"github.com/vhostd/vhostd/zerocopy"
)

// batchOf is a batch of frames of n bytes that can be sent again and again.
func batchOf(n int) []*zerocopy.Buffer {
	hdr := virtio.NetHdr{}
	if n > 9014 {
		hdr = virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, GSOType: virtio.GSOTCPv4, HdrLen: 54, GSOSize: 1448, CsumStart: 34, CsumOffset: 16}
	}
	f := testFrame(n, 1)
	if hdr.GSOType != 0 {
		copy(f[12:], []byte{8, 0, 0x45, 0, byte((n - 14) >> 8), byte(n - 14), 0, 0, 0, 0, 64, 6, 0, 0, 10, 7, 0, 2, 10, 7, 0, 1})
		f[46] = 5 << 4
	}
	batch := make([]*zerocopy.Buffer, 32)
	for i := range batch {
		batch[i] = zerocopy.NewBuffer(hdr, f[:14], f[14:])
	}
	return batch
}

// resend makes a batch that was released fit to be sent again.
func resend(batch []*zerocopy.Buffer) {
	for _, b := range batch {
		b.Retain()
	}
}

func TestSendAllocs(t *testing.T) { bothWays(t, testSendAllocs) }

func testSendAllocs(t *testing.T, options string) {
	q := open(t, "tap:t0,mtu=9000"+options).Queue(0)
	for _, n := range []int{60, 1514, 60000} {
		batch := batchOf(n)
		resend(batch)
		if n := testing.AllocsPerRun(100, func() {
			if q.Send(batch) != len(batch) {
				t.Fatal("Send took less than all")
			}
			resend(batch)
		}); n != 0 {
			t.Errorf("%v allocations in a batch", n)
		}
	}
	if c := q.Counters(); c.SendDropped != 0 {
		t.Errorf("%d frames dropped", c.SendDropped)
	}
}

func TestRecvAllocs(t *testing.T) {
	inNetns(t)
	d := open(t, "tap:t0,mtu=9000")
	w, g, q := newWire(t, "t0"), newGuest(t, 512, mergeable|largeRecv), d.Queue(0)
	negotiate(t, d, mergeable|largeRecv)
	frames := [][]byte{testFrame(60, 1), testFrame(9014, 2), testFrame(1514, 3)}
	buf := []vring.Buf{{GPA: guestBase + guestRings, Len: 1536}}
	if n := testing.AllocsPerRun(50, func() {
		for _, f := range frames {
			if _, err := unix.Write(w.FD, f); err != nil {
				t.Fatal(err)
			}
		}
		for range 9 {
			if _, err := g.drv.Add(nil, buf); err != nil {
				t.Fatal(err)
			}
		}
		g.drv.Publish()
		if n, idle, err := q.Recv(g.posted, 8); n != len(frames) || !idle || err != nil {
			t.Fatalf("Recv is %d, %v, %v", n, idle, err)
		}
		g.dev.Publish()
		for _, _, ok := g.drv.Reap(); ok; _, _, ok = g.drv.Reap() {
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkSend is the time of a frame from Send to where the kernel finds that nobody wants it, written one by one and as batches, which take
// turns: medians over the batches, so that what else the machine does meanwhile matters little. cold: frames of 128 MiB, each sent once a round.
func BenchmarkSend(b *testing.B) {
	for _, n := range []int{64, 1514, 9014, 65000} {
		for _, cold := range []bool{false, true} {
			for _, batch := range []int{1, 2, 3, 4, 8, 32} {
				b.Run(fmt.Sprintf("len=%d/cold=%v/batch=%d", n, cold, batch), func(b *testing.B) { benchSend(b, n, batch, cold) })
			}
		}
	}
}

func benchSend(b *testing.B, n, batch int, cold bool) {
	inNetns(b)
	frames := framesOf(b, n, batch, cold)
	ways := []string{"off", "on"}
	var queues [2]*queue
	var times [2][]float64
	for i, way := range ways {
		queues[i] = open(b, fmt.Sprintf("tap:t%d,mtu=9000,io-uring=%s", i, way)).queues[0]
	}
	resend(frames)
	for i := 0; b.Loop(); i++ {
		way := i / 8 % 2
		now := frames[i*batch%len(frames):][:batch]
		from := time.Now()
		queues[way].Send(now)
		times[way] = append(times[way], float64(time.Since(from).Nanoseconds())/float64(batch))
		resend(now)
	}
	for i, q := range queues {
		if c := q.Counters(); c.SendDropped != 0 {
			b.Fatalf("%d frames dropped", c.SendDropped)
		}
		slices.Sort(times[i])
		if len(times[i]) > 0 {
			b.ReportMetric(times[i][len(times[i])/2], ways[i]+"-ns/frame")
		}
	}
	if len(times[1]) > 0 {
		b.ReportMetric(times[1][len(times[1])/2]/times[0][len(times[0])/2], "on/off")
	}
}

// framesOf are frames of n bytes to be sent again and again, batch by batch; their pieces lie in pages as a guest's do.
func framesOf(b *testing.B, n, batch int, cold bool) []*zerocopy.Buffer {
	model := batchOf(n)[0]
	hdr, data := model.Header(), bytes.Join(model.Frags(), nil)
	stride, count := (n+2047)&^2047, batch
	if cold {
		count = 128 << 20 / stride / batch * batch
	}
	mem, err := unix.Mmap(-1, 0, count*stride, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANON)
	must(b, err)
	b.Cleanup(func() { unix.Munmap(mem) })
	frames := make([]*zerocopy.Buffer, count)
	for i := range frames {
		f := mem[i*stride:][:n]
		copy(f, data)
		frames[i] = zerocopy.NewBuffer(hdr, slices.Collect(slices.Chunk(f, 4096))...)
	}
	return frames
}

// BenchmarkRecv is the CPU time of a frame from the tap's queue into buffers of 4 KiB (merged) or, direct=false, of one that does not fit and
// goes through the stage.
func BenchmarkRecv(b *testing.B) {
	for _, n := range []int{64, 1514, 9014, 65000} {
		for _, direct := range []bool{true, false} {
			b.Run(fmt.Sprintf("len=%d/direct=%v", n, direct), func(b *testing.B) { benchRecv(b, n, direct) })
		}
	}
}

func benchRecv(b *testing.B, n int, direct bool) {
	inNetns(b)
	d := open(b, "tap:t0,mtu=9000")
	g, q := newGuest(b, 1024, mergeable|largeRecv), d.queues[0]
	negotiate(b, d, mergeable|largeRecv)
	w := newWire(b, "t0")
	w.Set(unix.PACKET_VNET_HDR, 1)
	one := batchOf(n)[0]
	hdr := one.Header()
	raw := make([]byte, virtio.NetHdrSizeLegacy, n+virtio.NetHdrSize)
	hdr.Encode(raw)
	for _, f := range one.Frags() {
		raw = append(raw, f...)
	}
	per := (n + virtio.NetHdrSize + 4095) / 4096
	round := min(500, g.drv.Size()/per)
	buf := []vring.Buf{{GPA: guestBase + guestRings, Len: 4096}}
	b.SetBytes(int64(n))
	b.ResetTimer()
	for i := 0; i < b.N; i += round {
		b.StopTimer()
		for range round {
			w.Send(raw)
			for range per {
				if _, err := g.drv.Add(nil, buf); err != nil {
					b.Fatal(err)
				}
			}
		}
		g.drv.Publish()
		b.StartTimer()
		for got := 0; got < round; {
			if !direct {
				q.recv.want = 1 // the stage takes the rest
				q.recv.peak, q.recv.seen = 0, 0
			}
			n1, idle, err := q.Recv(g.posted, 1)
			if err != nil || n1 != 1 {
				b.Fatalf("Recv is %d, %v, %v after %d: %+v", n1, idle, err, got, g.posted.Stats)
			}
			got += n1
		}
		b.StopTimer()
		g.dev.Publish()
		for _, _, ok := g.drv.Reap(); ok; _, _, ok = g.drv.Reap() {
		}
		b.StartTimer()
	}
}
