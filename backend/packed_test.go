package backend_test

import (
	"fmt"
	"testing"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
)

func TestPackedTrafficByFeatures(t *testing.T) {
	for name, o := range map[string]vhosttest.Options{
		"all":            {},
		"odd size":       {QueueSize: 251},
		"no mrg_rxbuf":   {Without: virtio.FNetMrgRxbuf},
		"no event_idx":   {Without: virtio.FEventIdx},
		"no indirect":    {Without: virtio.FIndirectDesc},
		"no in_order":    {Without: virtio.FInOrder},
		"no ring bits":   {Without: ringFeatures, QueueSize: 100},
		"no protocol":    {NoProtocol: true},
		"polled":         {Polled: true},
		"direct chains":  {Direct: true, QueueSize: 61},
		"from zero":      {AtZero: true},
		"pieces to read": {RecvLayout: vhosttest.Crumbs},
		"header apart":   {RecvLayout: vhosttest.HeaderApart, Direct: true, QueueSize: 99},
	} {
		o.Packed = true
		t.Run(name, func(t *testing.T) {
			for lname, l := range map[string]vhosttest.Layout{"flat": vhosttest.Flat, "apart": vhosttest.HeaderApart, "crumbs": vhosttest.Crumbs} {
				t.Run(lname, func(t *testing.T) {
					a, b := link(t, o)
					runAll(t, both(a, b, 500, l, 30, 60, 1514, 64, 999)...)
				})
			}
		})
	}
}

func TestPackedTrafficByQueueSize(t *testing.T) {
	for _, size := range []int{1, 2, 3, 16, 61, 255, 1000, 32768} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			a, b := link(t, vhosttest.Options{Packed: true, QueueSize: size})
			runAll(t, both(a, b, 2000, vhosttest.Flat, 30, 1514, 64)...)
		})
	}
}

func TestPackedTrafficOfLargeFrames(t *testing.T) {
	for name, o := range map[string]vhosttest.Options{
		"merged": {SendSize: 70000}, "whole": {SendSize: 70000, RecvSize: 70000, Without: virtio.FNetMrgRxbuf, QueueSize: 63},
		"merged from crumbs": {SendSize: 70000, RecvSize: 100, QueueSize: 1001},
	} {
		o.Packed = true
		t.Run(name, func(t *testing.T) {
			a, b := link(t, o)
			runAll(t, both(a, b, 200, vhosttest.HeaderApart, 30, 9014, 65000, 1514)...)
		})
	}
}

func TestPackedMultiqueue(t *testing.T) {
	const pairs = 3
	a, b := link(t, vhosttest.Options{Packed: true, Pairs: pairs, QueueSize: 77})
	var flows []flow
	for i := range pairs {
		for _, f := range both(a, b, 2000, vhosttest.Flat, 60, 1514) {
			f.pair = i
			flows = append(flows, f)
		}
	}
	runAll(t, flows...)
}

