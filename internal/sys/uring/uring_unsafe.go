package uring

import (
	"fmt"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Ring is an io_uring. The words in shared memory belong to:
//
//	sqTail, cqHead  written here, read by the kernel
//	sqFlags, cqTail written by the kernel, read here
type Ring struct {
	fd             int
	rings, entries []byte // the mappings

	sqTail, sqFlags *uint32
	cqHead, cqTail  *uint32
	sq              []sqe
	cq              []Completion

	tail, submitted uint32 // of the submission ring: queued up to tail, handed over up to submitted
	head            uint32 // of the completion ring

	ops     probe
	buffers bool // some are registered
	file    bool // one is registered
}

func setup(entries int, p *params) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(unsafe.Pointer(p)), 0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// mmap maps the rings (IORING_FEAT_SINGLE_MMAP: both in one mapping) and the submission entries.
func (r *Ring) mmap(p *params) (err error) {
	const word, cqeSize, sqeSize = 4, int(unsafe.Sizeof(Completion{})), int(unsafe.Sizeof(sqe{}))
	size := max(int(p.cq.b)+int(p.cqEntries)*cqeSize, int(p.sq.c)+int(p.sqEntries)*word)
	const prot, flags = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	if r.rings, err = unix.Mmap(r.fd, offSQRing, size, prot, flags); err != nil {
		return fmt.Errorf("mapping the io_uring, %d bytes: %w", size, err)
	}
	if r.entries, err = unix.Mmap(r.fd, offSQEs, int(p.sqEntries)*sqeSize, prot, flags); err != nil {
		return fmt.Errorf("mapping %d entries of the io_uring: %w", p.sqEntries, err)
	}
	at := func(off uint32) unsafe.Pointer { return unsafe.Pointer(&r.rings[off]) }
	r.sqTail, r.sqFlags = (*uint32)(at(p.sq.tail)), (*uint32)(at(p.sq.a))
	r.cqHead, r.cqTail = (*uint32)(at(p.cq.head)), (*uint32)(at(p.cq.tail))
	r.sq = unsafe.Slice((*sqe)(unsafe.Pointer(&r.entries[0])), p.sqEntries)
	r.cq = unsafe.Slice((*Completion)(at(p.cq.b)), p.cqEntries)
	// Entry i of the ring is always submission entry i.
	for i, array := uint32(0), unsafe.Slice((*uint32)(at(p.sq.c)), p.sqEntries); i < p.sqEntries; i++ {
		array[i] = i
	}
	return nil
}

// SendmsgZC queues a datagram to be sent from its pages. m and the vector that it points at have to stay until Submit, the pieces until the Notif
// with data. It reports false when Submit has to come first.
func (r *Ring) SendmsgZC(fd int, m *unix.Msghdr, data uint64) bool {
	return r.queue(sqe{
		opcode: opSendmsgZC, ioprio: sendReportUsage, fd: int32(fd), addr: uint64(uintptr(unsafe.Pointer(m))), length: 1,
		op: unix.MSG_DONTWAIT | unix.MSG_NOSIGNAL, data: data,
	})
}

// SendmsgZCFixed is SendmsgZC of pieces that lie in a registered buffer, all in the same. It wants VectoredFixed.
func (r *Ring) SendmsgZCFixed(fd int, m *unix.Msghdr, buffer int, data uint64) bool {
	return r.queue(sqe{
		opcode: opSendmsgZC, ioprio: sendReportUsage | sendFixed, fd: int32(fd), addr: uint64(uintptr(unsafe.Pointer(m))), length: 1,
		op: unix.MSG_DONTWAIT | unix.MSG_NOSIGNAL, data: data, buffer: uint16(buffer),
	})
}

// Writev queues a write of the pieces of v, at least one, as one frame. v has to stay until Submit, the pieces until the Completion with data. It
// reports false when Submit has to come first.
func (r *Ring) Writev(fd int, v []unix.Iovec, data uint64) bool {
	return r.queue(sqe{opcode: opWritev, fd: int32(fd), addr: uint64(uintptr(unsafe.Pointer(&v[0]))), length: uint32(len(v)), op: rwfNowait, data: data})
}

// WritevFixed is Writev of pieces that lie in a registered buffer, all in the same. It wants VectoredFixed.
func (r *Ring) WritevFixed(fd int, v []unix.Iovec, buffer int, data uint64) bool {
	return r.queue(sqe{
		opcode: opWritevFixed, fd: int32(fd), addr: uint64(uintptr(unsafe.Pointer(&v[0]))), length: uint32(len(v)), op: rwfNowait, data: data, buffer: uint16(buffer),
	})
}

// WriteFixed is Writev of one piece, which lies in a registered buffer.
func (r *Ring) WriteFixed(fd int, b []byte, buffer int, data uint64) bool {
	return r.queue(sqe{
		opcode: opWriteFixed, fd: int32(fd), addr: uint64(uintptr(unsafe.Pointer(&b[0]))), length: uint32(len(b)), op: rwfNowait, data: data, buffer: uint16(buffer),
	})
}

func (r *Ring) queue(e sqe) bool {
	if r.Room() == 0 {
		return false
	}
	r.sq[r.tail&uint32(len(r.sq)-1)] = e
	r.tail++
	return true
}

// SetBuffers registers bufs, each at most MaxBuffer bytes of memory without holes, in the place of all that were; nil is none. Requests in
// flight go on with theirs, for which kernels before 6.13 wait here. Registering pins the memory, which counts for RLIMIT_MEMLOCK without CAP_IPC_LOCK.
// After an error none is registered.
func (r *Ring) SetBuffers(bufs [][]byte) error {
	if r.buffers {
		r.buffers = false
		if err := register[byte](r.fd, unregisterBuffers, nil, 0); err != nil {
			return fmt.Errorf("unregistering buffers: %w", err)
		}
	}
	if len(bufs) == 0 {
		return nil
	}
	v := make([]unix.Iovec, len(bufs))
	for i, b := range bufs {
		v[i] = unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))}
	}
	if err := register(r.fd, registerBuffers, &v[0], len(v)); err != nil {
		return fmt.Errorf("registering %d buffers: %w", len(v), err)
	}
	r.buffers = true
	return nil
}

func register[T any](fd, op int, arg *T, n int) error {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(fd), uintptr(op), uintptr(unsafe.Pointer(arg)), uintptr(n), 0, 0)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}

func (r *Ring) publish() { atomic.StoreUint32(r.sqTail, r.tail) }

// forget takes back what the kernel has not consumed.
func (r *Ring) forget() int {
	n := r.Queued()
	r.tail = r.submitted
	r.publish()
	return n
}

// enter submits, and has completions posted that wait for it. It never waits, so Go's scheduler need not hear of it: its monitor would take the processor from a batch that lasts, each time.
func (r *Ring) enter(submit int) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(submit), 0, enterGetEvents, 0, 0)
	return int(n), errno
}

func (r *Ring) pending() bool { return atomic.LoadUint32(r.sqFlags)&sqTaskrun != 0 }

// Next takes the next completion, if there is one.
func (r *Ring) Next() (Completion, bool) {
	if r.head == atomic.LoadUint32(r.cqTail) {
		return Completion{}, false
	}
	c := r.cq[r.head&uint32(len(r.cq)-1)]
	r.head++
	atomic.StoreUint32(r.cqHead, r.head)
	return c, true
}
