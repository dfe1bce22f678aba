package netdev

import "github.com/vhostd/vhostd/zerocopy"

// Door is the way into a receiveq for a frame that comes from another guest: the thread that has the frame puts it into the posted buffers itself, and
// no other thread has to wake up for it. Its methods may be called by any goroutine, at any time.
type Door interface {
	// Try has d write into the guest's posted buffers on the calling thread, and lets the guest see what it wrote. It does not wait: when somebody is at
	// work on the receiveq already, d is not called and the answer is DoorBusy. A fault in the receiving guest's memory ends that guest's
	// session, and is DoorShut; any other unwinds Try.
	Try(d Deliverer) DoorState
	// Wake has the receiveq's worker call Recv, whatever it waits for.
	Wake()
}

// Deliverer has frames for a receiveq. Deliver is called with the receiveq locked: it writes what it can and neither waits nor tries another Door.
type Deliverer interface{ Deliver(p *zerocopy.Posted) }

// DoorState is what became of Door.Try.
type DoorState uint8

const (
	DoorOpen DoorState = iota // Deliver was called
	DoorBusy                  // somebody else works on the receiveq: it was not
	DoorShut                  // the receiveq does not run, or is disabled, or has just failed
)

// Doorway is a Queue that frames come to on threads of its device's other users. SetDoor hands the Door of its receiveq over, for as long as a front-end
// is connected; nil says that nobody is there to receive. An old Door that is tried once more answers DoorShut. Without any SetDoor, Recv is the
// only way.
type Doorway interface{ SetDoor(d Door) }

// Putter is a Queue that may put off what is cheaper to do together, between calls of Send and Reap. SendIdle is called from the transmitq's side before its
// worker waits: nothing may be put off any longer.
type Putter interface{ SendIdle() }
