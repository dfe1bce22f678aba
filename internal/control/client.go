package control

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// Client asks a running vhostd. One goroutine may use it at a time.
type Client struct {
	conn  net.Conn
	lines *bufio.Scanner
}

// Dial connects to the control socket of a running vhostd.
func Dial(ctx context.Context, path string) (*Client, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("there is no control socket %s: is vhostd running, and with this --control or --socket-path? (%w)", path, err)
	case errors.Is(err, unix.ECONNREFUSED):
		return nil, fmt.Errorf("nobody listens on %s: the vhostd that made it has ended (%w)", path, err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s belongs to another user: run this command as the user who runs vhostd (%w)", path, err)
	case err != nil:
		return nil, fmt.Errorf("control socket: %w", err)
	}
	lines := bufio.NewScanner(c)
	lines.Buffer(nil, MaxResponse)
	return &Client{conn: c, lines: lines}, nil
}

// Close ends the conversation.
func (c *Client) Close() error { return c.conn.Close() }

// Call sends a request, with args unless they are nil, and decodes its result. Errors of the daemon come back as they are; after any other error the client is of no
// further use but to be closed.
func (c *Client) Call(ctx context.Context, request string, args, result any) error {
	defer context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })()
	r := Request{Version: Version, Request: request}
	if args != nil {
		b, err := json.Marshal(args)
		if err != nil {
			return err
		}
		r.Args = b
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	_, writing := c.conn.Write(append(b, '\n')) // one that fails may have been answered before it was made
	if !c.lines.Scan() {
		err := cmp.Or(writing, c.lines.Err())
		if err == nil {
			err = errors.New("vhostd hung up")
		}
		return c.explain(ctx, err)
	}
	return decode(c.lines.Bytes(), result)
}

// explain prefers the caller's reason to give up to what it looks like on the socket.
func (c *Client) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return fmt.Errorf("control socket: %w", err)
}

func decode(line []byte, result any) error {
	var r Response
	if err := json.Unmarshal(line, &r); err != nil {
		return fmt.Errorf("control socket: answer: %w", err)
	}
	if r.Version != Version {
		return fmt.Errorf("control socket: answer of version %d, this vhostd speaks version %d: use the same vhostd that runs", r.Version, Version)
	}
	if r.Error != "" {
		return errors.New(r.Error)
	}
	return json.Unmarshal(r.Result, result)
}
