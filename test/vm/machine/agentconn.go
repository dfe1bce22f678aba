package machine

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"

	"github.com/vhostd/vhostd/test/vm/rpc"
)

// ErrGone is returned for a request whose guest rebooted or ended before it answered.
var ErrGone = errors.New("the guest went away")

// agentConn is the host's end of the line to the agent. It outlives reboots.
type agentConn struct {
	conn net.Conn
	done chan struct{}

	mu      sync.Mutex
	nextID  uint64
	pending map[uint64]chan rpc.Response
	hellos  []rpc.Hello
	changed chan struct{} // closed and replaced at each hello
}

func newAgentConn(conn net.Conn) *agentConn {
	c := &agentConn{conn: conn, done: make(chan struct{}), pending: map[uint64]chan rpc.Response{}, changed: make(chan struct{})}
	go c.read()
	return c
}

func (c *agentConn) close() {
	c.conn.Close()
	<-c.done
}

// read hands responses to those who wait for them, until the connection ends.
func (c *agentConn) read() {
	defer close(c.done)
	r := bufio.NewReader(c.conn)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			c.dropPending()
			return
		}
		var resp rpc.Response
		if json.Unmarshal([]byte(strings.TrimSpace(line)), &resp) == nil {
			c.dispatch(resp)
		} // else the rest of a line that a reboot cut
	}
}

func (c *agentConn) dispatch(resp rpc.Response) {
	if resp.Hello != nil {
		c.dropPending()
		c.mu.Lock()
		c.hellos = append(c.hellos, *resp.Hello)
		close(c.changed)
		c.changed = make(chan struct{})
		c.mu.Unlock()
		return
	}
	c.mu.Lock()
	ch := c.pending[resp.ID]
	delete(c.pending, resp.ID)
	c.mu.Unlock()
	if ch != nil {
		ch <- resp
	}
}

// dropPending ends every request that can no longer be answered.
func (c *agentConn) dropPending() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, ch := range c.pending {
		close(ch)
		delete(c.pending, id)
	}
}

func (c *agentConn) waitHello(ctx context.Context, n int, exited <-chan struct{}) (rpc.Hello, error) {
	for {
		c.mu.Lock()
		hellos, changed := c.hellos, c.changed
		c.mu.Unlock()
		if len(hellos) >= n {
			return hellos[n-1], nil
		}
		select {
		case <-changed:
		case <-exited:
			return rpc.Hello{}, errors.New("QEMU has ended")
		case <-ctx.Done():
			return rpc.Hello{}, ctx.Err()
		}
	}
}

// call sends one request and waits for its response. A nil result drops what comes.
func (c *agentConn) call(ctx context.Context, op string, args, result any) error {
	raw, err := json.Marshal(args)
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	ch, err := c.send(rpc.Request{Op: op, Args: raw})
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	select {
	case resp, ok := <-ch:
		if !ok {
			return fmt.Errorf("%s: %w", op, ErrGone)
		}
		if resp.Error != "" {
			return errors.New("guest: " + resp.Error)
		}
		if result == nil {
			return nil
		}
		return json.Unmarshal(resp.Result, result)
	case <-c.done:
		return fmt.Errorf("%s: %w", op, ErrGone)
	case <-ctx.Done():
		return fmt.Errorf("%s: no answer from the guest: %w", op, ctx.Err())
	}
}

func (c *agentConn) send(q rpc.Request) (chan rpc.Response, error) {
	ch := make(chan rpc.Response, 1)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nextID++
	q.ID = c.nextID
	line, err := json.Marshal(q)
	if err != nil {
		return nil, err
	}
	c.pending[q.ID] = ch
	if _, err := c.conn.Write(append(line, '\n')); err != nil {
		delete(c.pending, q.ID)
		return nil, err
	}
	return ch, nil
}
