package vhostuser

import (
	"errors"
	"fmt"
)

var (
	// ErrProtocol is the peer's fault: a message that the protocol does not allow.
	ErrProtocol = errors.New("vhost-user protocol violation")

	// ErrClose makes Serve close the session instead of refusing one request. See Fatal.
	ErrClose = errors.New("session closed")

	// ErrNotNegotiated is returned to a sender whose message needs a protocol feature that is not there.
	ErrNotNegotiated = errors.New("protocol feature not negotiated")
)

// Fatal wraps an error of a Handler so that Serve closes the session, even where the front-end asked for an ack: for
// states in which serving further requests would be wrong. errors.Is(Fatal(err), ErrClose) is true.
func Fatal(err error) error { return &fatalError{err} }

type fatalError struct{ err error }

func (e *fatalError) Error() string        { return e.err.Error() }
func (e *fatalError) Unwrap() error        { return e.err }
func (e *fatalError) Is(target error) bool { return target == ErrClose }

// RequestError says which request failed, at either end.
type RequestError struct {
	Request Request
	Err     error
}

func (e *RequestError) Error() string { return fmt.Sprintf("vhost-user %v: %v", e.Request, e.Err) }
func (e *RequestError) Unwrap() error { return e.Err }

// NACKError is a front-end's view of a refused request: the ack was not zero.
type NACKError struct {
	Value uint64 // as received
}

func (e *NACKError) Error() string { return fmt.Sprintf("refused by the back-end: ack %d", e.Value) }
