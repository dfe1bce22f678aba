package vhostuser

import (
	"context"
	"errors"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"
)

// backPair sets up a back channel through a session, and returns both of its ends.
func backPair(t *testing.T, protocol ProtocolFeatures) (*BackendConn, *Conn) {
	t.Helper()
	h := newRecorder()
	f, _ := startFrontEnd(t, h, serveOptions{})
	if err := f.SetProtocolFeatures(protocol); err != nil {
		t.Fatal(err)
	}
	f.NeedReply = false
	front, err := f.OpenBackChannel()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { front.Close() })
	t.Cleanup(h.closeBack)
	if _, err := f.GetFeatures(); err != nil { // served by now
		t.Fatal(err)
	}
	return h.backChannel(), front
}

func TestGoldenBackChannel(t *testing.T) {
	checkFDs(t)
	back, front := backPair(t, testProtocol)
	front.sock.SetDeadline(time.Now().Add(patience))
	if err := back.ConfigChange(false); err != nil {
		t.Fatal(err)
	}
	if got, _ := readRaw(t, front.sock, HeaderSize); string(got) != string(raw(t, "02000000 01000000 00000000")) {
		t.Errorf("without ack: % x", got)
	}
	front.sock.Write(raw(t, "02000000 05000000 08000000 | 0000000000000000"))
	if err := back.ConfigChange(true); err != nil {
		t.Fatal(err)
	}
	if got, _ := readRaw(t, front.sock, HeaderSize); string(got) != string(raw(t, "02000000 09000000 00000000")) {
		t.Errorf("with ack: % x", got)
	}
	front.sock.Write(raw(t, "02000000 05000000 08000000 | 0300000000000000"))
	nack := (*NACKError)(nil)
	if err := back.ConfigChange(true); !errors.As(err, &nack) || nack.Value != 3 {
		t.Errorf("refused: %v, want NACKError 3", err)
	}
	if err := back.ConfigChange(false); err != nil {
		t.Errorf("after a refusal: %v", err)
	}
}

func TestBackChannelNotNegotiated(t *testing.T) {
	back, _ := backPair(t, ProtocolBackendReq|ProtocolConfig)
	if err := back.ConfigChange(true); !errors.Is(err, ErrNotNegotiated) {
		t.Errorf("without REPLY_ACK: %v", err)
	}
	if err := back.ConfigChange(false); err != nil {
		t.Errorf("after that: %v", err)
	}
	back, _ = backPair(t, ProtocolBackendReq)
	if err := back.ConfigChange(false); !errors.Is(err, ErrNotNegotiated) {
		t.Errorf("without CONFIG: %v", err)
	}
}

// TestBackChannelBounded: a front-end that never answers costs the channel, not the caller.
func TestBackChannelBounded(t *testing.T) {
	back, _ := backPair(t, testProtocol)
	back.wait = 10 * time.Millisecond
	if err := back.ConfigChange(true); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("no answer: %v", err)
	}
	if err := back.ConfigChange(false); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after that: %v, want net.ErrClosed", err)
	}
	back, _ = backPair(t, testProtocol)
	back.conn.write = 10 * time.Millisecond
	var err error
	for err == nil { // nobody reads
		err = back.ConfigChange(false)
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("socket full: %v", err)
	}
}

type configChanges struct {
	count atomic.Int32
	fail  atomic.Bool
}

func (c *configChanges) ConfigChange() error {
	c.count.Add(1)
	if c.fail.Load() {
		return errors.New("refused")
	}
	return nil
}

func TestServeBackChannel(t *testing.T) {
	checkFDs(t)
	back, front := backPair(t, testProtocol)
	h := &configChanges{}
	result := make(chan error)
	go func() { result <- ServeBackChannel(context.Background(), front, h) }()
	if err := errors.Join(back.ConfigChange(false), back.ConfigChange(true)); err != nil {
		t.Error(err)
	}
	h.fail.Store(true)
	nack := (*NACKError)(nil)
	if err := back.ConfigChange(true); !errors.As(err, &nack) {
		t.Errorf("failing: %v, want a NACKError", err)
	}
	// one that the front-end does not know
	if err := back.conn.WriteMessage(&Message{Request: 3, Flags: needReply, Payload: make([]byte, 24)}); err != nil {
		t.Fatal(err)
	}
	if err := back.conn.readAck(3, patience); !errors.As(err, &nack) {
		t.Errorf("unknown: %v, want a NACKError", err)
	}
	back.Close()
	if err := <-result; err != nil {
		t.Errorf("ServeBackChannel: %v, want nil after a hang-up", err)
	}
	if n := h.count.Load(); n != 3 {
		t.Errorf("%d changes, want 3", n)
	}
}

func TestServeBackChannelHostile(t *testing.T) {
	for name, digits := range map[string]string{
		"reply flag": "02000000 05000000 00000000",
		"payload":    "02000000 01000000 04000000 | 00000000",
		"version":    "02000000 02000000 00000000",
	} {
		t.Run(name, func(t *testing.T) {
			checkFDs(t)
			a, b := socketPair(t)
			a.WriteMsgUnix(raw(t, digits), nil, nil)
			if err := ServeBackChannel(t.Context(), NewConn(b, ConnOptions{}), &configChanges{}); !errors.Is(err, ErrProtocol) {
				t.Errorf("%v, want ErrProtocol", err)
			}
		})
	}
	a, b := socketPair(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := ServeBackChannel(ctx, NewConn(b, ConnOptions{}), &configChanges{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	a.Close()
}
