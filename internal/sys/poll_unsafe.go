package sys

import (
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// PollBriefly polls descriptors for at most limit, and returns how many are ready; 0 when the time is over, or a signal came (EINTR).
//
// Go's scheduler does not learn that the thread sleeps. That is the point where a thread sleeps often and not long: of one that it knows to be in a
// system call it takes the processor (P) away after 20 us, which the thread then has to wait for when it wakes, and it looks for such threads every 20
// us with a thread of its own. Measured, that watch was half of the CPU time of a busy vhostd. The price is that P, so there must be enough
// of them, and a stop of the world waits for the signal that is sent to the thread, 100 us at most. limit is at most a few
// milliseconds: from 10 on the scheduler sends signals to a thread that seems to run.
func PollBriefly(fds []unix.PollFd, limit time.Duration) (n int, errno syscall.Errno) {
	ts := unix.NsecToTimespec(int64(limit))
	r, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(unsafe.SliceData(fds))), uintptr(len(fds)), uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), 0
}
