package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/internal/vhosttest"
)

func TestMain(m *testing.M) { vhosttest.Main(m) }

// answer is what the fake provider of these tests reports.
type answer struct {
	Frames uint64 `json:"frames"`
	Name   string `json:"name"`
}

// serve starts a server whose "stats" counts how often it was asked.
func serve(t *testing.T) (path string, s *Server) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "ctl")
	var asked atomic.Uint64
	s, err := Listen(path, map[string]Handler{
		"stats": func(json.RawMessage) (any, error) { return answer{asked.Add(1), "vnet0"}, nil },
		"name": func(args json.RawMessage) (any, error) {
			var a answer
			err := ParseArgs(args, &a)
			return a, err
		},
		"fail": func(json.RawMessage) (any, error) { return nil, errors.New("the disk is full") },
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return path, s
}

func dial(t *testing.T, path string) *Client {
	t.Helper()
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestCall(t *testing.T) {
	path, _ := serve(t)
	c := dial(t, path)
	for i := range 3 {
		var got answer
		if err := c.Call(t.Context(), "stats", nil, &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(answer{uint64(i + 1), "vnet0"}, got); diff != "" {
			t.Errorf("call %d: -want +got\n%s", i, diff)
		}
	}
}

// TestCallArgs: what a request brings is read strictly, and need not be there.
func TestCallArgs(t *testing.T) {
	path, _ := serve(t)
	c := dial(t, path)
	var got answer
	if err := c.Call(t.Context(), "name", answer{Name: "vnet1"}, &got); err != nil || got.Name != "vnet1" {
		t.Errorf("%+v, %v", got, err)
	}
	if err := c.Call(t.Context(), "name", nil, &got); err != nil || got.Name != "" {
		t.Errorf("without args: %+v, %v", got, err)
	}
	if err := c.Call(t.Context(), "name", map[string]string{"sing": "x"}, &got); err == nil || !strings.Contains(err.Error(), `args: json: unknown field "sing"`) {
		t.Errorf("unknown field: %v", err)
	}
}

func TestCallErrorsGoOn(t *testing.T) {
	path, _ := serve(t)
	c := dial(t, path)
	for request, want := range map[string]string{
		"fail": "the disk is full",
		"sing": `unknown request "sing": this vhostd knows fail, name, stats`,
	} {
		if err := c.Call(t.Context(), request, nil, nil); err == nil || err.Error() != want {
			t.Errorf("%s: error %v, want %s", request, err, want)
		}
	}
	var got answer
	if err := c.Call(t.Context(), "stats", nil, &got); err != nil || got.Frames != 1 {
		t.Errorf("after errors: %+v, %v", got, err)
	}
}

func TestCallContext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ctl")
	l, err := net.Listen("unix", path) // listens, and never answers
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := dial(t, path)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := c.Call(ctx, "stats", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v, want the context's", err)
	}
}

func TestDialErrorsSayWhatToDo(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale")
	leaveSocket(t, stale)
	for path, want := range map[string]string{
		filepath.Join(dir, "none"): "is vhostd running",
		stale:                      "the vhostd that made it has ended",
	} {
		if _, err := Dial(t.Context(), path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want one with %q", path, err, want)
		}
	}
}

// leaveSocket makes a socket that nobody listens on, as a process that was killed leaves it.
func leaveSocket(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

func TestListenPath(t *testing.T) {
	dir := t.TempDir()
	used, _ := serve(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		used:                                  "in use by another process",
		file:                                  "not a socket",
		filepath.Join(dir, "no", "directory"): "no such file",
		filepath.Join(dir, strings.Repeat("x", 108)): "limit 107",
	} {
		if _, err := Listen(path, nil, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Listen(%s): error %v, want one with %q", path, err, want)
		}
	}
	if b, _ := os.ReadFile(file); string(b) != "keep" {
		t.Error("a file that is no socket was touched")
	}
	stale := filepath.Join(dir, "stale")
	leaveSocket(t, stale)
	s, err := Listen(stale, nil, nil)
	if err != nil {
		t.Fatalf("a stale socket is not replaced: %v", err)
	}
	info, err := os.Stat(stale)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, want 0600 (%v)", info.Mode(), err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(stale); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there after Close: %v", err)
	}
}

func TestCloseLeavesSuccessorsSocket(t *testing.T) {
	path, s := serve(t)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second, err := Listen(path, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the successor's socket was removed: %v", err)
	}
}

func TestCloseEndsConversations(t *testing.T) {
	path, s := serve(t)
	c := dial(t, path)
	if err := c.Call(t.Context(), "stats", nil, &answer{}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := c.Call(t.Context(), "stats", nil, &answer{}); err == nil {
		t.Error("a closed server answers")
	}
}

// TestHostileInputCloses sends what is no request: one error comes back, then the end.
func TestHostileInputCloses(t *testing.T) {
	path, _ := serve(t)
	for name, line := range map[string]string{
		"not JSON":      "GET / HTTP/1.1\n",
		"binary":        "\x00\xff\xfe\n",
		"empty line":    "\n",
		"array":         "[]\n",
		"no version":    `{"request":"stats"}` + "\n",
		"version 2":     `{"version":2,"request":"stats"}` + "\n",
		"version huge":  `{"version":1e400,"request":"stats"}` + "\n",
		"unknown field": `{"version":1,"request":"stats","path":"/etc"}` + "\n",
		"two objects":   `{"version":1,"request":"stats"}{"version":1,"request":"stats"}` + "\n",
		"nested":        strings.Repeat("[", MaxRequest-1) + "\n",
		"too long":      `{"version":1,"request":"` + strings.Repeat("x", MaxRequest) + `"}` + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := io.WriteString(c, line); err != nil {
				t.Fatal(err)
			}
			got := bufio.NewReader(c)
			first, err := got.ReadBytes('\n')
			if err != nil {
				t.Fatalf("no answer: %v", err)
			}
			var r Response
			if err := json.Unmarshal(first, &r); err != nil || r.Version != Version || !strings.HasPrefix(r.Error, ErrRequest.Error()) {
				t.Errorf("answer %s, want an error (%v)", first, err)
			}
			if rest, err := io.ReadAll(got); len(rest) > 0 {
				t.Errorf("%q after the error (%v)", rest, err)
			}
		})
	}
	if err := dial(t, path).Call(t.Context(), "stats", nil, &answer{}); err != nil {
		t.Errorf("a well-behaved client afterwards: %v", err)
	}
}

