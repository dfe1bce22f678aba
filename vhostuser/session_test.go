package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// startFrontEnd connects a FrontEnd to a session and negotiates all that the recorder offers.
func startFrontEnd(t *testing.T, h Handler, opts serveOptions) (*FrontEnd, *peer) {
	t.Helper()
	p := startServe(t, h, opts)
	p.sock.SetDeadline(time.Time{})
	f := NewFrontEnd(NewConn(p.sock, ConnOptions{}))
	f.ReplyTimeout = patience
	if err := f.SetProtocolFeatures(testProtocol); err != nil {
		t.Fatal(err)
	}
	if _, err := f.GetFeatures(); err != nil { // served by now
		t.Fatal(err)
	}
	return f, p
}

// TestRoundTrip sends every request from a FrontEnd to a session, acked and not.
func TestRoundTrip(t *testing.T) {
	for _, needReply := range []bool{true, false} {
		t.Run(fmt.Sprintf("need_reply=%t", needReply), func(t *testing.T) {
			checkFDs(t)
			h := newRecorder()
			f, p := startFrontEnd(t, h, serveOptions{})
			f.NeedReply = needReply
			t.Cleanup(h.closeBack)
			want := []string{"SetProtocolFeatures(0x1a63d)"}
			for _, g := range goldens {
				result, err := g.send(f, someFDs(t, g.fds))
				if err != nil {
					t.Fatalf("%s: %v", g.name, err)
				}
				if diff := cmp.Diff(g.result, result); diff != "" {
					t.Errorf("%s: result (-want +got):\n%s", g.name, diff)
				}
				if g.call != "" {
					want = append(want, g.call)
				}
			}
			if _, err := f.GetFeatures(); err != nil { // all served
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, h.all()); diff != "" {
				t.Errorf("calls (-want +got):\n%s", diff)
			}
			f.Close()
			if err := <-p.result; err != nil {
				t.Errorf("session ended with %v, want nil after a hang-up", err)
			}
		})
	}
}

func TestHandlerErrorIsRefused(t *testing.T) {
	checkFDs(t)
	h := newRecorder()
	refused := make(chan error, 8)
	f, p := startFrontEnd(t, h, serveOptions{Options: Options{Refused: func(err error) { refused <- err }}})
	full := errors.New("no memory")
	h.failWith(full)
	err := f.SetMemTable([]MemoryRegion{goldenRegion}, someFDs(t, 1))
	if nack := (*NACKError)(nil); !errors.As(err, &nack) || nack.Value == 0 {
		t.Errorf("SetMemTable: %v, want a NACKError", err)
	}
	if _, err := f.GetConfig(0, 6); err == nil {
		t.Error("GetConfig: no error")
	}
	if len(refused) != 2 || !errors.Is(<-refused, full) || !errors.Is(<-refused, full) {
		t.Error("not told of both refusals")
	}
	if _, err := f.GetFeatures(); err != nil {
		t.Errorf("the session did not go on: %v", err)
	}
	f.NeedReply = false
	f.SetVringNum(0, 3)
	if err := <-p.result; !errors.Is(err, full) {
		t.Errorf("session ended with %v, want %v", err, full)
	}
}

func TestGetConfigErrorIsEmptyReply(t *testing.T) {
	h := newRecorder()
	p := startServe(t, h, serveOptions{})
	p.negotiate()
	p.wantAlive()
	h.failWith(errors.New("no configuration"))
	p.message(ReqGetConfig, FlagVersion, DeviceConfig{Data: make([]byte, 6)}.encode())
	if got, want := p.receive(HeaderSize), raw(t, "18000000 05000000 00000000"); string(got) != string(want) {
		t.Errorf("reply % x, want % x", got, want)
	}
	p.wantAlive()
}

