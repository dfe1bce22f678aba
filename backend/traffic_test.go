package backend_test

import (
	"fmt"
	"testing"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
)

// ringFeatures are those that change how a ring is used.
const ringFeatures = virtio.FIndirectDesc | virtio.FEventIdx | virtio.FInOrder | virtio.FNotifyOnEmpty

func TestTrafficByFeatures(t *testing.T) {
	for name, o := range map[string]vhosttest.Options{
		"all":            {},
		"no mrg_rxbuf":   {Without: virtio.FNetMrgRxbuf},
		"no event_idx":   {Without: virtio.FEventIdx},
		"no indirect":    {Without: virtio.FIndirectDesc},
		"no in_order":    {Without: virtio.FInOrder},
		"no ring bits":   {Without: ringFeatures},
		"10-byte header": {Without: virtio.FVersion1 | virtio.FNetMrgRxbuf},
		"legacy, mrg":    {Without: virtio.FVersion1},
		"no reply_ack":   {NoReplyAck: true},
		"no protocol":    {NoProtocol: true},
		"mem slots":      {MemSlots: true},
		"polled":         {Polled: true},
		"direct chains":  {Direct: true},
		"from zero":      {AtZero: true},
		"pieces to read": {RecvLayout: vhosttest.Crumbs},
		"header apart":   {RecvLayout: vhosttest.HeaderApart},
		"odd offset":     {Regions: []vhosttest.RegionSpec{{GPA: 1 << 30, Size: 16 << 20, Offset: 0x3000}}},
	} {
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

func TestTrafficByQueueSize(t *testing.T) {
	for _, size := range []int{1, 2, 16, 64, 1024, 32768} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			a, b := link(t, vhosttest.Options{QueueSize: size})
			runAll(t, both(a, b, 2000, vhosttest.Flat, 30, 1514, 64)...)
		})
	}
}

func TestTrafficOfLargeFrames(t *testing.T) {
	for name, o := range map[string]vhosttest.Options{
		"merged": {SendSize: 70000}, "whole": {SendSize: 70000, RecvSize: 70000, Without: virtio.FNetMrgRxbuf, QueueSize: 64},
		"merged from crumbs": {SendSize: 70000, RecvSize: 100, QueueSize: 1024},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := link(t, o)
			runAll(t, both(a, b, 200, vhosttest.HeaderApart, 30, 9014, 65000, 1514)...)
		})
	}
}

func TestTrafficWrapsIndices(t *testing.T) {
	a, b := link(t, vhosttest.Options{})
	runAll(t, both(a, b, 1<<16+1000, vhosttest.Flat, 60)...)
}

