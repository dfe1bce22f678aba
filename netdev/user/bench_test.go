package user

import (
	"fmt"
	"io"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/virtio"
)

// BenchmarkTCP is bulk transfer between a server of the host's on its loopback and a guest that is a network stack in this process,
// whose work counts as well.
func BenchmarkTCP(b *testing.B) {
	for _, mtu := range []int{1500, 9000} {
		for name, features := range map[string]virtio.Features{"offloads": offloads, "none": plain} {
			for _, dir := range []string{"guest-to-host", "host-to-guest"} {
				b.Run(fmt.Sprintf("mtu=%d/%s/%s", mtu, name, dir), func(b *testing.B) { benchTCP(b, mtu, features, dir) })
			}
		}
	}
}

func benchTCP(b *testing.B, mtu int, features virtio.Features, dir string) {
	const chunk = 128 << 10
	done := make(chan struct{})
	total := int64(b.N) * chunk
	port := listen(b, "tcp4", func(c *net.TCPConn) {
		defer close(done)
		if dir == "guest-to-host" {
			io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, chunk))
			return
		}
		buf := make([]byte, chunk)
		for n := int64(0); n < total; n += chunk {
			if _, err := c.Write(buf); err != nil {
				b.Error(err)
				return
			}
		}
	})
	o := guestOptions{features: features, mtu: mtu, address: true, trust: true, bufSize: 4096}
	if features == plain {
		o.bufSize = mtu + 100
	}
	g := newGuest(b, openTest(b, fmt.Sprintf("mtu=%d", mtu)), o)
	c := g.mustDial(gateway, port)
	buf := make([]byte, chunk)
	b.SetBytes(chunk)
	b.ReportAllocs()
	b.ResetTimer()
	cpu := cpuTime(b)
	if dir == "guest-to-host" {
		for range b.N {
			if _, err := c.Write(buf); err != nil {
				b.Fatal(err)
			}
		}
		c.CloseWrite()
	} else if n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, buf); err != nil || n != total {
		b.Fatalf("%d bytes of %d: %v", n, total, err)
	}
	<-done
	b.ReportMetric(float64(cpuTime(b)-cpu)/float64(total)*(1<<20)/1e3, "cpu-us/MiB")
	b.ReportMetric(float64(total)*8/b.Elapsed().Seconds()/1e9, "Gbit/s")
}

// cpuTime is what the process has used, in nanoseconds: a figure that holds on a busy machine.
func cpuTime(b *testing.B) int64 {
	var r unix.Rusage
	must(b, unix.Getrusage(unix.RUSAGE_SELF, &r))
	return r.Utime.Nano() + r.Stime.Nano()
}
