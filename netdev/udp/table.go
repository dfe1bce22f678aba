package udp

import (
	"sync"
	"time"

	"github.com/vhostd/vhostd/internal/sys"
)

type mac [6]byte

// Bounds of what is learnt from outside, where anybody may make up addresses: nobody drives out what others are known by.
const (
	maxLearnt    = 4096             // addresses
	maxFromOne   = maxLearnt / 4    // addresses behind one peer
	maxStrangers = maxLearnt / 2    // addresses behind peers that the configuration does not name, where it names any
	learntFor    = 5 * time.Minute  // since an address was last seen
	relearn      = time.Second      // the time of an address is written no more often
	sweepGap     = 10 * time.Second // a full table is searched for old ones no more often
)

type entry struct {
	from, peer sys.Sockaddr // where frames come from, and where they go to
	seen       time.Time
}

// table knows behind which peer an Ethernet address is. It is written by the receiveq's worker and read by the transmitq's.
type table struct {
	port  uint16                        // at which peers receive: what they send comes from any
	named map[sys.Sockaddr]sys.Sockaddr // hosts of the configuration, which may receive elsewhere, by what they would be at port

	mu        sync.Mutex
	m         map[mac]entry
	behind    map[sys.Sockaddr]int // addresses by entry.from
	strangers int                  // addresses behind peers that are not in named
	swept     time.Time
	full      uint64 // frames whose address was not learnt because of a bound
	moved     uint64 // addresses that were seen behind another peer than before
}

// newTable returns an empty table; remotes are the peers of the configuration that are hosts.
func newTable(port uint16, remotes []sys.Sockaddr) *table {
	t := &table{port: port, named: map[sys.Sockaddr]sys.Sockaddr{}, m: map[mac]entry{}, behind: map[sys.Sockaddr]int{}}
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
	if known && e.from == from {
		if now.Sub(e.seen) >= relearn {
			e.seen = now
			t.m[a] = e
		}
		return
	}
	if !t.room(from, known) && (!t.sweep(now) || !t.room(from, known)) {
		t.full++
		return
	}
	if known {
		t.forget(a, e)
		t.moved++
	}
	t.add(a, from, now)
}

// room reports whether another address behind a peer may be learnt, or one that moves there.
func (t *table) room(from sys.Sockaddr, moves bool) bool {
	_, named := t.named[from]
	return (moves || len(t.m) < maxLearnt) && t.behind[from] < maxFromOne &&
		(named || len(t.named) == 0 || t.strangers < maxStrangers)
}

func (t *table) add(a mac, from sys.Sockaddr, now time.Time) {
	to, named := t.named[from]
	if !named {
		to = from
		t.strangers++
	}
	t.behind[from]++
	t.m[a] = entry{from, to, now}
}

func (t *table) forget(a mac, e entry) {
	delete(t.m, a)
	if _, named := t.named[e.from]; !named {
		t.strangers--
	}
	if t.behind[e.from]--; t.behind[e.from] == 0 {
		delete(t.behind, e.from)
	}
}

// sweep forgets old addresses, unless it did a short while ago.
func (t *table) sweep(now time.Time) bool {
	if now.Sub(t.swept) < sweepGap {
		return false
	}
	t.swept = now
	for a, e := range t.m {
		if now.Sub(e.seen) > learntFor {
			t.forget(a, e)
		}
	}
	return true
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
