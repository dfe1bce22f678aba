package backend

import (
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"github.com/vhostd/vhostd/internal/sys"
)

// errFault is what an access to guest memory ends in when the file behind it has been truncated.
var errFault = errors.New("guest memory faulted: its file was truncated")

// guard runs f, which touches guest memory, and turns a memory fault into an error. Other panics pass.
func guard(f func()) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() { err = errors.Join(err, faultOf(recover())) }()
	f()
	return nil
}

// faultOf tells a memory fault from other panics, which go on.
func faultOf(r any) error {
	if r == nil {
		return nil
	}
	if e, ok := r.(interface {
		runtime.Error
		Addr() uintptr
	}); ok {
		return fmt.Errorf("%w (at host address %#x)", errFault, e.Addr())
	}
	panic(r)
}

// checkNotifier refuses a descriptor that could keep a worker waiting; -1 is none.
func checkNotifier(fd int) error {
	if fd < 0 {
		return nil
	}
	return sys.Notifier(fd)
}

// procs counts the workers: each may spin on a processor of Go's scheduler, and the control side must not have to wait for one.
var procs struct {
	sync.Mutex
	workers, base int
	few           atomic.Bool // every worker has a processor of its own
}

// maxExtraProcs bounds what workers add to GOMAXPROCS: beyond it the operating system has more threads than it can run anyway.
const maxExtraProcs = 8

func addProc() { changeProcs(1) }

func changeProcs(n int) {
	procs.Lock()
	defer procs.Unlock()
	if procs.base == 0 {
		procs.base = runtime.GOMAXPROCS(0)
	}
	procs.workers += n
	procs.few.Store(procs.workers <= maxExtraProcs)
	// Only upwards: a change stops the world, and an unused processor costs nothing.
	if want := procs.base + min(procs.workers, maxExtraProcs); want > runtime.GOMAXPROCS(0) {
		runtime.GOMAXPROCS(want)
	}
}

// enoughProcs reports whether a worker may keep its processor while it sleeps.
func enoughProcs() bool { return procs.few.Load() }
