// Package uring is the part of io_uring(7) that sends datagrams from the caller's pages and tells when the kernel is done with them, and
// that writes to a device many frames at a time.
//
// # Theory of operation
//
//	SendmsgZC ... Writev -> Submit (one system call) -> Next ... Next
//
// A write has one completion, which is there when Submit returns: writes are done there, in order, and one that would have to wait is refused
// with EAGAIN (those behind it are tried all the same). A kind of file that cannot tell refuses all with EOPNOTSUPP.
//
// A send has two completions: one that it was accepted or refused, which Submit leaves behind, and, where that one says More, a second
// (Notif) when nothing in the kernel refers to the pages any more. What the message header and its vector of pieces say is read by Submit; the
// memory that the pieces name belongs to the kernel until the Notif.
//
// The kernel looks up the pages of every request, unless they lie in a registered buffer (SetBuffers): these it looked up once, and holds
// until the buffer is replaced and the last request that uses it has completed. It goes on with the same pages whatever becomes of the mapping
// meanwhile, also where the file behind it got others (a hole was punched): then the bytes that are sent are old ones.
//
// The kernel posts a completion in the context of the thread that submitted: at its next system call, or at once when it sleeps
// (IORING_SETUP_COOP_TASKRUN). So whoever sleeps elsewhere can poll FD for reading, and need not be that thread.
//
// A ring takes the operations of this package and no others, for good: see restrict.
//
// A Ring is not safe for concurrent use; polling FD apart.
package uring

import (
	"errors"
	"fmt"
	"math/bits"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrOld: the kernel's io_uring lacks what is needed here, which came with Linux 6.2 and can be told from 6.3 on.
var ErrOld = errors.New("io_uring is older than Linux 6.3")

// Constants of include/uapi/linux/io_uring.h.
const (
	setupCQSize      = 1 << 3
	setupDisabled    = 1 << 6
	setupCoopTaskrun = 1 << 8
	setupTaskrunFlag = 1 << 9

	featSingleMmap = 1 << 0
	featRegRegRing = 1 << 13 // the sign of Linux 6.3

	offSQRing = 0
	offSQEs   = 0x1000_0000

	enterGetEvents = 1 << 0
	sqTaskrun      = 1 << 2 // in the submission ring's flags: completions wait for a system call

	opWritev      = 2
	opWriteFixed  = 5
	opSendmsgZC   = 48
	opWritevFixed = 61
	numOps        = 64 // that we ask about

	rwfNowait    = 8      // in sqe.op of a write
	sqeFixedFile = 1 << 0 // in sqe.flags: sqe.fd counts among the registered ones

	sendFixed       = 1 << 2 // in sqe.ioprio
	sendReportUsage = 1 << 3
	usageCopied     = 1 << 31

	registerBuffers   = 0
	unregisterBuffers = 1
	registerFiles     = 2
	unregisterFiles   = 3
	registerProbe     = 8
	registerRestrict  = 11
	registerEnable    = 12

	restrictRegister = 0 // the kinds of a restriction
	restrictOp       = 1
	restrictFlags    = 2
	opSupported      = 1 << 0 // in a probe's flags

	cqeMore  = 1 << 1
	cqeNotif = 1 << 3
)

// params is struct io_uring_params.
type params struct {
	sqEntries, cqEntries, flags, sqCPU, sqIdle, features, wqFD uint32
	_                                                          [3]uint32
	sq, cq                                                     ringOffsets
}

// ringOffsets are struct io_sqring_offsets and struct io_cqring_offsets, in bytes from the start of the mapping.
type ringOffsets struct {
	head, tail, mask, entries uint32
	a, b, c                   uint32 // sq: flags, dropped, array; cq: overflow, cqes, flags
	_                         uint32
	userAddr                  uint64
}

// sqe is struct io_uring_sqe.
type sqe struct {
	opcode, flags uint8
	ioprio        uint16
	fd            int32
	off, addr     uint64
	length, op    uint32
	data          uint64
	buffer        uint16
	_             [22]byte
}

// probe is struct io_uring_probe.
type probe struct {
	_   [2]uint8 // the last operation that the kernel knows, and how many follow
	_   [14]byte
	ops [numOps]struct {
		op, _ uint8
		flags uint16
		_     uint32
	}
}

// restriction is struct io_uring_restriction: something that is allowed.
type restriction struct {
	kind  uint16
	value uint8 // an operation, one of io_uring_register(2), or flags of an operation
	_     uint8
	_     [3]uint32
}

// MaxBuffer is the size in bytes that a registered buffer can have.
const MaxBuffer = 1 << 30

// Completion is struct io_uring_cqe.
type Completion struct {
	Data  uint64 // as given with the request
	res   int32
	flags uint32
}

// Notif reports whether the pages are free; else the request was accepted or refused.
func (c Completion) Notif() bool { return c.flags&cqeNotif != 0 }

// More reports whether a Notif follows.
func (c Completion) More() bool { return c.flags&cqeMore != 0 }

// Copied reports, of a Notif, whether the kernel copied the pages after all.
func (c Completion) Copied() bool { return uint32(c.res)&usageCopied != 0 }

// N is how many bytes were sent or written, 0 when Errno says why not.
func (c Completion) N() int {
	if c.Notif() {
		return 0
	}
	return int(max(c.res, 0))
}

// Errno is why a request was refused, or 0.
func (c Completion) Errno() syscall.Errno {
	if c.Notif() || c.res >= 0 {
		return 0
	}
	return syscall.Errno(-c.res)
}

// New returns a ring for sends requests a Submit, and room for completions completions that nobody has looked at; each at least 1. The
// error wraps the system call's, or ErrOld.
func New(sends, completions int) (*Ring, error) {
	p := params{flags: setupCQSize | setupCoopTaskrun | setupTaskrunFlag | setupDisabled, cqEntries: uint32(powerOfTwo(max(completions, sends)))}
	r := &Ring{}
	fd, err := setup(powerOfTwo(sends), &p)
	if err != nil {
		if errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("%w (%w)", ErrOld, err)
		}
		return nil, fmt.Errorf("io_uring_setup: %w", err)
	}
	r.fd = fd
	if p.features&featSingleMmap == 0 || p.features&featRegRegRing == 0 {
		return nil, errors.Join(ErrOld, r.Close())
	}
	if err := r.mmap(&p); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	if err := register(r.fd, registerProbe, &r.ops, numOps); err != nil {
		return nil, errors.Join(fmt.Errorf("asking io_uring what it can do: %w", err), r.Close())
	}
	if err := r.restrict(); err != nil {
		return nil, errors.Join(fmt.Errorf("restricting io_uring to what it is for: %w", err), r.Close())
	}
	return r, nil
}

