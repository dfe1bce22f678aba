package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// Options of a session.
type Options struct {
	// MaxVrings is the number of virtqueues that the device has, 1 to 256: vring indices are below it.
	MaxVrings int

	// Pause, if not nil, is called before the Handler for each request whose row says that queues must stand still;
	// the function that it returns, if not nil, is called afterwards. index is the vring's for PauseVring, -1 for
	// PauseAll.
	Pause func(scope Pause, index int) (resume func())

	// Pace is the budget of messages; nil is one of the default rate for this session alone.
	Pace *Pace

	// Refused, if not nil, is told each request that was refused while the session went on.
	Refused func(err error)
}

// Serve is the back-end role: it reads requests from the connection and has the Handler serve them, until the
// connection ends. It always closes the connection, and every descriptor that the Handler was not passed.
//
// It returns nil when the front-end hung up between two requests, the context's error when the context was cancelled,
// and else what ended the session: ErrProtocol for faults of the front-end, net.ErrClosed after Conn.Close.
func Serve(ctx context.Context, c *Conn, h Handler, opts Options) error {
	if opts.MaxVrings < 1 || opts.MaxVrings > 256 {
		panic(fmt.Sprintf("bug: vhostuser.Options.MaxVrings %d, want 1 to 256", opts.MaxVrings))
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if opts.Pace == nil {
		opts.Pace = NewPace(0)
	}
	s := &session{conn: c, handler: h, opts: opts}
	err := s.run()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) { // reset: it left replies unread
		return nil
	}
	return err
}

// session is what the wire layer knows of one connection.
type session struct {
	conn     *Conn
	handler  Handler
	opts     Options
	owned    bool             // SET_OWNER was seen
	protocol ProtocolFeatures // acked
}

func (s *session) run() error {
	for {
		m, err := s.conn.ReadMessage()
		if err != nil {
			return err
		}
		if err := s.serve(m); err != nil {
			return err
		}
		s.rest(m.Request)
	}
}

// serve handles one request and answers it. An error ends the session.
func (s *session) serve(m *Message) error {
	defer m.CloseFDs() // those that the Handler was not passed
	if m.Flags&FlagReply != 0 {
		return &RequestError{m.Request, fmt.Errorf("%w: reply flag on a request", ErrProtocol)}
	}
	acked := s.wantsAck(m)
	row, known := frontEndTable[m.Request]
	if !known {
		return s.refuse(m, row, acked, fmt.Errorf("%w: not served", ErrProtocol))
	}
	if err := row.check(m); err != nil {
		return &RequestError{m.Request, err}
	}
	reply, err := s.dispatch(m, row)
	acked = acked || s.wantsAck(m) // SET_PROTOCOL_FEATURES may ask by the old features or by the new
	switch {
	case err != nil:
		return s.refuse(m, row, acked, err)
	case row.reply != noPayload:
		return s.reply(m, reply)
	case acked:
		return s.reply(m, encodeU64(0))
	}
	return nil
}

// dispatch calls the Handler if the request is legal now, with its queues paused.
func (s *session) dispatch(m *Message, row row) ([]byte, error) {
	if err := s.legal(m.Request, row); err != nil {
		return nil, err
	}
	index, err := s.index(m, row)
	if err != nil {
		return nil, err
	}
	if s.opts.Pause != nil && row.pause != PauseNone {
		if resume := s.opts.Pause(row.pause, index); resume != nil {
			defer resume()
		}
	}
	return dispatchTable[m.Request](s, m, index)
}

// legal verifies the protocol feature that the request depends on.
func (s *session) legal(req Request, row row) error {
	if req == ReqGetProtocolFeatures || req == ReqSetProtocolFeatures {
		if s.handler.GetFeatures()&FProtocolFeatures == 0 {
			return fmt.Errorf("%w: feature bit 30 was not offered", ErrProtocol)
		}
	}
	have := s.protocol
	if !row.negotiated {
		have = s.handler.GetProtocolFeatures()
	}
	if row.needs&^have != 0 {
		return fmt.Errorf("%w: needs protocol feature %v", ErrProtocol, row.needs)
	}
	return nil
}

// index returns the vring that the request is about, -1 if it is about none. It never shortens the number that was
// sent, and refuses reserved bits.
func (s *session) index(m *Message, row row) (int, error) {
	var index uint64
	switch row.payload {
	case vringState, vringAddr:
		index = uint64(native.Uint32(m.Payload))
	case vringFD:
		v := native.Uint64(m.Payload)
		if reserved := v &^ (vringIndexMask | vringNoFD); reserved != 0 {
			return 0, fmt.Errorf("%w: reserved bits %#x in %#x", ErrProtocol, reserved, v)
		}
		index = v & vringIndexMask
	default:
		return -1, nil
	}
	if index >= uint64(s.opts.MaxVrings) {
		return 0, fmt.Errorf("%w: vring %d, device has %d", ErrProtocol, index, s.opts.MaxVrings)
	}
	return int(index), nil
}

// wantsAck tells whether the front-end waits for an ack.
func (s *session) wantsAck(m *Message) bool {
	return m.Flags&FlagNeedReply != 0 && s.protocol&ProtocolReplyAck != 0
}

// refuse answers a request that failed in the mildest way that leaves no front-end waiting or misled.
func (s *session) refuse(m *Message, row row, acked bool, err error) error {
	err = &RequestError{m.Request, err}
	var answer []byte
	switch {
	case errors.Is(err, ErrClose):
		return err
	case m.Request == ReqGetConfig && s.protocol&ProtocolConfig != 0:
		answer = nil // an empty payload is this request's way to say error
	case row.reply == noPayload && acked:
		answer = encodeU64(1)
	default:
		return err
	}
	if s.opts.Refused != nil {
		s.opts.Refused(err)
	}
	return s.reply(m, answer)
}

func (s *session) reply(m *Message, payload []byte) error {
	err := s.conn.WriteMessage(&Message{Request: m.Request, Flags: FlagVersion | FlagReply, Payload: payload})
	if err != nil {
		return &RequestError{m.Request, fmt.Errorf("reply: %w", err)}
	}
	return nil
}
