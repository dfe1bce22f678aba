package dpdk_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/bench"
	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/pair"
	"github.com/vhostd/vhostd/test/dpdk"
	"github.com/vhostd/vhostd/vhostuser"
)

// need skips the test where testpmd is not installed.
func need(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("short: other programs are not run")
	}
	require.Tool(t, "dpdk", "dpdk-testpmd")
	require.Tool(t, "dpdk", "taskset")
}

// echo is vhostd with a device that returns what the guest sends.
func echo(t *testing.T, socket string) *backend.Backend {
	t.Helper()
	dev, err := pair.NewLoop(pair.Options{})
	if err != nil {
		t.Fatal(err)
	}
	be, err := backend.New(backend.Options{Device: dev, Poll: backend.DefaultPoll})
	if err != nil {
		t.Fatal(err)
	}
	l, err := vhostuser.Listen(socket, vhostuser.ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- be.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, l.Close(), dev.Close()); err != nil {
			t.Error(err)
		}
	})
	return be
}

// The frames of a test: enough to go round the rings a few times, few enough to be all under way at once.
const (
	frameCount = 300
	ringSize   = 64
)

// makeFrames makes frames of all kinds of lengths up to longest, each with other contents.
func makeFrames(longest int) (frames [][]byte) {
	lengths := []int{60, 1514, 61, 64, 128, 1000, 590, longest, 2034, 2035, 2036, 2037, 2048, 4096, longest - 1}
	for i := range frameCount {
		f := make([]byte, min(lengths[i%len(lengths)]+i/len(lengths), longest))
		x := uint32(i + 1)
		for j := range f {
			x = x*1664525 + 1013904223
			f[j] = byte(x >> 24)
		}
		copy(f, "\x02\x00\x00\x00\x00\x02\x02\x00\x00\x00\x00\x01\x88\xb5")
		frames = append(frames, f)
	}
	return frames
}