// restrict leaves the ring no operations but those of this package, and starts it. What goes through a ring is seen by no seccomp filter: without this, whoever
// takes the process over could open files and sockets through it.
func (r *Ring) restrict() error {
	allowed := []restriction{{kind: restrictFlags, value: sqeFixedFile}}
	for _, op := range []uint8{opWritev, opWriteFixed, opSendmsgZC, opWritevFixed} {
		if r.can(int(op)) { // the kernel knows of no others
			allowed = append(allowed, restriction{kind: restrictOp, value: op})
		}
	}
	for _, op := range []uint8{registerBuffers, unregisterBuffers, registerFiles, unregisterFiles} {
		allowed = append(allowed, restriction{kind: restrictRegister, value: op})
	}
	if err := register(r.fd, registerRestrict, &allowed[0], len(allowed)); err != nil {
		return err
	}
	return register[byte](r.fd, registerEnable, nil, 0)
}

func (r *Ring) can(op int) bool { return r.ops.ops[op].flags&opSupported != 0 }

// VectoredFixed reports whether the pieces of a request can lie in a registered buffer (Linux 6.15), all of them in one.
func (r *Ring) VectoredFixed() bool { return r.can(opWritevFixed) }

func powerOfTwo(n int) int { return 1 << bits.Len(uint(n-1)) }

// FD is polled for reading while nobody calls Next: it is readable when a completion waits.
func (r *Ring) FD() int { return r.fd }

// Close frees the ring. Sends that are not complete go on, their pages safe in the kernel's hands, but nobody will hear of their end.
func (r *Ring) Close() error {
	errs := []error{r.dropFile()}
	for _, m := range [][]byte{r.rings, r.entries} {
		if m != nil {
			errs = append(errs, unix.Munmap(m))
		}
	}
	r.rings, r.entries, r.sq, r.cq = nil, nil, nil, nil
	return errors.Join(append(errs, unix.Close(r.fd))...)
}

// Queued is the number of requests that wait for Submit.
func (r *Ring) Queued() int { return int(r.tail - r.submitted) }

// Room is the number of requests that can be queued before the next Submit.
func (r *Ring) Room() int { return len(r.sq) - r.Queued() }

// Submit hands over what was queued. It does not wait for the network: a send that would have to wait is refused with EAGAIN. The error
// is the ring's, not a request's; what was not handed over is forgotten, and the number of such requests returned.
func (r *Ring) Submit() (lost int, err error) {
	r.publish()
	for r.submitted != r.tail {
		n, errno := r.enter(r.Queued())
		switch {
		case errno == 0 && n > 0:
			r.submitted += uint32(n)
		case errno == unix.EINTR:
		default:
			lost = r.forget()
			return lost, fmt.Errorf("io_uring_enter took %d of %d: %w", n, lost, errno)
		}
	}
	return 0, nil
}

// Poke has the kernel post the completions that wait for a system call of the thread that submitted, when that is the caller's.
func (r *Ring) Poke() {
	if r.pending() {
		_, _ = r.enter(0) // EINTR, EBUSY: the next one will
	}
}
