// Package sys holds the system calls that golang.org/x/sys/unix lacks, and the few that want a type around them.
package sys

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"golang.org/x/sys/unix"
)

// EventFD is an eventfd(2) counter: one side signals, the other polls the descriptor for reading and drains it. Signals that were
// not drained yet add up to one wake-up. It is non-blocking and closed on exec. Its methods are safe from any goroutine as long as none
// runs beside Close.
type EventFD struct{ fd int }

// NewEventFD returns an eventfd whose counter is 0.
func NewEventFD() (*EventFD, error) {
	fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return &EventFD{fd: fd}, nil
}

// FD is the descriptor, for poll; -1 once closed.
func (e *EventFD) FD() int { return e.fd }

// Signal makes the descriptor readable. It never blocks: a counter at its maximum is as readable as can be.
func (e *EventFD) Signal() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	for {
		_, err := unix.Write(e.fd, one[:])
		switch {
		case errors.Is(err, unix.EINTR):
		case err == nil, errors.Is(err, unix.EAGAIN):
			return
		default:
			panic(fmt.Sprintf("bug: signalling eventfd %d: %v", e.fd, err))
		}
	}
}

// Drain makes the descriptor unreadable until the next Signal, and reports whether it had been signalled.
func (e *EventFD) Drain() bool {
	var count [8]byte
	for {
		_, err := unix.Read(e.fd, count[:])
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return false
		case err == nil:
			return true
		default:
			panic(fmt.Sprintf("bug: draining eventfd %d: %v", e.fd, err))
		}
	}
}

// Block fills the counter, so that the descriptor cannot be written until the next Drain: the other side of Signal, for somebody who
// polls it for writing. No Signal may come meanwhile.
func (e *EventFD) Block() {
	var full [8]byte
	binary.NativeEndian.PutUint64(full[:], math.MaxUint64-1)
	for {
		_, err := unix.Write(e.fd, full[:])
		switch {
		case err == nil:
			return
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN): // not empty: it is full already, or will be
			e.Drain()
		default:
			panic(fmt.Sprintf("bug: blocking eventfd %d: %v", e.fd, err))
		}
	}
}

// Close frees the descriptor. A second Close does nothing.
func (e *EventFD) Close() error {
	if e.fd < 0 {
		return nil
	}
	fd := e.fd
	e.fd = -1
	return unix.Close(fd)
}
