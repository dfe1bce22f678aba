package l2switch_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/l2switch"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// vm is a whole guest on a port of a switch.
type vm struct {
	*vhosttest.Guest
	b *backend.Backend
}

// mac is the address of station n.
func mac(n int) l2switch.MAC { return l2switch.MAC{2, 0, 0, 0, byte(n >> 8), byte(n)} }

var everybody = l2switch.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// start connects a guest to a new port.
func start(t testing.TB, s *l2switch.Switch, c l2switch.PortConfig, o vhosttest.Options) vm {
	t.Helper()
	d := addPort(t, s, c)
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	b, err := backend.New(backend.Options{Device: d, DrainTimeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	return vm{vhosttest.Start(t, b, o), b}
}

// frame is a numbered frame of n bytes from one station to another.
func frame(dst, src l2switch.MAC, seq uint64, n int) []byte {
	f := vhosttest.Frame(seq, n)
	copy(f, dst[:])
	copy(f[6:], src[:])
	return f
}

// number checks a frame that frame made, and returns its number.
func number(f []byte) (uint64, error) {
	plain := append([]byte(nil), f...)
	copy(plain, vhosttest.Frame(0, vhosttest.MinFrame)[:12])
	return vhosttest.CheckFrame(plain)
}

func (v vm) send(t testing.TB, f []byte) {
	t.Helper()
	if err := v.Send(0, virtio.NetHdr{}, f, nil); err != nil {
		t.Fatal(err)
	}
}

func (v vm) recv(t testing.TB) []byte {
	t.Helper()
	_, f, err := v.Recv(0, vhosttest.Patience)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// silent checks that nothing has come, after something else that was sent later arrived.
func (v vm) silent(t testing.TB) {
	t.Helper()
	if _, f, err := v.Recv(0, 0); !errors.Is(err, vhosttest.ErrTimeout) {
		t.Fatalf("a frame came that should not have: %.40x (%v)", f, err)
	}
}

// meet has station n be heard of behind v, by all of others.
func (v vm) meet(t testing.TB, n int, others ...vm) {
	t.Helper()
	v.send(t, frame(everybody, mac(n), 1<<40, 60))
	for _, o := range others {
		if seq, err := number(o.recv(t)); err != nil || seq != 1<<40 {
			t.Fatalf("frame %d, %v", seq, err)
		}
	}
}

func TestLearnsAndFloods(t *testing.T) {
	vhosttest.NoLeaks(t)
	s := newSwitch(t, l2switch.Config{})
	var g [3]vm
	for i := range g {
		g[i] = start(t, s, l2switch.PortConfig{Name: fmt.Sprint("p", i)}, vhosttest.Options{})
	}
	g[0].send(t, frame(mac(1), mac(0), 1, 100)) // nobody knows where 1 is
	for _, o := range g[1:] {
		if seq, err := number(o.recv(t)); seq != 1 || err != nil {
			t.Fatalf("frame %d, %v", seq, err)
		}
	}
	g[1].send(t, frame(mac(0), mac(1), 2, 1514)) // now both are known
	if seq, err := number(g[0].recv(t)); seq != 2 || err != nil {
		t.Fatalf("frame %d, %v", seq, err)
	}
	g[0].send(t, frame(mac(1), mac(0), 3, 60))
	if seq, err := number(g[1].recv(t)); seq != 3 || err != nil {
		t.Fatalf("frame %d, %v", seq, err)
	}
	g[2].silent(t)
	g[0].silent(t)
	if n := len(s.Table()); n != 2 {
		t.Errorf("%d addresses are learned: %v", n, s.Table())
	}
	if st := s.Stats(); st.Addresses != 2 || st.Ports[0].Flooded != 1 || st.Ports[1].ToGuest.Frames != 2 || len(st.Ports[1].Drops) != 0 {
		t.Errorf("%+v", st)
	}
}

// TestTrafficKeepsOrder has two guests send to each other as fast as they can. Nothing is lost, since a guest cannot have more frames on the way than
// its own ring holds, and all of it arrives in order.
func TestTrafficKeepsOrder(t *testing.T) {
	for _, c := range []struct {
		name string
		o    vhosttest.Options
	}{
		{"split", vhosttest.Options{}},
		{"packed", vhosttest.Options{Packed: true, QueueSize: 128}},
		{"legacy", vhosttest.Options{Without: virtio.FVersion1 | virtio.FNetMrgRxbuf}},
		{"merged", vhosttest.Options{RecvSize: 256}},
	} {
		t.Run(c.name, func(t *testing.T) {
			vhosttest.NoLeaks(t)
			s := newSwitch(t, l2switch.Config{Hold: time.Minute})
			a := start(t, s, l2switch.PortConfig{Name: "a"}, c.o)
			b := start(t, s, l2switch.PortConfig{Name: "b"}, vhosttest.Options{})
			a.meet(t, 1, b)
			b.meet(t, 2, a)
			var wg sync.WaitGroup
			for _, x := range []struct {
				from, to vm
				src, dst int
			}{{a, b, 1, 2}, {b, a, 2, 1}} {
				wg.Add(2)
				go func() { defer wg.Done(); flood(t, x.from, mac(x.dst), mac(x.src), 20000) }()
				go func() { defer wg.Done(); inOrder(t, x.to, 20000) }()
			}
			wg.Wait()
			for _, p := range s.Stats().Ports {
				if len(p.Drops) > 0 {
					t.Errorf("port %s dropped %v", p.Name, p.Drops)
				}
			}
			if err := b.Transmitq(0).Settle(); err != nil {
				t.Fatal(err)
			}
			// What waited for too long on a loaded machine was copied twice, and is counted; everything else once.
			sent, orphaned := b.b.Stats().Queues[1].Outcomes, s.Stats().Ports[0].Orphaned
			if once := sent[zerocopy.ZeroCopied.String()]; once+orphaned != 20000 || once == 0 {
				t.Errorf("what became of the pages of 20001 frames: %v, and %d were orphaned", sent, orphaned)
			}
		})
	}
}

// flood sends numbered frames of many lengths.
func flood(t testing.TB, v vm, dst, src l2switch.MAC, n int) {
	for i := range n {
		if err := v.Send(0, virtio.NetHdr{}, frame(dst, src, uint64(i), 60+i%1400), nil); err != nil {
			t.Errorf("frame %d: %v", i, err)
			return
		}
	}
}

// inOrder receives n frames that flood sent.
func inOrder(t testing.TB, v vm, n int) {
	for i := range n {
		_, f, err := v.Recv(0, vhosttest.Patience)
		if err != nil {
			t.Errorf("frame %d: %v", i, err)
			return
		}
		if seq, err := number(f); err != nil || seq != uint64(i) {
			t.Errorf("frame %d came in place %d (%v)", seq, i, err)
			return
		}
	}
}

// TestFlagsStayBehind: what a sender claims of its own frame's checksum, or sets of flags that mean something only in the other direction, does not reach another
// guest as the device's word (virtio-v1.2 §5.1.6.4.1).
func TestFlagsStayBehind(t *testing.T) {
	s := newSwitch(t, l2switch.Config{})
	a := start(t, s, l2switch.PortConfig{Name: "a"}, vhosttest.Options{})
	b := start(t, s, l2switch.PortConfig{Name: "b"}, vhosttest.Options{})
	for i, c := range []struct{ sent, want virtio.NetHdr }{
		{virtio.NetHdr{Flags: virtio.NetHdrDataValid}, virtio.NetHdr{NumBuffers: 1}},
		{virtio.NetHdr{Flags: 0xfe, CsumStart: 7, CsumOffset: 3}, virtio.NetHdr{NumBuffers: 1}},
		{
			virtio.NetHdr{Flags: 0xff, CsumStart: 34, CsumOffset: 16},
			virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, CsumStart: 34, CsumOffset: 16, NumBuffers: 1},
		},
	} {
		if err := a.Send(0, c.sent, frame(everybody, mac(1), uint64(i), 100), nil); err != nil {
			t.Fatal(err)
		}
		hdr, f, err := b.Recv(0, vhosttest.Patience)
		if err != nil {
			t.Fatal(err)
		}
		if seq, err := number(f); err != nil || seq != uint64(i) || hdr != c.want {
			t.Errorf("%+v arrived as %+v, want %+v (frame %d, %v)", c.sent, hdr, c.want, seq, err)
		}
	}
}
