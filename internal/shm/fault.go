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

// owned are the mappings that have an owner. It is looked at when something faults, and so never on the way of a frame.
var owned struct {
	sync.Mutex
	mappings []*Mapping
}

// Own says who is to blame when m faults, until it is unmapped. It is called once at most.
func (m *Mapping) Own(o Owner) {
	if m.whole == nil {
		return // heap does not fault
	}
	owned.Lock()
	defer owned.Unlock()
	m.owner = o
	owned.mappings = append(owned.mappings, m)
}

// disown comes before the address range can be somebody else's.
func (m *Mapping) disown() {
	if m.owner == nil {
		return
	}
	owned.Lock()
	defer owned.Unlock()
	m.owner = nil
	owned.mappings = slices.DeleteFunc(owned.mappings, func(o *Mapping) bool { return o == m })
}

// ownerAt is the owner of the mapping that address p lies in, or nil.
func ownerAt(p uintptr) Owner {
	owned.Lock()
	defer owned.Unlock()
	for _, m := range owned.mappings {
		if p-Addr(m.whole) < uintptr(len(m.whole)) {
			return m.owner
		}
	}
	return nil
}

// Caught tells what recover returned: a Fault, or nil for nil. Any other panic goes on. The goroutine must have called debug.SetPanicOnFault.
func Caught(r any) *Fault {
	if r == nil {
		return nil
	}
	if e, ok := r.(interface {
		runtime.Error
		Addr() uintptr
	}); ok {
		return &Fault{Addr: e.Addr(), Owner: ownerAt(e.Addr())}
	}
	panic(r)
}

// Guard runs f, which touches shared memory, and returns the Fault that ended it, or nil. Other panics pass. Whoever calls it tells the Owner.
func Guard(f func()) (fault *Fault) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() { fault = Caught(recover()) }()
	f()
	return nil
}
