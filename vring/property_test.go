package vring

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/vhostd/vhostd/virtio"
)

// TestMain makes property tests go on for long enough to get round the smaller rings. The command line may still say otherwise.
func TestMain(m *testing.M) {
	if err := flag.Set("rapid.steps", "200"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// model is what a ring is without being one: queues of chains, and who sleeps.
type model struct {
	*rig
	rt       *rapid.T
	f        virtio.Features
	added    []shape          // by the driver, not published
	avail    []shape          // published, not popped
	popped   []shape          // in the order popped
	history  []int            // heads of all chains popped and not given back, in order; -1 for those that were put
	out      map[uint16]shape // by the device's side of the ring: head of every chain not reaped
	put      []used           // not published
	used     []used           // published, not reaped
	descs    map[uint16]int   // what each chain takes of the ring
	devIdle  bool             // the device waits for a kick
	drvIdle  bool             // the driver waits for a call
	kicksOff bool
	callsOff bool
}

type used struct {
	id      uint16
	written uint32
}

// TestRingAgainstModel drives both ends of a ring at random, and checks every step against the model: contents, order, counts, and that
// neither end is left asleep with work in the ring.
func TestRingAgainstModel(t *testing.T) {
	ringAgainstModel(t, func(rt *rapid.T) (size int, f virtio.Features, base uint16) {
		size = 1 << rapid.IntRange(0, 6).Draw(rt, "log2 of size")
		return size, drawFeatures(rt, virtio.FNotifyOnEmpty), rapid.Uint16().Draw(rt, "base")
	})
}

// TestPackedRingAgainstModel is the same for packed rings, of any size.
func TestPackedRingAgainstModel(t *testing.T) {
	ringAgainstModel(t, func(rt *rapid.T) (size int, f virtio.Features, base uint16) {
		size = rapid.IntRange(1, 70).Draw(rt, "size")
		at := place{slot: rapid.Uint32Range(0, uint32(size-1)).Draw(rt, "slot"), wrap: rapid.Uint32Range(0, 1).Draw(rt, "wrap")}
		return size, drawFeatures(rt) | virtio.FRingPacked, at.offWrap()
	})
}

func drawFeatures(rt *rapid.T, more ...virtio.Features) (f virtio.Features) {
	for _, bit := range append(more, virtio.FIndirectDesc, virtio.FEventIdx, virtio.FInOrder) {
		if rapid.Bool().Draw(rt, bit.String()) {
			f |= bit
		}
	}
	return f
}

func ringAgainstModel(t *testing.T, draw func(*rapid.T) (size int, f virtio.Features, base uint16)) {
	rapid.Check(t, func(rt *rapid.T) {
		size, f, base := draw(rt)
		r := newRigAt(t, size, f, base)
		r.T = t
		m := &model{rig: r, rt: rt, f: f, out: map[uint16]shape{}, descs: map[uint16]int{}}
		rt.Repeat(map[string]func(*rapid.T){
			"":               m.check,
			"add":            m.doAdd,
			"driver publish": m.doDriverPublish,
			"pop":            m.doPop,
			"available":      m.doAvailable,
			"unpop":          m.doUnpop,
			"put":            m.doPut,
			"publish":        m.doPublish,
			"reap":           m.doReap,
			"device idles":   m.doDeviceIdle,
			"driver idles":   m.doDriverIdle,
			"device turn":    m.doDeviceTurn,
			"no kicks":       m.doDisableKick,
			"no calls":       m.doDisableCall,
		})
	})
}

func (m *model) doAdd(rt *rapid.T) {
	bufs := make([]Buf, rapid.IntRange(1, 5).Draw(rt, "buffers"))
	for i := range bufs {
		bufs[i] = m.buf(rapid.IntRange(0, dataSize-4096).Draw(rt, "offset"), rapid.Uint32Range(1, 4096).Draw(rt, "length"))
	}
	n := rapid.IntRange(0, len(bufs)).Draw(rt, "readable")
	want := shape{Segs: bufs, Readable: n}
	for i, b := range bufs {
		if i < n {
			want.ReadLen += b.Len
		} else {
			want.WriteLen += b.Len
		}
	}
	takes := len(bufs)
	if m.f.Has(virtio.FIndirectDesc) && takes > 1 {
		takes = 1
	}
	free := m.drv.Free()
	id, err := m.drv.Add(bufs[:n], bufs[n:])
	if (err == nil) != (takes <= free) {
		rt.Fatalf("Add of %d descriptors with %d free: %v", takes, free, err)
	}
	if err != nil {
		return
	}
	if old, ok := m.out[id]; ok {
		rt.Fatalf("Add returned id %d, which is out: %+v", id, old)
	}
	want.Head = id
	m.out[id], m.descs[id] = want, takes
	m.added = append(m.added, want)
}

func (m *model) doDriverPublish(rt *rapid.T) {
	n := len(m.added)
	m.avail = append(m.avail, m.added...)
	m.added = nil
	m.drv.Publish()
	kick := m.drv.NeedsKick()
	switch {
	case n == 0 && kick:
		rt.Fatal("a kick for nothing")
	case n > 0 && m.devIdle && !kick:
		rt.Fatal("the device sleeps, and no kick comes")
	case kick && m.kicksOff && !m.f.Has(virtio.FEventIdx):
		rt.Fatal("a kick though kicks are off")
	}
	if kick {
		m.devIdle = false
	}
}

func (m *model) doPop(rt *rapid.T) {
	s := m.dev.Pop(&m.chain)
	if len(m.avail) == 0 {
		if s != Empty {
			rt.Fatalf("Pop is %v, the ring is empty", s)
		}
		return
	}
	if s != Popped {
		rt.Fatalf("Pop is %v, %d chains are available: %v", s, len(m.avail), m.dev.Err())
	}
	if diff := cmp.Diff(m.avail[0], shapeOf(&m.chain)); diff != "" {
		rt.Fatal(diff)
	}
	if want := m.descs[m.chain.Head]; int(m.chain.Descs) != want {
		rt.Fatalf("chain of %d descriptors, was added with %d", m.chain.Descs, want)
	}
	m.popped = append(m.popped, m.avail[0])
	m.history = append(m.history, int(m.avail[0].Head))
	m.avail = m.avail[1:]
	m.devIdle = false
}

// doUnpop gives back chains. Those popped before a later one was put cannot be given back: what counts is the order of popping, so
// it does so only while nothing out of order is out.
func (m *model) doUnpop(rt *rapid.T) {
	n := rapid.IntRange(0, m.lastInARow()).Draw(rt, "chains")
	m.dev.Unpop(n)
	at := len(m.popped) - n
	m.avail = append(slices.Clone(m.popped[at:]), m.avail...)
	m.popped = m.popped[:at]
	m.history = m.history[:len(m.history)-n]
	if n > 0 {
		m.devIdle = false
	}
}

// lastInARow is how many of the chains popped last are still out.
func (m *model) lastInARow() int {
	n := 0
	for n < len(m.history) && m.history[len(m.history)-1-n] >= 0 {
		n++
	}
	return n
}

func (m *model) doPut(rt *rapid.T) {
	if len(m.popped) == 0 {
		return
	}
	i := 0
	if !m.f.Has(virtio.FInOrder) {
		i = rapid.IntRange(0, len(m.popped)-1).Draw(rt, "which")
	}
	c := m.popped[i]
	m.popped = slices.Delete(slices.Clone(m.popped), i, i+1)
	u := used{c.Head, rapid.Uint32Range(0, c.WriteLen).Draw(rt, "written")}
	m.dev.Put(u.id, u.written)
	m.history[slices.Index(m.history, int(u.id))] = -1
	m.put = append(m.put, u)
}

func (m *model) doPublish(rt *rapid.T) {
	n := len(m.put)
	m.used = append(m.used, m.put...)
	m.put = nil
	m.dev.Publish()
	call := m.dev.NeedsCall()
	mayForce := m.f.Has(virtio.FEventIdx) || m.f.Has(virtio.FNotifyOnEmpty) && len(m.avail) == 0
	switch {
	case n == 0 && call:
		rt.Fatal("a call for nothing")
	case n > 0 && m.drvIdle && !call:
		rt.Fatal("the driver sleeps, and no call comes")
	case n > 0 && m.f.Has(virtio.FNotifyOnEmpty) && len(m.avail) == 0 && !call:
		rt.Fatal("the ring ran empty, and no call comes")
	case call && m.callsOff && !mayForce:
		rt.Fatal("a call though calls are off")
	}
	if call {
		m.drvIdle = false
	}
}

func (m *model) doReap(rt *rapid.T) {
	id, written, ok := m.drv.Reap()
	if ok != (len(m.used) > 0) || m.drv.Err() != nil {
		rt.Fatalf("Reap: %v, %d chains were used: %v", ok, len(m.used), m.drv.Err())
	}
	if !ok {
		return
	}
	if got := (used{id, written}); got != m.used[0] {
		rt.Fatalf("reaped %+v, want %+v", got, m.used[0])
	}
	m.used = m.used[1:]
	delete(m.out, id)
	delete(m.descs, id)
	m.drvIdle = false
}

func (m *model) doDeviceIdle(rt *rapid.T) {
	more := m.dev.EnableKick()
	if more != (len(m.avail) > 0) {
		rt.Fatalf("EnableKick: %v, %d chains are available", more, len(m.avail))
	}
	m.devIdle, m.kicksOff = !more, false
}

func (m *model) doDriverIdle(rt *rapid.T) {
	more := m.drv.EnableCall()
	if more != (len(m.used) > 0) {
		rt.Fatalf("EnableCall: %v, %d chains were used", more, len(m.used))
	}
	m.drvIdle, m.callsOff = !more, false
}

// doDeviceTurn is what a device does when it is woken, so that rings get far.
func (m *model) doDeviceTurn(rt *rapid.T) {
	for range len(m.avail) {
		m.doPop(rt)
		m.doPut(rt)
	}
	m.doPublish(rt)
	m.doDeviceIdle(rt)
}

func (m *model) doDisableKick(*rapid.T) {
	m.dev.DisableKick()
	m.kicksOff, m.devIdle = true, false
}

func (m *model) doDisableCall(*rapid.T) {
	m.drv.DisableCall()
	m.callsOff, m.drvIdle = true, false
}

// doAvailable is a step of its own since it looks at the ring, which another step may have to do without.
func (m *model) doAvailable(rt *rapid.T) {
	if n := m.dev.Available(); n > len(m.avail) || n == 0 && len(m.avail) > 0 {
		rt.Fatalf("Available is %d, %d chains are", n, len(m.avail))
	}
}

// check holds after every step.
func (m *model) check(rt *rapid.T) {
	taken := 0
	for _, n := range m.descs {
		taken += n
	}
	got := fmt.Sprintf("free %d, out %d", m.drv.Free(), m.drv.Out())
	if want := fmt.Sprintf("free %d, out %d", m.drv.Size()-taken, len(m.out)); got != want {
		rt.Fatalf("%s, want %s", got, want)
	}
	if m.dev.Err() != nil {
		rt.Fatal(m.dev.Err())
	}
}
