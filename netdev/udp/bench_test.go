package udp_test

import (
	"fmt"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/udp"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// feeder keeps frames coming: each buffer is filled with another piece of memory when it has come back.
type feeder struct {
	mem  []byte
	off  int
	size int

	mu   sync.Mutex
	free []*zerocopy.Buffer
	back chan struct{}
}

func newFeeder(mem []byte, size, buffers int) *feeder {
	f := &feeder{mem: mem, size: size, back: make(chan struct{}, 1)}
	for range buffers {
		f.free = append(f.free, zerocopy.NewBuffer(virtio.NetHdr{}))
	}
	// Frames lie anywhere in a page, as a guest's do behind the headers of its protocols.
	const headroom = 74
	frame := netdevtest.Frame(size, 1)
	for off := headroom; off+size <= len(mem); off += f.stride() {
		copy(mem[off:], frame)
	}
	f.off = headroom
	return f
}

func (f *feeder) stride() int { return (f.size + 74 + 4095) &^ 4095 }

// take fills batch as far as there are buffers.
func (f *feeder) take(batch []*zerocopy.Buffer) []*zerocopy.Buffer {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := min(len(batch), len(f.free))
	rest := len(f.free) - n
	copy(batch, f.free[rest:])
	f.free = f.free[:rest]
	return batch[:n]
}

func (f *feeder) fill(b *zerocopy.Buffer) error {
	if f.off+f.size > len(f.mem) {
		f.off = 74
	}
	frame := f.mem[f.off : f.off+f.size]
	f.off += f.stride()
	u := zerocopy.Ubuf{Arg: b, Callback: f.returned}
	return b.RecycleUbuf(u, virtio.NetHdr{}, frame)
}

func (f *feeder) returned(u *zerocopy.Ubuf, _ zerocopy.Outcome) {
	f.mu.Lock()
	f.free = append(f.free, u.Arg.(*zerocopy.Buffer))
	f.mu.Unlock()
}

func cpuTime(b *testing.B) int64 {
	var ru unix.Rusage
	must(b, unix.Getrusage(unix.RUSAGE_SELF, &ru))
	return ru.Utime.Nano() + ru.Stime.Nano()
}

// BenchmarkSend is what a frame costs this process and the kernel on its behalf, on its way to a network card that takes pages: from memory
// that is in no cache, and from memory that is. With -count the ways to send take turns.
func BenchmarkSend(b *testing.B) {
	for memory, span := range map[string]int{"cold": 256 << 20, "hot": 1 << 20} {
		for _, size := range []int{256, 512, 1024, 1514, 2048, 3072, 4096, 6144, 9014, 16384, 32768, 65000} {
			for _, how := range []string{"zerocopy=off", "zerocopy=on", "zerocopy=on,no-balloon=on"} {
				b.Run(fmt.Sprintf("%s/%d/%s", memory, size, how), func(b *testing.B) { benchSend(b, how, size, span) })
			}
		}
	}
}

func benchSend(b *testing.B, how string, size, span int) {
	l := newLab(b, 1500)
	l.sink()
	d := l.device("vxlan:vni=42,local=10.8.0.1,remote=10.8.0.2," + how)
	defer func() { must(b, d.Close()) }()
	mem := newRAM(b, span).Bytes
	f := newFeeder(mem, size, 256)
	must(b, d.SetMemory([][]byte{mem}))
	defer func() { must(b, d.SetMemory(nil)) }()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	q := d.Queue(0)
	batch := make([]*zerocopy.Buffer, 32)
	b.SetBytes(int64(size))
	b.ResetTimer()
	start := cpuTime(b)
	for sent := 0; sent < b.N; {
		bufs := f.take(batch)
		for _, buf := range bufs {
			if err := f.fill(buf); err != nil {
				b.Fatal(err)
			}
		}
		for rest := bufs; len(rest) > 0; {
			rest = rest[q.Send(rest):]
			q.Reap()
		}
		sent += len(bufs)
		q.Reap()
	}
	b.StopTimer()
	b.ReportMetric(float64(cpuTime(b)-start)/float64(b.N), "cpu-ns/frame")
	if n := q.Counters().SendDropped; n != 0 {
		b.Errorf("%d frames dropped", n)
	}
	report(b, d)
}

func report(b *testing.B, d *udp.Device) {
	if st := d.Stats(); st.ByCopy > 0 {
		b.Errorf("%+v", st)
	}
}
