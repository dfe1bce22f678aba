package xdp_test

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/xdp"
	"github.com/vhostd/vhostd/virtio"
)

// machine is a whole guest behind a device, and the far end of its cable.
type machine struct {
	*lab
	*vhosttest.Guest
	dev *xdp.Device
	be  *backend.Backend
	far *wire
}

func newMachine(t *testing.T, device string, mtu int, o vhosttest.Options) *machine {
	t.Helper()
	m := newIdleMachine(t, device, mtu, o)
	m.StartQueues()
	return m
}

// newIdleMachine is one whose rings are not started.
func newIdleMachine(t *testing.T, device string, mtu int, o vhosttest.Options) *machine {
	t.Helper()
	vhosttest.NoLeaks(t)
	m := &machine{lab: newLab(t, mtu, max(1, o.Pairs))}
	m.dev = m.device(device)
	t.Cleanup(func() {
		must(t, m.dev.Close())
		if m.attached() {
			t.Error("an XDP program is left on the interface")
		}
	})
	m.far = m.wire(m.There)
	var err error
	m.be, err = backend.New(backend.Options{Device: m.dev, DrainTimeout: time.Second})
	must(t, err)
	m.Guest = vhosttest.New(t, m.be, o)
	m.Connect()
	return m
}

// toHost sends frames and checks what arrives.
func (m *machine) toHost(n int, size func(i int) int, l vhosttest.Layout) {
	m.Helper()
	for i := range n {
		f := netdevtest.Frame(size(i), uint32(i))
		must(m, m.Send(0, virtio.NetHdr{}, f, l))
		if got, _ := m.far.recv(); !bytes.Equal(got, f) {
			m.Fatalf("frame %d of %d bytes: %d other bytes arrived", i, len(f), len(got))
		}
	}
	must(m, m.Transmitq(0).Settle())
}

// toGuest sends frames the other way, some at once.
func (m *machine) toGuest(n int, size func(i int) int) {
	m.Helper()
	const burst = 20
	for i := 0; i < n; i += burst {
		for j := i; j < i+burst; j++ {
			m.far.Send(netdevtest.Frame(size(j), uint32(j)))
		}
		for j := i; j < i+burst; j++ {
			m.wants(netdevtest.Frame(size(j), uint32(j)))
		}
	}
}

func (m *machine) wants(frame []byte) {
	m.Helper()
	hdr, got, err := m.Recv(0, patience)
	if err != nil {
		m.Fatalf("%v: %+v, %+v", err, m.dev.Stats(), m.be.Stats().Queues[0])
	}
	if !bytes.Equal(got, frame) {
		m.Fatalf("received %d bytes, want others, %d\n got %.32x\nwant %.32x", len(got), len(frame), got, frame)
	}
	if hdr.Flags != 0 || hdr.GSOType != 0 {
		m.Fatalf("header %+v", hdr)
	}
}

func sizes(mtu int) func(i int) int {
	return func(i int) int { return []int{60, 64, 65, 128, 590, 1514, mtu + 14, 14, mtu/2 + 1}[i%9] }
}

// TestGuestMemory: frames of all sizes and chain shapes, each way, over guest memory and over private memory.
func TestGuestMemory(t *testing.T) {
	for _, c := range []struct {
		name, options string
		mtu           int
		o             vhosttest.Options
		inPlace       bool
		outcome       string
	}{
		{"private", "xdp:v0", 1500, vhosttest.Options{}, false, "copied"},
		{"off", "xdp:v0,no-balloon=on,zerocopy=off", 1500, vhosttest.Options{}, false, "copied"},
		{"native", "xdp:v0,no-balloon=on", 1500, vhosttest.Options{}, true, "copied_anyway"},
		{"generic", "xdp:v0,no-balloon=on,mode=generic", 1500, vhosttest.Options{}, true, "copied_anyway"},
		{"jumbo", "xdp:v0,no-balloon=on", 9000, vhosttest.Options{SendSize: 16384, RecvSize: 16384}, false, "copied_anyway"},
		{"packed", "xdp:v0,no-balloon=on", 1500, vhosttest.Options{Packed: true}, true, "copied_anyway"},
		{"header apart", "xdp:v0,no-balloon=on", 1500, vhosttest.Options{RecvLayout: vhosttest.HeaderApart}, true, "copied_anyway"},
		{"crumbs", "xdp:v0,no-balloon=on", 1500, vhosttest.Options{RecvLayout: vhosttest.Crumbs}, false, "copied_anyway"},
		{"small buffers", "xdp:v0,no-balloon=on", 1500, vhosttest.Options{RecvSize: 300, SendSize: 2048}, false, "copied_anyway"},
		{"not mergeable", "xdp:v0,no-balloon=on", 1500, vhosttest.Options{Without: virtio.FNetMrgRxbuf}, true, "copied_anyway"},
		{"odd regions", "xdp:v0,no-balloon=on", 1500, vhosttest.Options{Regions: []vhosttest.RegionSpec{
			{GPA: 0, Size: 2<<20 + 12288}, {GPA: 1 << 32, Size: 6 << 20, Offset: 4096 * 3}, {GPA: 5 << 32, Size: 4096 * 7},
		}}, true, "copied_anyway"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t, c.options, c.mtu, c.o)
			for i, l := range []vhosttest.Layout{vhosttest.Flat, vhosttest.HeaderApart, vhosttest.Crumbs, {virtio.NetHdrSize + 1}, {12 + 13, 700, 1}} {
				m.toHost(50, func(j int) int { return sizes(c.mtu)(i + j) }, l)
			}
			m.toGuest(800, sizes(c.mtu))
			o := m.be.Stats().Queues[1].Outcomes
			if o[c.outcome] != 250 {
				t.Errorf("outcomes %v, want 250 %s", o, c.outcome)
			}
			st := m.dev.Stats()
			if c.inPlace != (st.InPlace > 0) || st.Unruly > 0 {
				t.Errorf("%+v, want frames in place: %v", st, c.inPlace)
			}
			t.Logf("%+v, %v, %s", st, m.be.Stats().Queues[0], m.dev.Capabilities().ZeroCopy)
		})
	}
}

