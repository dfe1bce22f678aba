package udp

import (
	"sync"
	"time"

	"github.com/vhostd/vhostd/internal/sys"
)

type mac [6]byte

// Bounds of what is learnt from outside.
const (
	maxLearnt = 4096             // addresses
	learntFor = 5 * time.Minute  // since an address was last seen
	relearn   = time.Second      // the time of an address is written no more often
	sweepGap  = 10 * time.Second // a full table is searched for old ones no more often
)

type entry struct {
	from, peer sys.Sockaddr // where frames come from, and where they go to
	seen       time.Time
}

// table knows behind which peer an Ethernet address is. It is written by the receiveq's worker and read by the transmitq's.
type table struct {
	port  uint16                        // at which peers receive: what they send comes from any
	named map[sys.Sockaddr]sys.Sockaddr // peers of the configuration that receive elsewhere, by what they would be at port

	mu    sync.Mutex
	m     map[mac]entry
	swept time.Time
	full  uint64 // frames whose address was not learnt because the table was full
}

func newTable(port uint16, remotes []sys.Sockaddr) *table {
	t := &table{port: port, named: map[sys.Sockaddr]sys.Sockaddr{}, m: map[mac]entry{}}
	for _, r := range remotes {
		if _, ambiguous := t.named[r.WithPort(port)]; !ambiguous {
			t.named[r.WithPort(port)] = r
		}
	}
	return t
}

// learn takes note of a source address. A full table forgets old addresses, and takes no new one while there are none.
func (t *table) learn(a mac, peer *sys.Sockaddr, now time.Time) {
	if a[0]&multicastSource != 0 || a == (mac{}) {
		return
	}
	from := peer.WithPort(t.port)
	t.mu.Lock()
	defer t.mu.Unlock()
	e, known := t.m[a]
	switch {
	case known && e.from == from && now.Sub(e.seen) < relearn:
		return
	case !known && len(t.m) >= maxLearnt && !t.sweep(now):
		t.full++
		return
	}
	to, ok := t.named[from]
	if !ok {
		to = from
	}
	t.m[a] = entry{from, to, now}
}

// sweep forgets old addresses and reports whether there is room.
func (t *table) sweep(now time.Time) bool {
	if now.Sub(t.swept) < sweepGap {
		return false
	}
	t.swept = now
	for a, e := range t.m {
		if now.Sub(e.seen) > learntFor {
			delete(t.m, a)
		}
	}
	return len(t.m) < maxLearnt
}

// lookup finds the peer of a destination address that was seen not too long ago.
func (t *table) lookup(a mac, now time.Time) (sys.Sockaddr, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, ok := t.m[a]
	if !ok || now.Sub(e.seen) > learntFor {
		return sys.Sockaddr{}, false
	}
	return e.peer, true
}
