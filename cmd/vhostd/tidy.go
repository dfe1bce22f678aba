package main

import (
	"runtime/debug"
	"sync"
	"time"
)

// tidier gives memory of guests who have left back to the host. Go's runtime would do so by itself, but minutes later and in part: it keeps as much again as lives.
// A collection takes some milliseconds of a processor, and workers go on meanwhile; it comes when nobody has left for a while, so that it is rare.
type tidier struct {
	mu    sync.Mutex
	timer *time.Timer
}

// tidyAfter is how long nobody has left before that.
const tidyAfter = 2 * time.Second

// left says that a guest has left.
func (t *tidier) left() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.timer == nil {
		t.timer = time.AfterFunc(tidyAfter, debug.FreeOSMemory)
		return
	}
	t.timer.Reset(tidyAfter)
}
