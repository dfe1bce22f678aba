// Package netdev is the host side of the wire: what a device must do to carry a guest's frames. Every device is a sub-package, and sees
// buffers (zerocopy.Buffer, zerocopy.Posted), never a ring.
//
// # Who calls what
//
// A Device has up to Capabilities.MaxPairs Queues. Each is driven by two workers at the same time, one per direction, and by nobody
// else: Send, Reap and SendFD by the one, Recv and RecvFD by the other. None of these may block. Everything else is called by
// the session between batches.
//
//	transmitq worker:  Send(frames) ... Reap() ... wait for kick, SendFD, or a release
//	receiveq worker:   Recv(posted) ... wait for RecvFD, or for the kick when the guest posted too little
//
// A device whose frames come from another guest's worker can have that one put them into the posted buffers, instead of waking the receiveq's: see Doorway.
//
// # Faults
//
// Guest memory can fault at any access: its file was truncated by the front-end, whose session ends for it. The fault unwinds Send, Reap, Orphan, Recv
// or Recall from within, as a panic that only the caller recovers from. So wherever a device touches the pages of a frame or a posted buffer:
//
//   - locks are given up by defer, and books are kept so that a call that ended there has not begun with that frame; a device for which
//     that is not so is an Unwinder;
//   - buffers that Send was given may then be released or not, each once at most;
//   - Queue and Device go on: the next session uses them, and a fault in a frame of another session's, which Recv was about to copy,
//     ends that session and not the one that Recv was called for;
//   - goroutines of the device's own do not touch guest memory, or do it within shm.Guard and tell the Fault's Owner.
//
// System calls do not fault: they return EFAULT, which is the end of that frame alone.
package netdev

import (
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/zerocopy"
)

// Capabilities is what a device can do; it does not change while the device is open.
type Capabilities struct {
	Kind     string // the name of its sub-package: "tap", "user", ...
	Name     string // of this one: the interface, or ""
	MaxPairs int    // queue pairs, at least 1
	MTU      int    // largest IP packet in bytes, 0 when the device does not care
	// FromGuest are the offloads that Send takes: frames with others are lowered in software before (see Soft).
	FromGuest offload.Set
	// ToGuest are the offloads with which Recv can be asked to deliver frames, by SetOffloads.
	ToGuest offload.Set
	// IgnoresHeader: Send never looks at a frame's virtio-net header, so nobody needs to read or validate it.
	IgnoresHeader bool
	// ZeroCopy says how far transmission is really without a copy: "never", or a sentence for people.
	ZeroCopy string
}

// Device is a host-side attachment.
type Device interface {
	Capabilities() Capabilities
	// SetOffloads says which offloads the guest's driver takes: from now on Recv delivers no frame that needs others, except
	// through Posted.Write, which lowers them itself. accept is not limited to Capabilities.ToGuest.
	SetOffloads(accept offload.Set) error
	// SetPairs says that pairs 0 to n-1 are in use, for a device that spreads frames over its queues. 0 <= n <= MaxPairs.
	SetPairs(n int) error
	// Queue returns queue pair i.
	Queue(i int) Queue
	// Close frees the device. Every buffer that it took has been released when Close returns, but for those that a HeldError counts. No worker uses it
	// any more.
	Close() error
}

// Queue is one queue pair of a device.
type Queue interface {
	// Send takes the first n of bufs, in order, and leaves the others to the caller, who tries again when SendFD is writable. Each
	// buffer that it took is released exactly once: before Send returns, or later. A frame that cannot be sent for good is
	// taken and released as Dropped. A device that is done with the frames at once uses zerocopy.ReleaseAll.
	Send(bufs []*zerocopy.Buffer) (n int)
	// Reap looks for frames whose transmission has finished and releases them. It does not wait. A device that releases
	// from elsewhere does nothing here.
	Reap()
	// SendFD is polled for writing after Send took less than it was given; -1 when that cannot happen.
	SendFD() int
	// Recv moves up to max frames into the guest's posted buffers. It stops early when no frame is waiting (idle), or when the guest
	// has posted too little for the next one, which then waits. The error is the device's: it cannot receive any more.
	Recv(p *zerocopy.Posted, max int) (n int, idle bool, err error)
	// RecvFD is polled for reading when Recv was idle, and asked for anew each time; -1 when no frame will ever come. It stays readable for
	// as long as a frame waits, or becomes readable when one comes after an idle Recv: one that came before RecvFD was asked for counts.
	RecvFD() int
	// Counters reads the device's own counts; safe from any goroutine.
	Counters() Counters
}

// Orphaner is a Queue that keeps guests' pages inside this process. Orphan copies out what it holds and releases the pages; it is called
// from the transmitq's side when the pages are wanted back.
type Orphaner interface{ Orphan() }

// Holder is a Queue that may keep parts of a frame which Send has taken because the host had no more room: as long as Held, SendFD is polled
// for writing although every frame was taken, and Reap tries again. It is called from the transmitq's side.
type Holder interface{ Held() bool }

// Completer is a Queue whose device tells by a descriptor that frames in flight are done with. A transmitq's worker that sleeps while frames are in
// flight polls CompletionFD for reading and calls Reap when it is readable; -1 is none. Frames come back without that too, only later: the
// worker may have ended.
type Completer interface{ CompletionFD() int }

// Registrar is a Device that makes guest memory known to the kernel in advance (a UMEM, registered buffers). Such a hold outlasts what the VMM
// does to the pages: after a balloon took one away, the kernel goes on with the old page. So a device does it only when its user said
// that no page of the guest's is ever taken away, and copies, or has pages held for one frame at a time, when not.
type Registrar interface {
	// SetMemory says which memory the guest has from now on; nil is none. No worker runs. The regions stay mapped until the next SetMemory
	// has returned, which waits, up to a deadline of the device's own, until nothing refers to those that have gone. After an
	// error the device carries frames without any memory registered: the session goes on and says so.
	SetMemory(regions [][]byte) error
}

// Counters are what a device counts by itself, in frames.
type Counters struct {
	SendDropped uint64 // taken by Send and not sent: the host refused them
	RecvDropped uint64 // lost on the way to the guest inside the device
}
