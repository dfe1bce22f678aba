package shm

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
)

// Fault is an access to shared memory that its file does not reach to any more: another process has truncated it, and the access raised SIGBUS.
type Fault struct {
	Addr  uintptr // in this process
	Owner Owner   // of the Mapping that Addr lies in; nil: of none that has one
}

// Error says what happened.
func (f *Fault) Error() string {
	return fmt.Sprintf("guest memory faulted at host address %#x: its file was truncated", f.Addr)
}

// Owner is whose fault a Fault in a Mapping is. Faulted may be called on any goroutine, more than once.
type Owner interface{ Faulted(f *Fault) }

// shared is all memory that is another process's too: where an access may fault by no fault of ours. It is looked at when something faults, and so never on the
// way of a frame.
var shared struct {
	sync.Mutex
	mappings []*Mapping
	arenas   []*Arena
}

// keep notes a mapping that may fault.
func (m *Mapping) keep() {
	shared.Lock()
	defer shared.Unlock()
	shared.mappings = append(shared.mappings, m)
}

// forget comes before the address range can be somebody else's.
func (m *Mapping) forget() {
	shared.Lock()
	defer shared.Unlock()
	m.owner = nil
	shared.mappings = slices.DeleteFunc(shared.mappings, func(o *Mapping) bool { return o == m })
}

// keep notes an arena, whose regions may fault.
func (a *Arena) keep() {
	shared.Lock()
	defer shared.Unlock()
	shared.arenas = append(shared.arenas, a)
}

// forget comes before the address range can be somebody else's.
func (a *Arena) forget() {
	shared.Lock()
	defer shared.Unlock()
	shared.arenas = slices.DeleteFunc(shared.arenas, func(o *Arena) bool { return o == a })
}

// Own says who is to blame when m faults, until it is unmapped. It is called once at most.
func (m *Mapping) Own(o Owner) {
	if m.whole == nil {
		return // heap does not fault
	}
	shared.Lock()
	defer shared.Unlock()
	m.owner = o
}

// sharedAt reports whether address p lies in shared memory, and whose that is, if anybody's.
func sharedAt(p uintptr) (o Owner, ok bool) {
	shared.Lock()
	defer shared.Unlock()
	for _, m := range shared.mappings {
		if p-Addr(m.whole) < uintptr(len(m.whole)) {
			return m.owner, true
		}
	}
	for _, a := range shared.arenas {
		if p-Addr(a.bytes) < uintptr(len(a.bytes)) {
			return nil, true
		}
	}
	return nil, false
}

// Caught tells what recover returned: a Fault, or nil for nil. Any other panic goes on, and an access to an address that is no shared memory's becomes one
// that says so: to go on behind it would be to go on with memory that nobody knows the state of. The goroutine must have called debug.SetPanicOnFault.
func Caught(r any) *Fault {
	if r == nil {
		return nil
	}
	e, ok := r.(interface {
		runtime.Error
		Addr() uintptr
	})
	if !ok {
		panic(r)
	}
	o, ok := sharedAt(e.Addr())
	if !ok {
		panic(fmt.Sprintf("bug: access to address %#x, which is not in guest memory: %v", e.Addr(), e))
	}
	return &Fault{Addr: e.Addr(), Owner: o}
}

// Guard runs f, which touches shared memory, and returns the Fault that ended it, or nil. Other panics pass. Whoever calls it tells the Owner.
func Guard(f func()) (fault *Fault) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() { fault = Caught(recover()) }()
	f()
	return nil
}