func TestFatalCloses(t *testing.T) {
	cause := errors.New("mapping lost")
	for _, request := range []Request{ReqSetOwner, ReqResetDevice, ReqGetConfig} {
		t.Run(request.String(), func(t *testing.T) {
			h := newRecorder()
			p := startServe(t, h, serveOptions{})
			p.negotiate()
			p.wantAlive()
			h.failWith(Fatal(cause))
			var payload []byte
			if request == ReqGetConfig {
				payload = DeviceConfig{}.encode()
			}
			p.message(request, needReply, payload)
			p.wantClosed(cause)
		})
	}
	if !errors.Is(Fatal(cause), ErrClose) || !errors.Is(fmt.Errorf("x: %w", ErrClose), ErrClose) {
		t.Error("Fatal is not ErrClose")
	}
}

// TestNoAckUnlessNegotiated: need_reply means nothing before REPLY_ACK is acked; the request that acks it may use it.
func TestNoAckUnlessNegotiated(t *testing.T) {
	p := startServe(t, newRecorder(), serveOptions{})
	p.message(ReqSetOwner, needReply, nil)
	p.wantAlive() // no ack before this reply
	p.message(ReqSetProtocolFeatures, needReply, encodeU64(uint64(testProtocol)))
	p.wantU64(ReqSetProtocolFeatures, 0)
	p.message(ReqSetVringNum, needReply, VringState{0, 256}.encode())
	p.wantU64(ReqSetVringNum, 0)
	p.message(ReqSetProtocolFeatures, needReply, encodeU64(0)) // its last ack
	p.wantU64(ReqSetProtocolFeatures, 0)
	p.message(ReqSetVringNum, needReply, VringState{0, 256}.encode())
	p.wantAlive()
}

func TestValueLimits(t *testing.T) {
	p := startServe(t, newRecorder(), serveOptions{})
	p.negotiate()
	for _, test := range []struct {
		request Request
		payload []byte
		want    uint64
	}{
		{ReqNetSetMTU, encodeU64(0xffff), 0}, {ReqNetSetMTU, encodeU64(0x10000), 1}, {ReqNetSetMTU, encodeU64(1<<32 + 1500), 1},
		{ReqSetStatus, encodeU64(0xff), 0}, {ReqSetStatus, encodeU64(0x100), 1},
		{ReqSetVringAddr, VringAddr{Flags: 1}.encode(), 0}, {ReqSetVringAddr, VringAddr{Flags: 2}.encode(), 1},
	} {
		p.message(test.request, needReply, test.payload)
		p.wantU64(test.request, test.want)
	}
}

func TestPause(t *testing.T) {
	var mu sync.Mutex
	var events []string
	note := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		events = append(events, fmt.Sprintf(format, args...))
	}
	h := newRecorder()
	pause := func(scope Pause, index int) func() {
		note("pause %d %d after %q", scope, index, h.last())
		return func() { note("resume after %q", h.last()) }
	}
	f, p := startFrontEnd(t, h, serveOptions{Options: Options{Pause: pause}})
	f.SetVringNum(2, 64)
	f.SendRARP([6]byte{})
	f.ResetDevice()
	f.Close()
	<-p.result
	mu.Lock()
	defer mu.Unlock()
	want := []string{
		`pause 1 2 after "SetProtocolFeatures(0x1a63d)"`, `resume after "SetVringNum(2, 64)"`,
		`pause 2 -1 after "SendRARP(00 00 00 00 00 00)"`, `resume after "ResetDevice()"`,
	}
	if diff := cmp.Diff(want, events); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if ReqSetMemTable.Pauses() != PauseAll || ReqGetFeatures.Pauses() != PauseNone {
		t.Error("Pauses")
	}
}

func TestServeCancelled(t *testing.T) {
	checkFDs(t)
	front, back := socketPair(t)
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error)
	go func() { result <- Serve(ctx, NewConn(back, ConnOptions{}), newRecorder(), Options{MaxVrings: 2}) }()
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("Serve: %v, want context.Canceled", err)
	}
	front.SetDeadline(time.Now().Add(patience))
	if _, err := front.Read(make([]byte, 1)); !isHangUp(err) {
		t.Errorf("read: %v, want the end of the connection", err)
	}
}

