package machine

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/vhostd/vhostd/test/vm/rpc"
)

// guestEnd plays the agent.
type guestEnd struct {
	t    *testing.T
	conn net.Conn
	r    *bufio.Reader
}

func newPair(t *testing.T) (*agentConn, *guestEnd) {
	host, guest := net.Pipe()
	c := newAgentConn(host)
	t.Cleanup(func() { guest.Close(); c.close() })
	return c, &guestEnd{t, guest, bufio.NewReader(guest)}
}

func (g *guestEnd) request() (q rpc.Request) {
	line, err := g.r.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &q)
	}
	if err != nil {
		g.t.Error(err)
	}
	return q
}

func (g *guestEnd) write(format string, args ...any) {
	if _, err := fmt.Fprintf(g.conn, format, args...); err != nil {
		g.t.Error(err)
	}
}

func TestCallAnsweredInAnyOrder(t *testing.T) {
	c, g := newPair(t)
	got := make(chan string, 2)
	for _, path := range []string{"a", "b"} {
		go func() {
			var r rpc.FileResult
			if err := c.call(t.Context(), rpc.OpRead, rpc.FileArgs{Path: path}, &r); err != nil {
				t.Error(err)
			}
			got <- path + r.Data
		}()
	}
	first, second := g.request(), g.request()
	for _, q := range []rpc.Request{second, first} {
		var a rpc.FileArgs
		if err := json.Unmarshal(q.Args, &a); err != nil {
			t.Error(err)
		}
		g.write(`{"id":%d,"result":{"data":"%s"}}`+"\n", q.ID, a.Path)
	}
	for range 2 {
		if s := <-got; s != "aa" && s != "bb" {
			t.Errorf("answer of another request: %q", s)
		}
	}
}

func TestCallError(t *testing.T) {
	c, g := newPair(t)
	go func() { g.write(`{"id":%d,"error":"ping: no route"}`+"\n", g.request().ID) }()
	if err := c.call(t.Context(), rpc.OpPing, rpc.PingArgs{}, nil); err == nil || err.Error() != "guest: ping: no route" {
		t.Errorf("call = %v", err)
	}
}

// TestRebootDropsPending: what the guest had not answered when it went away never will be, even if the channel still
// holds the beginning of a line.
func TestRebootDropsPending(t *testing.T) {
	c, g := newPair(t)
	go func() {
		g.request()
		g.write(`{"id":1,"resu`)
		g.write("\n" + `{"hello":{"kernel":"6.1"}}` + "\n")
	}()
	if err := c.call(t.Context(), rpc.OpRead, rpc.FileArgs{}, nil); !errors.Is(err, ErrGone) {
		t.Errorf("call = %v, want ErrGone", err)
	}
	h, err := c.waitHello(t.Context(), 1, nil)
	if err != nil || h.Kernel != "6.1" {
		t.Errorf("waitHello = %+v, %v", h, err)
	}
}

func TestWaitHelloEndsWithQEMU(t *testing.T) {
	c, _ := newPair(t)
	exited := make(chan struct{})
	close(exited)
	if _, err := c.waitHello(t.Context(), 1, exited); err == nil {
		t.Error("no error although QEMU has ended")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := c.waitHello(ctx, 1, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waitHello = %v, want the deadline", err)
	}
}
