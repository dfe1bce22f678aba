package vring

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/vhostd/vhostd/virtio"
)

// TestRingConcurrently runs both ends in goroutines of their own that sleep until the other one notifies: a notification lost
// is a test that hangs, a store out of order is wrong data, or a report of the race detector.
func TestRingConcurrently(t *testing.T) {
	for _, c := range []struct {
		size int
		f    virtio.Features
	}{
		{256, 0},
		{256, virtio.FEventIdx},
		{4, virtio.FEventIdx},
		{4, virtio.FIndirectDesc},
		{64, virtio.FEventIdx | virtio.FIndirectDesc | virtio.FInOrder},
		{32768, virtio.FEventIdx},
		{256, virtio.FRingPacked},
		{256, virtio.FRingPacked | virtio.FEventIdx},
		{5, virtio.FRingPacked | virtio.FEventIdx},
		{3, virtio.FRingPacked | virtio.FIndirectDesc},
		{61, virtio.FRingPacked | virtio.FEventIdx | virtio.FIndirectDesc | virtio.FInOrder},
		{32768, virtio.FRingPacked | virtio.FEventIdx},
	} {
		t.Run(c.f.String(), func(t *testing.T) {
			r := newRig(t, c.size, c.f)
			const chains = 100_000
			kick, call := make(chan struct{}, 1), make(chan struct{}, 1)
			done := make(chan struct{})
			go func() {
				defer close(done)
				echo(t, r.dev, chains, c.f.Has(virtio.FInOrder), kick, call)
			}()
			ask(t, r, chains, kick, call)
			<-done
		})
	}
}

// notify does what writing an eventfd does.
func notify(fd chan struct{}) {
	select {
	case fd <- struct{}{}:
	default:
	}
}

// echo is a device that copies the readable part of each chain to its writable one, and uses chains in random order within a batch.
func echo(t *testing.T, dev *Device, chains int, inOrder bool, kick, call chan struct{}) {
	batch := make([]Chain, 8)
	for left := chains; left > 0; {
		dev.DisableKick()
		n := 0
		for n < len(batch) && dev.Pop(&batch[n]) == Popped {
			n++
		}
		if err := dev.Err(); err != nil {
			t.Error(err)
			return
		}
		if n == 0 {
			if !dev.EnableKick() {
				<-kick
			}
			continue
		}
		if !inOrder {
			rand.Shuffle(n, func(i, j int) { batch[i], batch[j] = batch[j], batch[i] })
		}
		for i := range batch[:n] {
			c := &batch[i]
			dev.Put(c.Head, uint32(copy(c.Segs[1].Mem, c.Segs[0].Mem)))
		}
		dev.Publish()
		if dev.NeedsCall() {
			notify(call)
		}
		left -= n
	}
}

// ask is a driver that sends numbers and wants every one of them back.
func ask(t *testing.T, r *rig, chains int, kick, call chan struct{}) {
	const slot = 64 // bytes of the data area: a number, and room for its echo
	free := make([]int, 0, min(r.drv.Size(), dataSize/slot))
	for i := range cap(free) {
		free = append(free, i*slot)
	}
	at := make([]int, r.drv.Size()) // by id: offset of its memory
	number := make([]uint64, r.drv.Size())
	for sent, got := 0, 0; got < chains; {
		for sent < chains && len(free) > 0 {
			off := free[len(free)-1]
			binary.LittleEndian.PutUint64(r.mem(r.buf(off, 8)), uint64(sent))
			id, err := r.drv.Add([]Buf{r.buf(off, 8)}, []Buf{r.buf(off+8, 8)})
			if err != nil {
				break
			}
			free = free[:len(free)-1]
			at[id], number[id] = off, uint64(sent)
			sent++
		}
		r.drv.Publish()
		if r.drv.NeedsKick() {
			notify(kick)
		}
		reaped := 0
		for id, written, ok := r.drv.Reap(); ok; id, written, ok = r.drv.Reap() {
			back := binary.LittleEndian.Uint64(r.mem(r.buf(at[id]+8, 8)))
			if written != 8 || back != number[id] {
				t.Fatalf("id %d: %d bytes, number %d, want %d", id, written, back, number[id])
			}
			free = append(free, at[id])
			reaped++
		}
		if err := r.drv.Err(); err != nil {
			t.Fatal(err)
		}
		got += reaped
		switch {
		case reaped > 0:
			r.drv.DisableCall()
		case !r.drv.EnableCall():
			<-call
		}
	}
}
