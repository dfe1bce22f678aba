package vring

import (
	"slices"
	"testing"

	"github.com/vhostd/vhostd/virtio"
)

// FuzzReap is a driver end whose device writes into the ring what it likes. Whatever comes back is a chain that was out, once, with no more
// bytes written than it has room for, and the count of free descriptors is right; or the driver says what the device did, and reaps no more.
func FuzzReap(f *testing.F) {
	turn := []byte{reapAdd | 1<<4, reapAdd, reapPublish, reapDevice | 2<<4, reapReap, reapReap, reapEnableCall}
	f.Add(uint8(0), uint16(0), slices.Repeat(turn, 5))
	f.Add(uint8(0x1f), uint16(0x8000), slices.Repeat(turn, 5))
	f.Add(uint8(0x14), uint16(9), append(slices.Clone(turn[:4]), reapPoke, 2, 0, 9, 0, reapReap, reapPoke, 4, 0, 1, 0, reapReap))
	f.Add(uint8(0x1c), uint16(9), append(slices.Clone(turn[:3]), reapPoke, 14, 0, 0x80, 0x80, reapPoke, 12, 0, 1, 0, reapReap, reapReap))
	rigs := map[bool]*rig{false: newRigAt(f, 8, 0, 0), true: newRigAt(f, 8, virtio.FRingPacked, 0)}
	f.Fuzz(func(t *testing.T, kind uint8, base uint16, script []byte) {
		var features virtio.Features
		for i, bit := range []virtio.Features{virtio.FIndirectDesc, virtio.FEventIdx, virtio.FInOrder, virtio.FRingPacked} {
			if kind>>i&1 != 0 {
				features |= bit
			}
		}
		r := &reaper{twin: newTwin(t, rigs[features.Has(virtio.FRingPacked)], features, base), out: map[uint16]sent{}}
		r.play(script)
	})
}

// What the low four bits of a step say; the bits above are a number.
const (
	reapAdd        = iota // a chain of as many buffers and one
	reapPublish           //
	reapReap              //
	reapDevice            // a device that keeps the rules takes and returns as many
	reapPoke              // two bytes of what the device writes: offset and value follow
	reapEnableCall        //
)

// reaper is a driver end, and which chains are out.
type reaper struct {
	*twin
	out map[uint16]sent
}

func (r *reaper) play(script []byte) {
	for len(script) > 0 {
		n := int(script[0] >> 4)
		op := script[0] & 15
		script = script[1:]
		switch op {
		case reapAdd:
			r.add(n)
		case reapPublish:
			r.drv.Publish()
			r.drv.NeedsKick()
		case reapReap:
			r.reap()
		case reapDevice:
			for ; n > 0 && r.dev.Pop(&r.chain) == Popped; n-- {
				r.dev.Put(r.chain.Head, r.chain.WriteLen)
				r.dev.Publish()
			}
		case reapPoke:
			if len(script) >= 4 {
				r.poke(int(script[0])|int(script[1])<<8, script[2:4])
				script = script[4:]
			}
		case reapEnableCall:
			r.drv.EnableCall()
			r.drv.RawUsedIndex()
			r.drv.DisableCall()
		}
		taken := 0
		for _, s := range r.out {
			taken += int(s.descs)
		}
		if r.drv.Free() != r.drv.Size()-taken || r.drv.Out() != len(r.out) {
			r.Fatalf("%d descriptors are free and %d chains out, want %d and %d", r.drv.Free(), r.drv.Out(), r.drv.Size()-taken, len(r.out))
		}
	}
}

// add adds a chain of n readable buffers and a writable one.
func (r *reaper) add(n int) {
	id, err := r.drv.Add(slices.Repeat([]Buf{r.buf(0, 8)}, n), []Buf{r.buf(64, 10)})
	if err != nil {
		return
	}
	descs := n + 1
	if r.cfg.Features.Has(virtio.FIndirectDesc) {
		descs = 1
	}
	if _, twice := r.out[id]; twice {
		r.Fatalf("Add returned id %d, which is out", id)
	}
	r.out[id] = sent{descs: uint16(descs), writable: 10}
}

func (r *reaper) reap() {
	failed := r.drv.Err() != nil
	id, written, ok := r.drv.Reap()
	if !ok {
		return
	}
	s, out := r.out[id]
	if !out || written > s.writable || failed {
		r.Fatalf("reaped id %d with %d bytes: %+v is out, had failed: %v", id, written, r.out, failed)
	}
	delete(r.out, id)
}

// poke writes into the part of memory that the device writes.
func (r *reaper) poke(at int, v []byte) {
	descLen, _, usedLen := partLens(r.cfg.Size, r.cfg.Features)
	mem := r.cfg.Used[:usedLen]
	if r.cfg.Features.Has(virtio.FRingPacked) {
		mem = r.cfg.Desc[:descLen]
	}
	copy(mem[at%len(mem):], v)
}