// flood sends frames both ways until stopped, and checks them. Frames for the guest may be lost while there is no socket; what comes is right
// and in order.
func (m *machine) flood() (stop func()) {
	done, results := make(chan struct{}), make(chan error, 4)
	count := func(f []byte) uint32 { return uint32(f[14])<<24 | uint32(f[15])<<16 | uint32(f[16])<<8 | uint32(f[17]) }
	numbered := func(i uint32) []byte {
		f := netdevtest.Frame(60+int(i*37%1400), i)
		copy(f[14:], []byte{byte(i >> 24), byte(i >> 16), byte(i >> 8), byte(i)})
		return f
	}
	run := func(f func(i uint32) error) {
		for i := uint32(0); ; i++ {
			select {
			case <-done:
				results <- nil
				return
			default:
			}
			if err := f(i); err != nil {
				results <- err
				return
			}
		}
	}
	last := [2]int64{-1, -1}
	check := func(way int, f []byte) error {
		if len(f) < 18 {
			return fmt.Errorf("way %d: %d bytes", way, len(f))
		}
		i := count(f)
		if int64(i) <= last[way] || !bytes.Equal(f, numbered(i)) {
			return fmt.Errorf("way %d: frame %d of %d bytes after frame %d, or with other bytes", way, i, len(f), last[way])
		}
		last[way] = int64(i)
		return nil
	}
	var frames [2]int
	go run(func(i uint32) error { return m.Send(0, virtio.NetHdr{}, numbered(i), nil) })
	go run(func(i uint32) error {
		if i%32 == 0 {
			time.Sleep(100 * time.Microsecond)
		}
		return m.far.TrySend(numbered(i))
	})
	go run(func(uint32) error {
		_, f, err := m.Recv(0, 10*time.Millisecond)
		if errors.Is(err, vhosttest.ErrTimeout) {
			return nil
		}
		frames[0]++
		return errors.Join(err, check(0, f))
	})
	reader := m.wire(m.There)
	go run(func(uint32) error {
		f, ok := reader.tryRecv(10 * time.Millisecond)
		if !ok {
			return nil
		}
		frames[1]++
		return check(1, f)
	})
	return func() {
		m.Helper()
		close(done)
		for range 4 {
			if err := <-results; err != nil {
				m.Error(err)
			}
		}
		reader.Close()
		m.Logf("%d frames to the guest, %d to the host, %+v", frames[0], frames[1], m.dev.Stats())
		if frames[0] == 0 || frames[1] == 0 {
			m.Error("nothing moved")
		}
	}
}

// TestMemoryChangesUnderTraffic: the memory table is replaced, and regions come and go, while frames are sent and lent.
func TestMemoryChangesUnderTraffic(t *testing.T) {
	for name, o := range map[string]vhosttest.Options{"table": {}, "regions": {MemSlots: true}} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, "xdp:v0,no-balloon=on", 1500, o)
			stop := m.flood()
			extra := vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: 1 << 40, Size: 4 << 20})
			defer extra.Close()
			for range 5 {
				time.Sleep(20 * time.Millisecond)
				if !o.MemSlots {
					m.ShareMemory()
					continue
				}
				must(t, m.FE.AddMemReg(extra.MemoryRegion, extra.FD))
				time.Sleep(20 * time.Millisecond)
				must(t, m.FE.RemMemReg(extra.MemoryRegion))
				if n := extra.Mappings(t); n != 0 {
					t.Errorf("%d mappings of a region that was removed", n)
				}
			}
			time.Sleep(20 * time.Millisecond)
			stop()
			if st := m.dev.Stats(); st.InPlace == 0 || st.Unruly > 0 {
				t.Errorf("%+v", st)
			}
			m.quiesce()
			m.toHost(20, sizes(1500), nil)
			m.toGuest(100, sizes(1500))
		})
	}
}

// quiesce receives what is on the way still: all that comes before a frame that is sent now. It may be lost while there is no socket, and so be sent again:
// the last of them ends it.
func (m *machine) quiesce() {
	m.Helper()
	flush := func(what string, send func(mark []byte), recv func(limit time.Duration) ([]byte, bool)) {
		m.Helper()
		for i, deadline := uint32(0), time.Now().Add(patience); time.Now().Before(deadline); i++ {
			mark := netdevtest.Frame(77, 1<<31|i)
			send(mark)
			for ok := true; ok; {
				var got []byte
				if got, ok = recv(time.Second); ok && bytes.Equal(got, mark) {
					return
				}
			}
		}
		m.Fatalf("nothing comes to the %s", what)
	}
	flush("host", func(mark []byte) { must(m, m.Send(0, virtio.NetHdr{}, mark, nil)) }, m.far.tryRecv)
	flush("guest", m.far.Send, func(limit time.Duration) ([]byte, bool) {
		_, got, err := m.Recv(0, limit)
		if err != nil && !errors.Is(err, vhosttest.ErrTimeout) {
			m.Fatal(err)
		}
		return got, err == nil
	})
}
