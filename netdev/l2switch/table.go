package l2switch

import (
	"math/bits"
	"math/rand/v2"
	"sync"
	"sync/atomic"
)

// ways is how many addresses share a bucket: their keys fill one line of the processor's cache.
const ways = 8

// noKey is no address: VLAN 0 is none's.
const noKey = 0

// station packs a VLAN and an Ethernet address.
func station(vid uint16, mac uint64) uint64 { return uint64(vid)<<48 | mac }

// entry packs a port's index and when the address was heard of last, in seconds.
func entry(port int, stamp uint32) uint64 { return uint64(port)<<32 | uint64(stamp) }

// bucket is a set of addresses. Readers take no lock: they read seq before and after, which is odd while a writer is at it.
type bucket struct {
	keys [ways]atomic.Uint64
	vals [ways]atomic.Uint64
	seq  atomic.Uint32
	_    [60]byte
}

// table is what the switch has learned: which port an address is behind. Its memory is bounded by its making, its load by limit, and what one port
// puts in by that port's own limit. Lookups take no lock; learn, forget and sweep take mu.
type table struct {
	mu      sync.Mutex
	buckets []bucket
	shift   uint   // of a hash, to a bucket
	seed    uint64 // so that nobody can choose addresses that meet in one bucket
	limit   int
	ageing  uint32 // seconds
	count   atomic.Int64
	swept   atomic.Uint32 // when the aged were thrown out last

	moves   atomic.Uint64 // addresses that went to another port
	refused atomic.Uint64 // addresses that were not learned: the table was full, or their bucket with one of each port
}

// newTable has four to eight times as many places as addresses: an address that finds its bucket full costs another one its place (see victim), and with half as many
// places it was one bucket in a thousand that chance filled.
func newTable(limit int, ageing uint32) *table {
	n := 1 << bits.Len(uint(4*limit/ways))
	return &table{buckets: make([]bucket, n), shift: uint(64 - bits.Len(uint(n-1))), seed: rand.Uint64(), limit: limit, ageing: ageing}
}

func (t *table) bucket(key uint64) *bucket {
	h := key ^ t.seed
	h = (h ^ h>>32) * 0x9e3779b97f4a7c15
	h = (h ^ h>>29) * 0xbf58476d1ce4e5b9
	return &t.buckets[h>>t.shift]
}

// lookup finds the port of an address.
func (t *table) lookup(key uint64, now uint32) (port int, stamp uint32, ok bool) {
	b := t.bucket(key)
	for {
		seq := b.seq.Load()
		port, stamp, ok = b.find(key)
		if seq&1 == 0 && b.seq.Load() == seq {
			break
		}
	}
	return port, stamp, ok && !t.aged(stamp, now)
}

// aged tells an address that was not heard of for too long. stamp may be later than now, which was read before on another thread.
func (t *table) aged(stamp, now uint32) bool { return int32(now-stamp) > int32(t.ageing) }

func (b *bucket) find(key uint64) (port int, stamp uint32, ok bool) {
	for i := range b.keys {
		if b.keys[i].Load() == key {
			v := b.vals[i].Load()
			return int(v >> 32), uint32(v), true
		}
	}
	return 0, 0, false
}

// set replaces way i. The caller holds mu.
func (b *bucket) set(i int, key, val uint64) {
	b.seq.Add(1)
	b.keys[i].Store(key)
	b.vals[i].Store(val)
	b.seq.Add(1)
}

// learned is a port's share of the table.
type learned struct {
	count   atomic.Int64
	refused atomic.Uint64 // addresses that were not learned: the port has as many as it may
}

// touch notes that an address was heard of, where it is known to be.
func (t *table) touch(key uint64, port int, now uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	b := t.bucket(key)
	if way, known, _ := b.place(key); known && int(b.vals[way].Load()>>32) == port {
		b.set(way, key, entry(port, now))
	}
}

