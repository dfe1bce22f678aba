package backend

import (
	"fmt"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// ringSetup is what the front-end has said about a ring. It outlives a stop, as SET_VRING_NUM and SET_VRING_ADDR are not repeated by all.
type ringSetup struct {
	size  int
	addr  *vhostuser.VringAddr
	base  uint32 // as in SET_VRING_BASE
	based bool   // base has been set
}

// startOfPacked is the base of a packed ring that is fresh: both indices 0, both wrap counters 1 (virtio-v1.2 §2.8.1).
const startOfPacked = 0x8000_8000

// packed tells whether rings are packed.
func (s *session) packed() bool { return s.negotiated().Has(virtio.FRingPacked) }

// base is where the ring goes on. Of a split ring it is the available index. Of a packed ring it is an index and its wrap counter in bit 15,
// and the same for used descriptors in the upper half (vhost-user, "A vring descriptor index for packed virtqueues").
func (q *queue) base() uint32 {
	if !q.setup.based && q.s.packed() {
		return startOfPacked
	}
	return q.setup.base
}

// keepBase remembers where the ring has stopped.
func (q *queue) keepBase() {
	base := uint32(q.ring.Base())
	if q.feat.Has(virtio.FRingPacked) {
		base |= uint32(q.ring.UsedIndex()) << 16
	}
	q.setup.base, q.setup.based = base, true
}

// openRing makes the ring, which goes on behind what was returned to the driver: an earlier back-end may have ended with chains in its
// hands.
func (q *queue) openRing() error {
	desc, avail, used, err := parts(q.s.table, *q.setup.addr, q.setup.size, q.feat.Has(virtio.FRingPacked))
	if err != nil {
		return err
	}
	cfg := vring.Config{
		Size: q.setup.size, Desc: desc, Avail: avail, Used: used, Features: q.feat, Base: uint16(q.base()),
		UsedBase: uint16(q.base() >> 16), // of a packed ring; memory does not tell it
		ReadOnly: q.fromGuest,
	}
	if q.ring, err = vring.NewDevice(cfg, guestmem.NewView(q.s.table, nil)); err != nil {
		return err
	}
	if start := q.ring.Base(); start != cfg.Base {
		q.s.b.log.Info("resuming at the used index", "queue", q.index, "base", cfg.Base, "used", start)
	}
	return nil
}

// part is one of the three parts of a ring: its name, address, length and alignment in bytes.
type part struct {
	name  string
	at    uint64
	n     int
	align uint64
}

// layout is the parts of a ring of n descriptors. SET_VRING_ADDR names those of a split ring; of a packed ring, the available ring is the driver's
// event suppression structure, the used ring the device's.
func layout(a vhostuser.VringAddr, n int, packed bool) [3]part {
	if packed {
		return [3]part{
			{"descriptor ring", a.Desc, virtio.DescTableLen(n), virtio.DescAlign},
			{"driver event suppression", a.Avail, virtio.EventLen, virtio.EventAlign},
			{"device event suppression", a.Used, virtio.EventLen, virtio.EventAlign},
		}
	}
	return [3]part{
		{"descriptor table", a.Desc, virtio.DescTableLen(n), virtio.DescAlign},
		{"available ring", a.Avail, virtio.AvailLen(n), virtio.AvailAlign},
		{"used ring", a.Used, virtio.UsedLen(n), virtio.UsedAlign},
	}
}

// parts finds the three parts of a ring in t.
func parts(t *guestmem.Table, a vhostuser.VringAddr, size int, packed bool) (desc, avail, used []byte, err error) {
	var found [3][]byte
	for i, p := range layout(a, size, packed) {
		if p.at%p.align != 0 {
			return nil, nil, nil, fmt.Errorf("%s at %#x is not aligned to %d bytes", p.name, p.at, p.align)
		}
		if found[i] = t.UserSlice(guestmem.UVA(p.at), uint64(p.n)); found[i] == nil {
			return nil, nil, nil, fmt.Errorf("%s at user address %#x, %d bytes, is not within one memory region", p.name, p.at, p.n)
		}
	}
	return found[0], found[1], found[2], nil
}
