package machine

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"sync"
)

// qmpConn is a QMP session. Commands run one at a time.
type qmpConn struct {
	conn    net.Conn
	mu      sync.Mutex
	replies chan qmpReply
}

type qmpReply struct {
	Event  string          `json:"event"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

// newQMPConn reads replies in the background: QEMU stops while nobody reads its events.
func newQMPConn(conn net.Conn) (*qmpConn, error) {
	c := &qmpConn{conn: conn, replies: make(chan qmpReply, 1)}
	go c.read()
	_, err := c.execute(context.Background(), "qmp_capabilities", nil)
	return c, err
}

func (c *qmpConn) close() { c.conn.Close() }

func (c *qmpConn) read() {
	defer close(c.replies)
	for r := bufio.NewReader(c.conn); ; {
		line, err := r.ReadBytes('\n')
		if err != nil {
			return
		}
		var reply qmpReply
		// What is neither a return nor an error is the greeting or an event.
		if json.Unmarshal(line, &reply) == nil && (reply.Return != nil || reply.Error != nil) {
			c.replies <- reply
		}
	}
}

func (c *qmpConn) execute(ctx context.Context, command string, args any) (json.RawMessage, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	request := map[string]any{"execute": command}
	if args != nil {
		request["arguments"] = args
	}
	line, err := json.Marshal(request)
	if err != nil {
		return nil, fmt.Errorf("qmp %s: %w", command, err)
	}
	if _, err := c.conn.Write(append(line, '\n')); err != nil {
		return nil, fmt.Errorf("qmp %s: %w", command, err)
	}
	select {
	case reply, ok := <-c.replies:
		if !ok {
			return nil, fmt.Errorf("qmp %s: %w", command, ErrGone)
		}
		if reply.Error != nil {
			return nil, fmt.Errorf("qmp %s: %s: %s", command, reply.Error.Class, reply.Error.Desc)
		}
		return reply.Return, nil
	case <-ctx.Done():
		c.conn.Close() // a late reply would answer the next command
		return nil, fmt.Errorf("qmp %s: %w", command, ctx.Err())
	}
}

// QMP runs one command of QEMU's machine protocol.
func (m *Machine) QMP(ctx context.Context, command string, args any) (json.RawMessage, error) {
	return m.qmp.execute(ctx, command, args)
}
