package null_test

import (
	"testing"

	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/null"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

func open(t testing.TB, o null.Options) *null.Device {
	t.Helper()
	d, err := null.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDevice(t *testing.T) {
	for name, o := range map[string]null.Options{"plain": {}, "headers": {ReadHeaders: true, Pairs: 4}} {
		t.Run(name, func(t *testing.T) {
			netdevtest.Run(t, func(t *testing.T) netdevtest.Harness {
				return netdevtest.Harness{Device: open(t, o), MaxFrame: virtio.MaxFrame, Lossless: true}
			})
		})
	}
}

func TestGenerate(t *testing.T) {
	const f = virtio.FVersion1 | virtio.FNetMrgRxbuf
	q := open(t, null.Options{Generate: true, Size: 1000, Count: 20}).Queue(0)
	g := netdevtest.NewGuest(t, 64, f)
	p := zerocopy.NewPosted(g.Ring, f)
	if n, idle, err := q.Recv(p, 8); n != 0 || idle || err != nil {
		t.Fatalf("Recv without buffers: %d frames, idle %v, %v", n, idle, err)
	}
	g.Post(30, 600)
	for _, want := range []struct {
		n    int
		idle bool
	}{{8, false}, {7, false}, {0, false}} {
		if n, idle, err := q.Recv(p, 8); n != want.n || idle != want.idle || err != nil {
			t.Fatalf("Recv: %d frames, idle %v, %v; want %+v", n, idle, err, want)
		}
	}
	for range 15 {
		if hdr, b := g.Take(); len(b) != 1000 || hdr.NumBuffers != 2 {
			t.Fatalf("a frame of %d bytes in %d buffers", len(b), hdr.NumBuffers)
		}
	}
	g.Post(30, 600)
	if n, idle, err := q.Recv(p, 8); n != 5 || !idle || err != nil {
		t.Fatalf("Recv of the last: %d frames, idle %v, %v", n, idle, err)
	}
}

func TestOptions(t *testing.T) {
	for _, o := range []null.Options{{Size: 13}, {Size: virtio.MaxFrame + 1}, {Pairs: -1}} {
		if _, err := null.New(o); err == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
}

// TestFrameThatNeverFits: a loop that drops it again and again would have no end.
func TestFrameThatNeverFits(t *testing.T) {
	q := open(t, null.Options{Generate: true, Size: 1000}).Queue(0)
	g := netdevtest.NewGuest(t, 16, virtio.FVersion1)
	g.Post(4, 100)
	n, idle, err := q.Recv(zerocopy.NewPosted(g.Ring, virtio.FVersion1), 64)
	if n != 0 || idle || err != nil || q.Counters().RecvDropped != 1 {
		t.Fatalf("Recv: %d frames, idle %v, %v; counters %+v", n, idle, err, q.Counters())
	}
}

func BenchmarkSend(b *testing.B) {
	for name, o := range map[string]null.Options{"headers=false": {}, "headers=true": {ReadHeaders: true}} {
		b.Run(name+"/batch=64", func(b *testing.B) {
			q := open(b, o).Queue(0)
			u := zerocopy.Ubuf{Callback: func(*zerocopy.Ubuf, zerocopy.Outcome) {}}
			frame := netdevtest.Frame(60, 1)
			var bufs []*zerocopy.Buffer
			for range 64 {
				bufs = append(bufs, zerocopy.NewUbufBuffer(u, virtio.NetHdr{}, frame))
			}
			for b.Loop() {
				q.Send(bufs)
				for _, buf := range bufs {
					if err := buf.RecycleUbuf(u, virtio.NetHdr{}, frame); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/64, "ns/pkt")
		})
	}
}
