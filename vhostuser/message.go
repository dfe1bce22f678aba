package vhostuser

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/sys"
)

// Limits of any message.
const (
	HeaderSize = 12   // bytes
	MaxPayload = 4096 // bytes of payload
	MaxFDs     = 8    // file descriptors of one message
)

// Flags of a message header.
const (
	FlagVersion   uint32 = 1 << 0 // protocol version 1, the only one, in bits 0-1
	FlagReply     uint32 = 1 << 2 // set on every reply, and on nothing else
	FlagNeedReply uint32 = 1 << 3 // the sender waits for an ack (needs ProtocolReplyAck)

	versionMask  uint32 = 3
	reservedMask        = ^(versionMask | FlagReply | FlagNeedReply)
)

// Header is what each message starts with.
type Header struct {
	Request Request // on the back channel: a BackendRequest
	Flags   uint32  // FlagVersion and others
	Size    uint32  // bytes of payload that follow
}

// DecodeHeader reads the header from the first HeaderSize bytes of b. Bad versions, reserved flag bits and sizes above
// MaxPayload are ErrProtocol.
func DecodeHeader(b []byte) (Header, error) {
	h := Header{Request: Request(native.Uint32(b)), Flags: native.Uint32(b[4:]), Size: native.Uint32(b[8:])}
	switch {
	case h.Flags&versionMask != FlagVersion:
		return h, fmt.Errorf("%w: version %d, want %d", ErrProtocol, h.Flags&versionMask, FlagVersion)
	case h.Flags&reservedMask != 0:
		return h, fmt.Errorf("%w: flags %#x with reserved bits %#x", ErrProtocol, h.Flags, h.Flags&reservedMask)
	case h.Size > MaxPayload:
		return h, fmt.Errorf("%w: payload of %d bytes, limit %d", ErrProtocol, h.Size, MaxPayload)
	}
	return h, nil
}

// Append adds the header's HeaderSize bytes to b.
func (h Header) Append(b []byte) []byte {
	b = native.AppendUint32(b, uint32(h.Request))
	b = native.AppendUint32(b, h.Flags)
	return native.AppendUint32(b, h.Size)
}

// Message is one message with its descriptors.
type Message struct {
	Request Request // on the back channel: a BackendRequest
	Flags   uint32
	Payload []byte // at most MaxPayload bytes
	FDs     []int  // at most MaxFDs; of a received message: owned by it until TakeFDs
}

// Encode returns header and payload as they go over the socket.
func (m *Message) Encode() []byte {
	b := make([]byte, 0, HeaderSize+len(m.Payload))
	b = Header{Request: m.Request, Flags: m.Flags, Size: uint32(len(m.Payload))}.Append(b)
	return append(b, m.Payload...)
}

// TakeFDs passes the ownership of the descriptors to the caller.
func (m *Message) TakeFDs() []int {
	fds := m.FDs
	m.FDs = nil
	return fds
}

// CloseFDs closes the descriptors that nobody has taken.
func (m *Message) CloseFDs() { CloseFDs(m.TakeFDs()) }

// CloseFDs closes descriptors that came from the peer; -1 stands for none. See aside: it may take a moment for each, and no lock should be held.
func CloseFDs(fds []int) {
	for _, fd := range fds {
		switch {
		case fd < 0:
		case sys.ClosesAtOnce(fd):
			_ = unix.Close(fd)
		default:
			_ = aside(func() error { return unix.Close(fd) })
		}
	}
}

const (
	asideWait = 100 * time.Millisecond // for what is done aside
	asideMost = 64                     // closes at once, of the whole process: each has a thread
)

var asides = make(chan struct{}, asideMost)

// aside runs f, which closes something of the peer's, and waits for it no longer than asideWait. A file's server in user space is asked about a close, and a socket can
// linger for its own peer, as can those in messages that are unread when a connection is closed: whoever sent them says how long that takes. Beyond
// asideMost whoever closes waits himself, and that is who sends such things.
func aside(f func() error) error {
	select {
	case asides <- struct{}{}:
	default:
		return f()
	}
	done := make(chan error, 1)
	go func() {
		defer func() { <-asides }()
		done <- f()
	}()
	t := time.NewTimer(asideWait)
	defer t.Stop()
	select {
	case err := <-done:
		return err
	case <-t.C:
		return nil
	}
}
