package user

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// group is the goroutines of a device: none starts once close has begun, and close waits for all.
type group struct {
	ctx    context.Context
	cancel context.CancelFunc
	mu     sync.Mutex
	closed bool
	wg     sync.WaitGroup
}

func newGroup() *group {
	g := &group{}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	return g
}

// enter counts the calling goroutine in; it calls leave at its end. It reports false when there is nothing to be started any more.
func (g *group) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.wg.Add(1)
	return true
}

func (g *group) leave() { g.wg.Done() }

// run starts f, if anything may be started.
func (g *group) run(f func()) bool {
	if !g.enter() {
		return false
	}
	go func() {
		defer g.leave()
		f()
	}()
	return true
}

func (g *group) stop() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.cancel()
}

// flow is what a table bounds: something that is closed when it was idle for longest.
type flow interface {
	lastUsed() int64
	// evict makes the flow's goroutine end soon. It does not wait.
	evict()
}

// table is a bounded set of flows.
type table[K comparable, F flow] struct {
	max int
	mu  sync.Mutex
	m   map[K]F
}

func newTable[K comparable, F flow](max int) *table[K, F] {
	return &table[K, F]{max: max, m: make(map[K]F)}
}

func (t *table[K, F]) get(k K) (F, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f, ok := t.m[k]
	return f, ok
}

// add makes room by evicting the flow that was idle for longest. It reports false when there is such a flow already.
func (t *table[K, F]) add(k K, f F) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, there := t.m[k]; there {
		return false
	}
	if len(t.m) >= t.max {
		t.evictOldest()
	}
	t.m[k] = f
	return true
}

func (t *table[K, F]) evictOldest() {
	var oldest K
	first := true
	var at int64
	for k, f := range t.m {
		if used := f.lastUsed(); first || used < at {
			oldest, at, first = k, used, false
		}
	}
	t.m[oldest].evict()
	delete(t.m, oldest)
}

// remove takes f out, unless k is another's by now.
func (t *table[K, F]) remove(k K, f F) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if cur, ok := t.m[k]; ok && any(cur) == any(f) {
		delete(t.m, k)
	}
}

func (t *table[K, F]) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.m)
}

// evictAll ends all flows.
func (t *table[K, F]) evictAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range t.m {
		f.evict()
	}
	clear(t.m)
}

// usage is when a flow last carried something, and whether anything has ever come back.
type usage struct {
	last    atomic.Int64 // Unix nanoseconds
	replied atomic.Bool
	evicted atomic.Bool
}

func (u *usage) lastUsed() int64 { return u.last.Load() }
func (u *usage) touch()          { u.last.Store(time.Now().UnixNano()) }

// How long a flow of datagrams may be idle: before the first answer, and after it.
const (
	idleUnanswered = 30 * time.Second
	idleAnswered   = 3 * time.Minute
)

// expires is when the flow has been idle for too long.
func (u *usage) expires() time.Time {
	idle := idleUnanswered
	if u.replied.Load() {
		idle = idleAnswered
	}
	return time.Unix(0, u.last.Load()).Add(idle)
}
