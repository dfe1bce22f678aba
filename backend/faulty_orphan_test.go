package backend_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/zerocopy"
)

// scarce is a device that keeps frames, copies them out when it is told to, and has memory for a few copies only.
type scarce struct {
	*faulty
	copies  int                // that there is memory for
	refused int                // copies that there was none for
	private []*zerocopy.Buffer // what was copied out, to be sent some day
}

func newScarce(t *testing.T, copies int) *scarce {
	d := &scarce{faulty: newFaulty(t), copies: copies}
	d.send = func(bufs []*zerocopy.Buffer) int {
		d.hold(bufs)
		return len(bufs)
	}
	return d
}

func (d *scarce) Queue(int) netdev.Queue { return d }

func (d *scarce) Orphan() {
	for _, b := range d.take() {
		switch err := b.Orphan(d.memory); {
		case err == nil:
			d.private = append(d.private, b)
		default:
			d.refused++
			d.hold([]*zerocopy.Buffer{b})
		}
	}
}

func (d *scarce) memory(n int) ([]byte, error) {
	if d.copies == 0 {
		return nil, errors.New("the pool is empty")
	}
	d.copies--
	return make([]byte, n), nil
}

// TestOrphanWithoutMemory: a ring stops, or a front-end goes, and the device has memory for copies of some frames only. Every chain comes back once; the
// device has every frame as it was sent, in pages that stay mapped until it is done with the last, and not longer.
func TestOrphanWithoutMemory(t *testing.T) {
	const frames, copies = 50, 20
	for name, end := range map[string]func(s *sick){
		"GET_VRING_BASE": func(s *sick) { s.stops(t, 1) },
		"hang-up": func(s *sick) {
			s.Hangup()
			vhosttest.Eventually(t, "the session's end", func() bool { return !s.be.Stats().Connected })
		},
	} {
		t.Run(name, func(t *testing.T) {
			vhosttest.NoLeaks(t)
			d := newScarce(t, copies)
			s := startSick(t, d)
			for i := range frames {
				if err := s.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(i), 500), nil); err != nil {
					t.Fatal(err)
				}
			}
			vhosttest.Eventually(t, "frames in the device", func() bool { return s.be.Stats().Queues[1].Pending == frames })
			end(s)
			if q := s.be.Stats().Queues[1]; q.Outcomes["copied"] != copies || q.GivenUp != frames-copies || d.refused == 0 {
				t.Errorf("%d copies were refused, %+v", d.refused, q)
			}
			if used := s.Transmitq(0).Driver.RawUsedIndex() - uint16(vhosttest.StartIndex); used != frames {
				t.Errorf("%d chains came back, want %d", used, frames)
			}
			held := d.take()
			for i, b := range append(d.private, held...) {
				got := make([]byte, b.Len())
				if b.CopyTo(got, 0); !bytes.Equal(got, vhosttest.Frame(uint64(i), 500)) {
					t.Errorf("the device has another frame %d than was sent", i)
				}
				if pages := i >= copies; b.Zerocopy() != pages {
					t.Errorf("frame %d is of the guest's pages: %v, want %v", i, b.Zerocopy(), pages)
				}
			}
			s.Hangup()
			vhosttest.Eventually(t, "the session's end", func() bool { return !s.be.Stats().Connected })
			for i, b := range held {
				if n := mapped(t, s); n == 0 {
					t.Errorf("memory was unmapped under %d frames", len(held)-i)
				}
				b.Release(zerocopy.ZeroCopied)
			}
			if n := mapped(t, s); n != 0 {
				t.Errorf("%d mappings are left", n)
			}
			for _, b := range d.private {
				b.Release(zerocopy.Copied)
			}
			s.n.goesOn(t)
		})
	}
}

// mapped is how many mappings of a guest's memory the back-end has.
func mapped(t *testing.T, s *sick) (n int) {
	t.Helper()
	for _, r := range s.Mem.Regions {
		n += r.Mappings(t)
	}
	return n
}

// TestOrphansBeforeItGivesUp: on a host that is busy the deadline of a ring's end may be over at the first look at the clock. Devices are told to copy all the
// same: what they would keep, nobody came for any more.
func TestOrphansBeforeItGivesUp(t *testing.T) {
	vhosttest.NoLeaks(t)
	d := newDevice(t, 1)
	d.wires[0].keep, d.wires[0].orphans = true, true
	e := start(t, d, vhosttest.Options{}, func(o *backend.Options) { o.DrainTimeout = time.Nanosecond })
	e.sendHeld(t, 20)
	e.Transmitq(0).Stop()
	if st := e.be.Stats().Queues[1]; st.GivenUp != 0 || st.Outcomes["copied"] != 20 {
		t.Errorf("%+v", st)
	}
}
