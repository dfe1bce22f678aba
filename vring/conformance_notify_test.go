package vring

import (
	"testing"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/virtio"
)

func conformCallFlags(t *testing.T) {
	r := newRig(t, 16, 0)
	for i := range 40 {
		suppress := i%2 == 1
		if suppress {
			r.drv.DisableCall()
		} else {
			r.drv.EnableCall()
		}
		shm.StoreFence16(r.drv.eventField, uint16(i*4000)) // to be ignored
		id := r.add([]Buf{r.buf(0, 1)}, nil)
		r.put(r.pop(Popped).Head, 0)
		if got := r.dev.NeedsCall(); got == suppress {
			t.Errorf("NeedsCall is %v, NO_INTERRUPT is %v", got, suppress)
		}
		if r.dev.NeedsCall() {
			t.Error("NeedsCall is true when nothing was published")
		}
		r.reap(id, 0)
	}
}

func conformCallEvent(t *testing.T) {
	r := newRig(t, 16, virtio.FEventIdx)
	use := func(n int) {
		for range n {
			r.add([]Buf{r.buf(0, 1)}, nil)
			r.dev.Put(r.pop(Popped).Head, 0)
		}
		r.dev.Publish()
		for range n {
			if _, _, ok := r.drv.Reap(); !ok {
				t.Fatal(r.drv.Err())
			}
		}
	}
	use(1)
	if !r.dev.NeedsCall() {
		t.Error("the first answer is no: a call owed by an earlier back-end is lost")
	}
	r.drv.flags = virtio.AvailNoInterrupt // to be ignored
	for distance := range uint16(8) {     // of used_event beyond the used index
		for n := range 8 {
			shm.StoreFence16(r.drv.eventField, r.dev.UsedIndex()+distance)
			use(n)
			if got, want := r.dev.NeedsCall(), n > int(distance); got != want {
				t.Errorf("used_event %d ahead, %d used: NeedsCall is %v", distance, n, got)
			}
		}
	}
	shm.StoreFence16(r.drv.eventField, r.dev.UsedIndex()-1) // long ago
	for i := range 65536 {
		use(1)
		if got, want := r.dev.NeedsCall(), i == 65535; got != want {
			t.Fatalf("%d used after used_event: NeedsCall is %v", i+1, got)
		}
	}
	for range 65537 {
		use(1)
	}
	if !r.dev.NeedsCall() {
		t.Error("NeedsCall is false though the index went all the way round")
	}
}

func conformKickFlags(t *testing.T) {
	r := newRig(t, 8, 0)
	for range 3 {
		r.dev.DisableKick()
		r.add([]Buf{r.buf(0, 1)}, nil)
		if got := r.drv.RawUsedFlags(); got != virtio.UsedNoNotify || r.drv.NeedsKick() {
			t.Errorf("after DisableKick: used flags %d, or the driver kicks", got)
		}
		r.put(r.pop(Popped).Head, 0)
		if got := r.drv.RawUsedFlags(); got != virtio.UsedNoNotify {
			t.Errorf("Publish changed used flags to %d", got)
		}
		if r.dev.EnableKick() {
			t.Error("EnableKick found chains in an empty ring")
		}
		if got, idx := r.drv.RawUsedFlags(), r.drv.RawUsedIndex(); got != 0 || idx != r.dev.UsedIndex() {
			t.Errorf("after EnableKick: used flags %d, index %d", got, idx)
		}
		r.add([]Buf{r.buf(0, 1)}, nil)
		if !r.drv.NeedsKick() {
			t.Error("no kick after EnableKick")
		}
		if !r.dev.EnableKick() {
			t.Error("EnableKick missed a chain")
		}
		r.put(r.pop(Popped).Head, 0)
		for r.drv.Out() > 0 {
			r.drv.Reap()
		}
	}
}

func conformKickEvent(t *testing.T) {
	r := newRig(t, 8, virtio.FEventIdx)
	id := r.add([]Buf{r.buf(0, 1)}, nil)
	if !r.drv.NeedsKick() {
		t.Error("no kick for the first chain")
	}
	beyond := r.cfg.Used[virtio.UsedLen(8):]
	beyond[0], beyond[1] = 0xaa, 0x55
	for range 50 {
		r.dev.DisableKick()
		r.put(r.pop(Popped).Head, 0)
		r.reap(id, 0)
		if r.dev.EnableKick() {
			t.Error("EnableKick found chains in an empty ring")
		}
		if got := r.drv.RawAvailEvent(); got != r.dev.Base() {
			t.Errorf("avail_event is %d, next available entry is %d", got, r.dev.Base())
		}
		id = r.add([]Buf{r.buf(0, 1)}, nil)
		if !r.drv.NeedsKick() {
			t.Error("no kick after EnableKick")
		}
		r.put(r.pop(Popped).Head, 0)
		r.reap(id, 0)
		id = r.add([]Buf{r.buf(0, 1)}, nil)
		if r.drv.NeedsKick() {
			t.Error("a kick though avail_event has passed")
		}
		if got := r.drv.RawUsedFlags(); got != 0 {
			t.Errorf("used flags are %d", got)
		}
	}
	if beyond[0] != 0xaa || beyond[1] != 0x55 {
		t.Error("the bytes beyond the used ring were written")
	}
}

func conformSpurious(t *testing.T) {
	r := newRig(t, 8, 0)
	for range 100 { // a kick without a chain is a Pop of an empty ring
		r.pop(Empty)
		if n := r.dev.Available(); n != 0 {
			t.Fatalf("Available is %d in an empty ring", n)
		}
	}
	r.dev.Publish()
	if r.dev.NeedsCall() || r.drv.RawUsedIndex() != 0xfff0 {
		t.Error("an empty ring led to a call or a used entry")
	}
}

func conformNotifyOnEmpty(t *testing.T) {
	for _, f := range []virtio.Features{virtio.FNotifyOnEmpty, virtio.FNotifyOnEmpty | virtio.FEventIdx} {
		r := newRig(t, 8, f)
		r.drv.DisableCall()
		r.add([]Buf{r.buf(0, 1)}, nil)
		r.put(r.pop(Popped).Head, 0)
		r.dev.NeedsCall() // the first with EVENT_IDX is always yes
		shm.StoreFence16(r.drv.eventField, r.dev.UsedIndex()+100)
		r.add([]Buf{r.buf(0, 1)}, nil)
		r.add([]Buf{r.buf(0, 1)}, nil)
		r.put(r.pop(Popped).Head, 0)
		if r.dev.NeedsCall() {
			t.Errorf("%v: a call though calls are suppressed and a chain is left", f)
		}
		r.put(r.pop(Popped).Head, 0)
		if !r.dev.NeedsCall() {
			t.Errorf("%v: no call though the ring ran out of chains", f)
		}
	}
}