// A buffer may lie across two regions that are neighbours for the guest alone: such a chain is one piece more for the device.
func TestTrafficAcrossRegions(t *testing.T) {
	for name, without := range map[string]virtio.Features{"merged": 0, "whole": virtio.FNetMrgRxbuf} {
		t.Run(name, func(t *testing.T) {
			const border = 1<<30 + 4<<20
			a, b := link(t, vhosttest.Options{Without: without, Regions: []vhosttest.RegionSpec{
				{GPA: 1 << 30, Size: 4 << 20}, {GPA: border, Size: 4 << 20},
			}})
			q := a.Transmitq(0)
			frame := vhosttest.Frame(0, 1000)
			low, high := a.Mem.At(border-500, 500), a.Mem.At(border, 500+virtio.NetHdrSize)
			whole := append(make([]byte, virtio.NetHdrSize), frame...)
			copy(high, whole[copy(low, whole):])
			if _, err := q.Driver.Add([]vhosttest.Piece{{GPA: border - 500, Len: uint32(len(whole))}}, nil); err != nil {
				t.Fatal(err)
			}
			q.Flush()
			if err := (flow{to: b, frames: 1}).receive(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestMultiqueue(t *testing.T) {
	const pairs = 4
	a, b := link(t, vhosttest.Options{Pairs: pairs})
	var flows []flow
	for i := range pairs {
		for _, f := range both(a, b, 2000, vhosttest.Flat, 60, 1514) {
			f.pair = i
			flows = append(flows, f)
		}
	}
	runAll(t, flows...)
	for i, q := range a.be.Stats().Queues {
		if q.Frames != 2000 || !q.Started || !q.Enabled || q.Size != 256 {
			t.Errorf("queue %d: %+v", i, q)
		}
	}
}

func TestMultiqueueActivation(t *testing.T) {
	a, b := link(t, vhosttest.Options{Pairs: 4, Disabled: true})
	pairs := func(want int32) {
		t.Helper()
		if got := a.dev.pairs.Load(); got != want {
			t.Fatalf("the device was told of %d pairs, want %d", got, want)
		}
	}
	for i, want := range []int32{1, 1, 2, 2} {
		a.Queues[i].Enable(true)
		pairs(want)
	}
	for _, q := range b.Queues {
		q.Enable(true)
	}
	runAll(t, flow{from: a, to: b, pair: 1, frames: 100, sizes: []int{60}}, flow{from: a, to: b, frames: 100, sizes: []int{60}})
	for i, want := range []int32{2, 1} { // pair 1 goes
		a.Queues[2+i].Enable(false)
		pairs(want)
	}
	runAll(t, both(a, b, 100, vhosttest.Flat, 60)...)
}

// A ring that is started and disabled is emptied: frames are lost, and chains come back (vhost-user, "Ring states").
func TestDisabledRingDiscards(t *testing.T) {
	a, b := link(t, vhosttest.Options{})
	runAll(t, both(a, b, 100, vhosttest.Flat, 60)...)
	a.Transmitq(0).Enable(false)
	for range 700 {
		if err := a.Send(0, virtio.NetHdr{}, vhosttest.Frame(9999, 60), nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Transmitq(0).Settle(); err != nil {
		t.Fatal(err)
	}
	a.Transmitq(0).Enable(true)
	runAll(t, both(a, b, 100, vhosttest.Flat, 60)...)
	if n := a.be.Stats().Queues[1].Outcomes["dropped"]; n != 700 {
		t.Errorf("%d frames were counted as dropped, want 700", n)
	}
}

// A ring that has just started and is not enabled yet is about to be: what the guest sent meanwhile is kept for a moment. On a busy machine this test takes longer
// than the moment is.
func TestStartedRingWaitsToBeEnabled(t *testing.T) {
	backend.EnableGrace(t, vhosttest.Patience)
	a, b := link(t, vhosttest.Options{Disabled: true})
	b.Receiveq(0).Enable(true)
	for i := range 10 {
		if err := a.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(i), 60), nil); err != nil {
			t.Fatal(err)
		}
	}
	a.Transmitq(0).Enable(true)
	if err := (flow{to: b, frames: 10}).receive(); err != nil {
		t.Fatal(err)
	}
}

// It is kept for no longer: a ring that is never enabled is emptied.
func TestStartedRingIsNotWaitedForLong(t *testing.T) {
	_, b := link(t, vhosttest.Options{Disabled: true})
	if err := b.Send(0, virtio.NetHdr{}, vhosttest.Frame(0, 60), nil); err != nil {
		t.Fatal(err)
	}
	if err := b.Transmitq(0).Settle(); err != nil {
		t.Fatal(err)
	}
	if n := b.be.Stats().Queues[1].Outcomes["dropped"]; n != 1 {
		t.Errorf("%d frames were counted as dropped, want 1", n)
	}
}

func TestDisabledRingReceivesNothing(t *testing.T) {
	a, b := link(t, vhosttest.Options{})
	b.Receiveq(0).Enable(false)
	for i := range 50 {
		if err := a.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(i), 60), nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Transmitq(0).Settle(); err != nil { // so they are in the device, where b must not take them
		t.Fatal(err)
	}
	if n := b.Receiveq(0).Driver.RawUsedIndex(); n != vhosttest.StartIndex {
		t.Fatalf("used index %#x of a disabled ring, want %#x", n, vhosttest.StartIndex)
	}
	b.Receiveq(0).Enable(true)
	if err := (flow{to: b, frames: 50}).receive(); err != nil {
		t.Fatal(err)
	}
}

// One frame at a time, with both sides asleep in between: a wake-up that is lost is a hang.
func TestPingPongLosesNoWakeUp(t *testing.T) {
	rounds := 40_000
	if testing.Short() {
		rounds = 5_000
	}
	for name, without := range map[string]virtio.Features{"event_idx": 0, "flags": virtio.FEventIdx} {
		t.Run(name, func(t *testing.T) {
			a, b := link(t, vhosttest.Options{Without: without, QueueSize: 16})
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

// receiveFrom receives frames whose numbers start at first.
func (f flow) receiveFrom(first int) error {
	for i := range f.frames {
		_, frame, err := f.to.Recv(f.pair, vhosttest.Patience)
		if err != nil {
			return fmt.Errorf("receiving frame %d: %w", first+i, err)
		}
		if err := check(frame, first+i); err != nil {
			return err
		}
	}
	return nil
}

// echo sends back what comes.
func echo(e *end, frames int) error {
	for i := range frames {
		hdr, frame, err := e.Recv(0, vhosttest.Patience)
		if err != nil {
			return fmt.Errorf("echo of frame %d: %w", i, err)
		}
		if err := e.Send(0, hdr, frame, nil); err != nil {
			return fmt.Errorf("echo of frame %d: %w", i, err)
		}
	}
	return nil
}