// writePcap writes frames as a capture file (pcap 2.4, Ethernet).
func writePcap(t *testing.T, path string, frames [][]byte) {
	t.Helper()
	b := binary.LittleEndian.AppendUint32(nil, 0xa1b2c3d4)
	b = binary.LittleEndian.AppendUint32(b, 2|4<<16)
	for _, v := range []uint32{0, 0, 1 << 16, 1} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	for _, f := range frames {
		for _, v := range []uint32{0, 0, uint32(len(f)), uint32(len(f))} {
			b = binary.LittleEndian.AppendUint32(b, v)
		}
		b = append(b, f...)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// readPcap reads the frames of such a file.
func readPcap(t *testing.T, path string) (frames [][]byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil || len(b) < 24 {
		t.Fatalf("%s: %d bytes, %v", path, len(b), err)
	}
	for b = b[24:]; len(b) >= 16; {
		n := int(binary.LittleEndian.Uint32(b[8:]))
		if len(b) < 16+n {
			t.Fatalf("%s ends in the middle of a frame", path)
		}
		frames = append(frames, b[16:16+n])
		b = b[16+n:]
	}
	return frames
}

// TestVirtioUser: DPDK's driver sends the frames of a file through vhostd and writes what comes back to another, in each form that it has of
// driving a ring. All frames come back, in order, with every byte as it was.
func TestVirtioUser(t *testing.T) {
	need(t)
	for _, f := range []dpdk.Form{
		{}, {Mergeable: true}, {InOrder: true}, {InOrder: true, Mergeable: true}, {Vectorized: true},
		{Packed: true}, {Packed: true, Mergeable: true}, {Packed: true, InOrder: true}, {Packed: true, InOrder: true, Mergeable: true},
		{Packed: true, InOrder: true, Vectorized: true},
	} {
		f.Size = ringSize
		t.Run(f.String(), func(t *testing.T) { carry(t, f) })
	}
}

func carry(t *testing.T, f dpdk.Form) {
	dir := vhosttest.ShortDir(t)
	socket, in, out := filepath.Join(dir, "s"), filepath.Join(dir, "in.pcap"), filepath.Join(dir, "out.pcap")
	longest := 1514
	if f.Mergeable {
		longest = 9014
	}
	frames := makeFrames(longest)
	writePcap(t, in, frames)
	be := echo(t, socket)
	// Nothing is said of frames longer than usual, as the port of the file refuses to know the words; both ports carry them all the same.
	p, err := dpdk.Testpmd(dpdk.Options{
		CPU: -1, NoHuge: true, SIMD: f.Vectorized, Mode: "io", Frame: 64,
		Vdevs: []string{f.VirtioUser(socket), fmt.Sprintf("net_pcap0,rx_pcap=%s,tx_pcap=%s", in, out)},
		Extra: []string{"--no-flush-rx"}, // else what comes before "start" is thrown away, the whole file
	})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Stop()
	p.Say("set burst tx delay 10 retry 1000000")
	p.Say("set fwd io retry")
	p.Say("start")
	limit := time.Now().Add(vhosttest.Patience)
	for sent := uint64(0); sent < frameCount; time.Sleep(20 * time.Millisecond) {
		s, err := p.Stats(1)
		if err != nil {
			t.Fatal(err)
		}
		if sent = s.Sent; time.Now().After(limit) {
			t.Fatalf("%d of %d frames came back\n%+v\n%s", sent, frameCount, be.Stats(), p.Tail())
		}
	}
	features := strings.Join(be.Stats().Features, " ")
	p.Say("stop")
	p.Quit()
	checkForm(t, f, features)
	got := readPcap(t, out)
	if len(got) != len(frames) {
		t.Fatalf("%d frames came back of %d", len(got), len(frames))
	}
	for i := range frames {
		if !bytes.Equal(got[i], frames[i]) {
			t.Fatalf("frame %d of %d bytes came back with %d bytes, changed", i, len(frames[i]), len(got[i]))
		}
	}
}

// checkForm: the form is the one that was asked for, and not what a driver falls back to.
func checkForm(t *testing.T, f dpdk.Form, features string) {
	t.Helper()
	for name, want := range map[string]bool{"RING_PACKED": f.Packed, "IN_ORDER": f.InOrder, "MRG_RXBUF": f.Mergeable} {
		if strings.Contains(features, name) != want {
			t.Errorf("%s is %v, negotiated %s", name, !want, features)
		}
	}
}

// startVhost starts DPDK's back-end at socket. It returns every frame.
func startVhost(t *testing.T, socket string) *dpdk.Process {
	t.Helper()
	_ = os.Remove(socket) // of one that has crashed
	p, err := dpdk.Testpmd(dpdk.Options{CPU: -1, NoHuge: true, Mode: "io", Frame: 9014, Vdevs: []string{dpdk.Vhost(socket)}, Extra: []string{"--no-flush-rx"}})
	if err != nil {
		t.Fatal(err)
	}
	p.Say("start")
	return p
}

// TestBench: the guest's end of vhostd bench at DPDK's vhost library, which returns frames. All contents are checked.
func TestBench(t *testing.T) {
	need(t)
	dir := vhosttest.ShortDir(t)
	socket := filepath.Join(dir, "s")
	p := startVhost(t, socket)
	defer func() { p.Stop() }()
	for name, change := range map[string]func(*bench.Config){
		"plain":    func(c *bench.Config) { c.Mergeable = false },
		"merged":   func(c *bench.Config) { c.Frames = []int{9000, 64, 2036, 2037} },
		"chain":    func(c *bench.Config) { c.Chain = 3 },
		"indirect": func(c *bench.Config) { c.Chain, c.Indirect = 4, true },
		"in order": func(c *bench.Config) { c.InOrder = true },
	} {
		for _, packed := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/packed=%v", name, packed), func(t *testing.T) {
				c := bench.DefaultConfig()
				c.Path, c.Direction, c.Verify, c.Packed, c.Window = socket, bench.Echo, true, packed, 32
				c.Frames, c.Duration, c.WarmUp = []int{60, 1514, 64, 1000}, 300*time.Millisecond, 50*time.Millisecond
				c.Patience = vhosttest.Patience
				change(&c)
				r, err := bench.Run(t.Context(), c)
				for again := 2; err != nil && again > 0; again-- {
					// DPDK 22.11's back-end crashes now and then when a queue stops under it. A fault of ours would come again.
					t.Logf("starting DPDK again: %v\n%s", err, p.Tail())
					p.Stop()
					p = startVhost(t, socket)
					r, err = bench.Run(t.Context(), c)
				}
				if err != nil {
					t.Fatalf("%v\n%s", err, p.Tail())
				}
				// testpmd may drop frames when it finds no room, but not change one.
				if r.HostToGuest.Frames == 0 || r.Lost > r.HostToGuest.Frames {
					t.Errorf("%+v", r)
				}
			})
		}
	}
}
