// Package control is how a running vhostd is asked about itself: a UNIX socket beside the vhost-user one, and a client.
//
// # Theory of operation
//
// The client sends one JSON object per line and gets one JSON object per line back, for as long as it likes:
//
//	-> {"version":1,"request":"stats"}
//	<- {"version":1,"result":{...}}
//	-> {"version":1,"request":"stats","args":{"port":"vm1"}}
//	<- {"version":1,"result":{...}}
//	-> {"version":1,"request":"sing"}
//	<- {"version":1,"error":"unknown request \"sing\": this vhostd knows stats"}
//
// Nothing of a guest's traffic passes here, and nothing that is asked here can hold up a worker: handlers read counters, or open and close what
// no worker has in its hands.
//
// # Who is to blame, and what happens
//
// The socket belongs to the user who started vhostd (mode 0600), so whoever speaks here may kill the daemon anyway. It must not be
// hurt by accident all the same: a line that is no request (too long, not JSON, unknown fields, another version) is answered with
// an error and the connection is closed, since what follows cannot be trusted. A request that is well-formed but unknown, or whose
// handler fails, is answered with an error and the connection goes on.
//
// # Limits
//
// A request has at most MaxRequest bytes, newline included, and must be there within RequestTimeout of the last answer; an answer
// is written within WriteTimeout. At most MaxConns clients are served; a further one is told so and closed.
package control

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// Version is the version of the conversation. It changes when an old client would misread an answer; new requests and new fields
// of answers leave it as it is.
const Version = 1

// Limits of the conversation.
const (
	MaxRequest     = 4096             // bytes of a request, newline included
	MaxResponse    = 64 << 20         // bytes of a response that a client takes, newline included: 200 for each of 128 queues of 2000 ports, and some
	MaxConns       = 16               // clients at a time
	RequestTimeout = 60 * time.Second // from the last answer to the end of the next request
	WriteTimeout   = 5 * time.Second  // to write one answer
)

// ErrRequest is the client's fault: a line that is not a request. The connection is closed after it.
var ErrRequest = errors.New("not a request")

// Request is one line from a client.
type Request struct {
	Version int             `json:"version"`        // Version
	Request string          `json:"request"`        // what is asked for: a name that the server has a Handler for
	Args    json.RawMessage `json:"args,omitempty"` // an object, for requests that take one
}

// Response is one line from the server: a result or an error.
type Response struct {
	Version int             `json:"version"`
	Result  json.RawMessage `json:"result,omitempty"`
	Error   string          `json:"error,omitempty"`
}

// Handler answers a request with a value that encoding/json can encode. It may be called from several goroutines. args is for ParseArgs.
type Handler func(args json.RawMessage) (any, error)

// ParseArgs decodes what a request brought with it into a struct; nothing leaves it as it is. An unknown field is an error: whoever sent it
// meant something by it.
func ParseArgs(args json.RawMessage, to any) error {
	if len(args) == 0 {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(args))
	d.DisallowUnknownFields()
	if err := d.Decode(to); err != nil {
		return fmt.Errorf("args: %w", err)
	}
	return nil
}

// parseRequest decodes a line.
func parseRequest(line []byte) (Request, error) {
	var r Request
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return r, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	if _, err := d.Token(); err != io.EOF {
		return r, fmt.Errorf("%w: more than one object on the line", ErrRequest)
	}
	if r.Version != Version {
		return r, fmt.Errorf("%w: version %d, this vhostd speaks version %d", ErrRequest, r.Version, Version)
	}
	return r, nil
}
