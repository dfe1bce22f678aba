package l2switch

import "testing"

// crowd is a table of one bucket with the addresses of some ports in it, each heard of a second after the one before.
func crowd(ports ...int) (t *table, shares func(int) *learned) {
	t = newTable(ways, 100)
	t.buckets = t.buckets[:1]
	t.shift = 64 // all hashes are 0
	of := map[int]*learned{}
	shares = func(port int) *learned {
		if of[port] == nil {
			of[port] = &learned{}
		}
		return of[port]
	}
	t.limit = 2 * ways
	for i, p := range ports {
		t.learn(station(1, uint64(100+i)), p, uint32(i+1), shares(p), ways, shares)
	}
	return t, shares
}

// TestFullBucket: a port that wants a place in a full bucket gives up one of its own, or takes one of the port that has the most there, and never one's only one.
func TestFullBucket(t *testing.T) {
	for _, c := range []struct {
		name  string
		ports []int
		port  int
		gone  int // address that goes; -1: the new one is not learned
	}{
		{"own", []int{2, 1, 2, 2, 2, 2, 2, 1}, 1, 1},
		{"own, the only one", []int{2, 2, 2, 1, 2, 2, 2, 2}, 1, 3},
		{"of the one with most", []int{3, 2, 2, 3, 2, 4, 5, 6}, 1, 1},
		{"nobody has two", []int{2, 3, 4, 5, 6, 7, 8, 9}, 1, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			table, shares := crowd(c.ports...)
			now := uint32(len(c.ports) + 1)
			table.learn(station(1, 99), c.port, now, shares(c.port), ways, shares)
			if port, _, ok := table.lookup(station(1, 99), now); ok != (c.gone >= 0) || ok && port != c.port {
				t.Errorf("learned: %v, at port %d", ok, port)
			}
			sum := 0
			for i, p := range c.ports {
				if _, _, ok := table.lookup(station(1, uint64(100+i)), now); ok != (i != c.gone) {
					t.Errorf("address %d of port %d is there: %v", i, p, ok)
				}
			}
			for p := range 10 {
				sum += int(shares(p).count.Load())
			}
			if sum != ways || table.count.Load() != ways || (c.gone < 0) != (table.refused.Load() == 1) {
				t.Errorf("%d in shares, %d counted, %d refused", sum, table.count.Load(), table.refused.Load())
			}
			// What has aged makes room for anybody.
			table.learn(station(1, 98), 1, now+101, shares(1), ways, shares)
			if _, _, ok := table.lookup(station(1, 98), now+101); !ok {
				t.Error("the others have aged, and there is no room")
			}
		})
	}
}