func TestPackedPingPongLosesNoWakeUp(t *testing.T) {
	rounds := 20_000
	if testing.Short() {
		rounds = 5_000
	}
	for name, without := range map[string]virtio.Features{"event_idx": 0, "flags": virtio.FEventIdx} {
		t.Run(name, func(t *testing.T) {
			a, b := link(t, vhosttest.Options{Packed: true, Without: without, QueueSize: 15})
			back := make(chan error, 1)
			go func() { back <- echo(b, rounds) }()
			for i := range rounds {
				if err := a.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(i), 60), nil); err != nil {
					t.Fatal(i, err)
				}
				if err := (flow{to: a, frames: 1}).receiveFrom(i); err != nil {
					t.Fatal(i, err)
				}
			}
			if err := <-back; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A stop returns both indices with their wrap counters (Queue.Stop checks that they are one), and the next start goes on there; so does a
// new session, and a driver that begins anew.
func TestPackedBase(t *testing.T) {
	a, b := link(t, vhosttest.Options{Packed: true, QueueSize: 37})
	traffic := func() { runAll(t, both(a, b, 130, vhosttest.HeaderApart, 60, 1514)...) }
	traffic()
	for range 6 {
		a.Stop()
		a.StartQueues()
		traffic()
		a.Reconnect()
		traffic()
	}
	for _, e := range []*end{a, b} {
		e.Stop()
		e.Reboot()
		e.StartQueues()
	}
	traffic()
}

// Front-ends that know the available index only leave the upper half zero.
func TestPackedBaseWithoutUsedIndex(t *testing.T) {
	a, b := link(t, vhosttest.Options{Packed: true, AtZero: true})
	a.Stop()
	a.Reboot()
	for _, q := range a.Queues {
		if err := q.Post(); err != nil {
			t.Fatal(err)
		}
		if err := a.FE.SetVringBase(uint32(q.Index), 0x8000); err != nil {
			t.Fatal(err)
		}
		if err := a.FE.SetVringKick(uint32(q.Index), q.Kick.FD()); err != nil {
			t.Fatal(err)
		}
	}
	a.Barrier()
	runAll(t, both(a, b, 600, vhosttest.Flat, 60)...)
}

// A front-end that never says where a packed ring starts means its start.
func TestPackedBaseNeverSet(t *testing.T) {
	d, _ := newLink(t, 1)
	g := vhosttest.New(t, serve(t, d), vhosttest.Options{Packed: true})
	g.Connect()
	if base, err := g.FE.GetVringBase(1); err != nil || base != 0x8000_8000 {
		t.Errorf("base %#x, %v; want 0x80008000", base, err)
	}
}

func TestPackedSetupRefused(t *testing.T) {
	vhosttest.NoLeaks(t)
	neighbour := newNeighbour(t)
	d, _ := newLink(t, 1)
	g := vhosttest.New(t, serve(t, d), vhosttest.Options{Packed: true, QueueSize: 100})
	g.Connect()
	for _, n := range []uint32{0, 32769, 65536, 1 << 31} {
		refused(t, &end{Guest: g}, "SET_VRING_NUM", g.FE.SetVringNum(0, n))
	}
	if err := g.FE.SetVringNum(0, 100); err != nil {
		t.Errorf("a packed ring of 100: %v", err)
	}
	for name, off := range map[string][3]uint64{"ring": {8, 0, 0}, "driver event": {0, 2, 0}, "device event": {0, 0, 2}} {
		addr := g.Queues[0].Addr()
		addr.Desc, addr.Avail, addr.Used = addr.Desc+off[0], addr.Avail+off[1], addr.Used+off[2]
		if err := g.FE.SetVringAddr(addr); err == nil {
			t.Errorf("%s misaligned: accepted", name)
		}
	}
	neighbour.goesOn(t)
}

// TestG15Packed: rings that break the rules of packed virtqueues stop, and nobody else does.
func TestG15Packed(t *testing.T) {
	const avail1, avail0 = virtio.DescAvail, virtio.DescUsed // with wrap counter 1 and 0
	for name, c := range map[string]struct {
		flags [2]uint16 // of the two descriptors from the first one on
		ids   [2]uint16
		sent  int // frames that were there before
	}{
		"id out of range":        {[2]uint16{avail1, 0}, [2]uint16{256, 0}, 0},
		"duplicate id":           {[2]uint16{avail1, avail1}, [2]uint16{7, 7}, 1},
		"wrap counter lies":      {[2]uint16{avail1 | virtio.DescNext, avail0}, [2]uint16{0, 0}, 0},
		"chain longer than ring": {[2]uint16{avail1 | virtio.DescNext, avail1 | virtio.DescNext}, [2]uint16{0, 0}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			vhosttest.NoLeaks(t)
			n := newNeighbour(t)
			e := start(t, newDevice(t, 1), vhosttest.Options{Packed: true, AtZero: true})
			q := e.Transmitq(0)
			ring := q.Driver.RawPacked()
			buf := e.Mem.Alloc(2048, 16)
			for i := range ring {
				last := min(i, 1)
				ring[i] = virtio.PackedDesc{Addr: uint64(buf), Len: 100, ID: c.ids[last], Flags: c.flags[last]}
			}
			q.Kick.Signal()
			sent := 0
			vhosttest.Eventually(t, "the frames before", func() bool { sent += len(e.dev.wires[0].got()); return sent == c.sent })
			broke(t, e, q, 1)
			n.goesOn(t)
		})
	}
}