// learn notes that key is behind a port, whose share is of at most max addresses. shares finds the share of the port that loses one.
func (t *table) learn(key uint64, port int, now uint32, share *learned, max int, shares func(port int) *learned) {
	b := t.bucket(key)
	if t.swept.Load() == now {
		// There is no point in looking for the aged again. Whoever invents addresses ends here, and takes no lock that others may want.
		if int(share.count.Load()) >= max {
			share.refused.Add(1)
			return
		}
		if _, _, known := b.find(key); !known && int(t.count.Load()) >= t.limit {
			t.refused.Add(1)
			return
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	way, known, free := b.place(key)
	if mine := known && int(b.vals[way].Load()>>32) == port; !mine && int(share.count.Load()) >= max {
		t.sweep(now, shares)
		if int(share.count.Load()) >= max {
			share.refused.Add(1)
			return
		}
		way, known, free = b.place(key)
	}
	if !known && int(t.count.Load()) >= t.limit {
		t.sweep(now, shares)
		if int(t.count.Load()) >= t.limit {
			t.refused.Add(1)
			return
		}
		way, _, free = b.place(key)
	}
	if !known && !free {
		t.sweep(now, shares)
		if way, _, free = b.place(key); !free {
			way, free = b.victim(port)
		}
	}
	if !known && !free {
		t.refused.Add(1)
		return
	}
	if old := b.keys[way].Load(); old != noKey {
		t.drop(b.vals[way].Load(), shares)
		if known && int(b.vals[way].Load()>>32) != port {
			t.moves.Add(1)
		}
	}
	b.set(way, key, entry(port, now))
	share.count.Add(1)
	t.count.Add(1)
}

// unlearn throws out what learn has just put in, if it did.
func (t *table) unlearn(key uint64, port int, share *learned) {
	t.mu.Lock()
	defer t.mu.Unlock()
	b := t.bucket(key)
	if way, known, _ := b.place(key); known && b.port(way) == port {
		b.set(way, noKey, 0)
		share.count.Add(-1)
		t.count.Add(-1)
	}
}

// place finds the way of a key, or else a free one, if there is one.
func (b *bucket) place(key uint64) (way int, known, free bool) {
	for i := range b.keys {
		switch k := b.keys[i].Load(); {
		case k == key:
			return i, true, false
		case k == noKey && !free:
			way, free = i, true
		}
	}
	return way, false, free
}

// victim finds the way that port may take in a full bucket: the one that was heard of least lately, of its own addresses; if it has none here, of those of the port
// that has the most. Nobody loses the only one.
func (b *bucket) victim(port int) (way int, found bool) {
	var has [ways]int // addresses here of the port of each way
	most := 2
	for i := range b.vals {
		for j := range b.vals {
			if b.port(j) == b.port(i) {
				has[i]++
			}
		}
		if b.port(i) == port {
			has[i] = ways + 1
		}
		most = max(most, has[i])
	}
	oldest := ^uint32(0)
	for i := range b.vals {
		if stamp := uint32(b.vals[i].Load()); has[i] == most && stamp <= oldest {
			way, oldest, found = i, stamp, true
		}
	}
	return way, found
}

// port is the port of a way.
func (b *bucket) port(way int) int { return int(b.vals[way].Load() >> 32) }

// drop counts an entry that goes. The caller holds mu.
func (t *table) drop(val uint64, shares func(port int) *learned) {
	t.count.Add(-1)
	if s := shares(int(val >> 32)); s != nil {
		s.count.Add(-1)
	}
}

// sweep throws out what has aged, once a second at most. The caller holds mu.
func (t *table) sweep(now uint32, shares func(port int) *learned) {
	if t.swept.Load() == now {
		return
	}
	t.swept.Store(now)
	t.purge(shares, func(_ uint64, val uint64) bool { return t.aged(uint32(val), now) })
}

// purge throws out the entries that match. The caller holds mu.
func (t *table) purge(shares func(port int) *learned, match func(key, val uint64) bool) {
	for i := range t.buckets {
		b := &t.buckets[i]
		for w := range b.keys {
			if k, v := b.keys[w].Load(), b.vals[w].Load(); k != noKey && match(k, v) {
				t.drop(v, shares)
				b.set(w, noKey, 0)
			}
		}
	}
}

// forget throws out the entries that match.
func (t *table) forget(shares func(port int) *learned, match func(key, val uint64) bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.purge(shares, match)
}

// each calls f for what is known at the moment.
func (t *table) each(now uint32, f func(vid uint16, mac uint64, port int, age uint32)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.buckets {
		b := &t.buckets[i]
		for w := range b.keys {
			k, v := b.keys[w].Load(), b.vals[w].Load()
			if k != noKey && !t.aged(uint32(v), now) {
				f(uint16(k>>48), k&(1<<48-1), int(v>>32), uint32(max(int32(now-uint32(v)), 0)))
			}
		}
	}
}