func TestLongestRequest(t *testing.T) {
	path, _ := serve(t)
	c := dial(t, path)
	frame := len(`{"version":1,"request":""}` + "\n")
	name := strings.Repeat("x", MaxRequest-frame)
	if err := c.Call(t.Context(), name, nil, nil); err == nil || !strings.Contains(err.Error(), "unknown request") {
		t.Errorf("a request of %d bytes: %v, want it to be understood", MaxRequest, err)
	}
}

func TestTooManyClients(t *testing.T) {
	path, _ := serve(t)
	for range MaxConns {
		if err := dial(t, path).Call(t.Context(), "stats", nil, &answer{}); err != nil {
			t.Fatal(err)
		}
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b, _ := io.ReadAll(c)
	if want := fmt.Sprintf("%d clients", MaxConns); !strings.Contains(string(b), want) {
		t.Errorf("client %d got %q, want %q in it", MaxConns+1, b, want)
	}
}

// TestAnswerOfManyPorts: what a daemon with very many ports has to say is taken.
func TestAnswerOfManyPorts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ctl")
	many := strings.Repeat("0123456789", 2_000_000)
	s, err := Listen(path, map[string]Handler{"stats": func(json.RawMessage) (any, error) { return many, nil }}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	c := dial(t, path)
	defer c.Close()
	var got string
	if err := c.Call(t.Context(), "stats", nil, &got); err != nil || got != many {
		t.Errorf("%d bytes of %d, %v", len(got), len(many), err)
	}
}

// TestClientSurvivesHostileServer: an answer without end is given up at MaxResponse.
func TestClientSurvivesHostileServer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ctl")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		for block := make([]byte, 1<<16); err == nil; {
			_, err = c.Write(block)
		}
	}()
	c := dial(t, path)
	defer c.Close()
	if err := c.Call(t.Context(), "stats", nil, nil); !errors.Is(err, bufio.ErrTooLong) {
		t.Errorf("error %v, want %v", err, bufio.ErrTooLong)
	}
}

// FuzzConverse: whatever arrives, each answer is one line of valid JSON, no more of them than lines came in, and nothing is answered
// after a line that was no request.
func FuzzConverse(f *testing.F) {
	f.Add([]byte(`{"version":1,"request":"stats"}` + "\n"))
	f.Add([]byte(`{"version":1,"request":"stats"}` + "\n" + `{"version":1,"request":"sing"}` + "\nx\n"))
	f.Add([]byte("\n\n"))
	f.Add([]byte(strings.Repeat("y", MaxRequest+1)))
	s := &Server{handlers: map[string]Handler{"stats": func(json.RawMessage) (any, error) { return answer{1, "<&>"}, nil }}}
	f.Fuzz(func(t *testing.T, input []byte) {
		var out strings.Builder
		s.converse(strings.NewReader(string(input)), &out, func() error { return nil })
		lines := strings.SplitAfter(out.String(), "\n")
		if last := lines[len(lines)-1]; last != "" {
			t.Fatalf("unfinished line %q", last)
		}
		lines = lines[:len(lines)-1]
		if in := strings.Count(string(input), "\n"); len(lines) > in+1 {
			t.Fatalf("%d answers to %d lines", len(lines), in)
		}
		for i, line := range lines {
			var r Response
			if err := json.Unmarshal([]byte(line), &r); err != nil || r.Version != Version {
				t.Fatalf("answer %q: %v", line, err)
			}
			if strings.HasPrefix(r.Error, ErrRequest.Error()) && i != len(lines)-1 {
				t.Fatalf("%d answers after %q", len(lines)-1-i, line)
			}
		}
	})
}

// TestOnlyThoseAdmitted: who is not let in is told so, before anything is asked, and the connection ends.
func TestOnlyThoseAdmitted(t *testing.T) {
	for _, ok := range []bool{true, false} {
		path := filepath.Join(t.TempDir(), "ctl")
		s, err := Listen(path, map[string]Handler{"stats": func(json.RawMessage) (any, error) { return answer{}, nil }}, func(p sys.Peer) error {
			if p.UID != os.Geteuid() || ok {
				return nil
			}
			return errors.New("not you")
		})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		err = dial(t, path).Call(t.Context(), "stats", nil, &answer{})
		if (err == nil) != ok || err != nil && !strings.Contains(err.Error(), "not you") {
			t.Errorf("admitted %v: %v", ok, err)
		}
	}
}
