package netdev

// Unwinder is a Queue that cannot simply be called again after a fault of guest memory has ended one of its calls in the middle (see "Faults" in the
// package comment). It is told before any other call, by the side whose call was ended, and may be told when none of its calls was: between two of them it
// has nothing to do. Neither method touches guest memory.
type Unwinder interface {
	// SendUnwound comes after Send, Reap or Orphan. The session whose frames these were has ended: what the Queue has of them and not given to anybody
	// yet, it gives up. Buffers may be released, as Dropped, or forgotten; a buffer that was handed to another Queue is never released here.
	SendUnwound()
	// RecvUnwound comes after Recv or Recall. The frame that was on its way to the guest is not tried again if its memory can be what faulted: that
	// of another guest. Its buffer is released as Dropped.
	RecvUnwound()
}