func TestConnClose(t *testing.T) {
	_, back := socketPair(t)
	c := NewConn(back, ConnOptions{})
	result := make(chan error)
	go func() {
		_, err := c.ReadMessage()
		result <- err
	}()
	c.Close()
	c.Close()
	if err := <-result; !errors.Is(err, net.ErrClosed) {
		t.Errorf("ReadMessage: %v, want net.ErrClosed", err)
	}
	<-c.Closed()
	if !c.HungUp() {
		t.Error("HungUp is false after Close")
	}
	if err := c.WriteMessage(&Message{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("WriteMessage: %v, want net.ErrClosed", err)
	}
}

// TestFrontEndBadReplies: a reply that is not the request's is an error, and ends the connection.
func TestFrontEndBadReplies(t *testing.T) {
	for name, digits := range map[string]string{
		"another request": "02000000 05000000 08000000 | 0000000000000000",
		"no reply flag":   "01000000 01000000 08000000 | 0000000000000000",
		"need_reply":      "01000000 0d000000 08000000 | 0000000000000000",
		"short":           "01000000 05000000 04000000 | 00000000",
		"empty":           "01000000 05000000 00000000",
		"version":         "01000000 06000000 08000000 | 0000000000000000",
	} {
		t.Run(name, func(t *testing.T) {
			front, back := socketPair(t)
			f := NewFrontEnd(NewConn(front, ConnOptions{}))
			back.Write(raw(t, digits))
			if v, err := f.GetFeatures(); !errors.Is(err, ErrProtocol) {
				t.Errorf("%#x, %v; want ErrProtocol", v, err)
			}
			if _, err := f.GetFeatures(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("afterwards: %v, want net.ErrClosed", err)
			}
		})
	}
}

func TestFrontEndReplyTimeout(t *testing.T) {
	front, _ := socketPair(t)
	f := NewFrontEnd(NewConn(front, ConnOptions{}))
	f.ReplyTimeout = 10 * time.Millisecond
	if _, err := f.GetFeatures(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%v, want a timeout", err)
	}
}

func TestFrontEndRefusesOwnMistakes(t *testing.T) {
	front, _ := socketPair(t)
	f := NewFrontEnd(NewConn(front, ConnOptions{}))
	for name, err := range map[string]error{
		"no regions":    f.SetMemTable(nil, nil),
		"nine regions":  f.SetMemTable(make([]MemoryRegion, 9), make([]int, 9)),
		"files missing": f.SetMemTable(make([]MemoryRegion, 2), make([]int, 1)),
		"configuration": f.SetConfig(DeviceConfig{Offset: 250, Data: make([]byte, 7)}),
	} {
		if !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v, want ErrProtocol", name, err)
		}
	}
	if _, err := f.GetConfig(0, 1<<32-1); !errors.Is(err, ErrProtocol) {
		t.Errorf("GetConfig: %v, want ErrProtocol", err)
	}
}

func TestNames(t *testing.T) {
	for got, want := range map[string]string{
		ReqGetFeatures.String():                     "GET_FEATURES",
		ReqSetLogBase.String():                      "SET_LOG_BASE",
		Request(77).String():                        "request 77",
		BackendConfigChange.String():                "BACKEND_CONFIG_CHANGE_MSG",
		BackendRequest(9).String():                  "back-end request 9",
		ProtocolFeatures(0).String():                "0",
		(ProtocolMQ | ProtocolStatus).String():      "MQ|STATUS",
		(ProtocolDeviceState | 1<<40).String():      "DEVICE_STATE|bit40",
		(ProtocolBackendSendFD | 1<<9 | 8).String(): "REPLY_ACK|CONFIG|BACKEND_SEND_FD",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
