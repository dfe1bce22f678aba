package vhostuser

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const needReply = FlagVersion | FlagNeedReply

func TestF01SplitMessage(t *testing.T) {
	checkFDs(t)
	h := newRecorder()
	p := startServe(t, h, serveOptions{})
	m := Message{Request: ReqSetVringKick, Flags: FlagVersion, Payload: encodeU64(1)}
	fds := someFDs(t, 1)
	for _, b := range m.Encode() {
		p.send([]byte{b}, fds...)
		fds = nil // with the first byte
	}
	p.wantAlive()
	if got, want := h.last(), "SetVringKick(1, fd true)"; got != want {
		t.Errorf("call %s, want %s", got, want)
	}
}

func TestF01UnfinishedMessage(t *testing.T) {
	m := Message{Request: ReqSetVringKick, Flags: FlagVersion, Payload: encodeU64(1)}
	for n := 1; n < HeaderSize+8; n += 3 {
		t.Run(fmt.Sprintf("bytes=%d", n), func(t *testing.T) {
			checkFDs(t)
			h := newRecorder()
			p := startServe(t, h, serveOptions{conn: ConnOptions{PartialTimeout: 10 * time.Millisecond}})
			p.send(m.Encode()[:n], someFDs(t, 1)...)
			p.wantClosed(os.ErrDeadlineExceeded)
			if h.last() != "" {
				t.Errorf("call %s", h.last())
			}
		})
	}
}

// The time for a message is over before the rest of it is read, but it is there, and the time for a reply before there was a try to send it: this process had
// no processor, and the front-end is not to blame.
func TestF01LateReader(t *testing.T) {
	checkFDs(t)
	p := startServe(t, newRecorder(), serveOptions{conn: ConnOptions{PartialTimeout: time.Nanosecond, WriteTimeout: time.Nanosecond}})
	for range 10 {
		m := Message{Request: ReqSetVringKick, Flags: FlagVersion | FlagNeedReply, Payload: encodeU64(1)}
		p.send(m.Encode(), someFDs(t, 1)...)
		p.wantAlive()
	}
}

func TestF01HangUpWithinMessage(t *testing.T) {
	checkFDs(t)
	p := startServe(t, newRecorder(), serveOptions{})
	p.send(raw(t, "0c000000 0100"), someFDs(t, 1)...)
	p.sock.CloseWrite()
	p.wantClosed(io.ErrUnexpectedEOF)
}

func TestF01SilenceBetweenMessages(t *testing.T) {
	p := startServe(t, newRecorder(), serveOptions{conn: ConnOptions{PartialTimeout: time.Millisecond}})
	for range 3 {
		time.Sleep(20 * time.Millisecond)
		p.wantAlive() // no payload, so that it is never unfinished
	}
}

func TestF02Size(t *testing.T) {
	tests := map[string]string{
		"above the limit":         "02000000 01000000 01100000",
		"huge":                    "02000000 01000000 ffffffff",
		"u64 missing":             "02000000 01000000 00000000",
		"u64 short":               "02000000 01000000 07000000 | 01000000 000000",
		"u64 long":                "02000000 01000000 09000000 | 01000000 00000000 00",
		"payload on none":         "01000000 01000000 04000000 | 00000000",
		"vring addr short":        "09000000 01000000 08000000 | 00000000 00000000",
		"memory table short":      "05000000 01000000 04000000 | 01000000",
		"memory table empty":      "05000000 01000000 08000000 | 00000000 00000000",
		"memory table lies up":    "05000000 01000000 08000000 | 01000000 00000000",
		"memory table of 2^32-1":  "05000000 01000000 08000000 | ffffffff 00000000",
		"config header short":     "18000000 01000000 0b000000 | 00000000 00000000 000000",
		"config lies up":          "18000000 01000000 0c000000 | 00000000 01000000 00000000",
		"config lies down":        "18000000 01000000 0d000000 | 00000000 00000000 00000000 00",
		"config beyond its space": "18000000 01000000 0d000000 | 00010000 01000000 00000000 00",
		"config wraps":            "18000000 01000000 0c000000 | ffffffff ffffffff 00000000",
	}
	for name, digits := range tests {
		t.Run(name, func(t *testing.T) {
			checkFDs(t)
			h := newRecorder()
			p := startServe(t, h, serveOptions{})
			p.send(raw(t, digits), someFDs(t, 1)...)
			p.wantClosed(ErrProtocol)
			if h.last() != "" {
				t.Errorf("call %s", h.last())
			}
		})
	}
}

func TestF03Header(t *testing.T) {
	for _, flags := range []uint32{0, 2, 3, 0x11, 0x21, 1 << 31, 1<<31 | 1, 5, 5 | FlagNeedReply} {
		t.Run(fmt.Sprintf("flags=%#x", flags), func(t *testing.T) {
			checkFDs(t)
			h := newRecorder()
			p := startServe(t, h, serveOptions{})
			p.message(ReqSetVringKick, flags, encodeU64(0), someFDs(t, 1)...)
			p.wantClosed(ErrProtocol)
			if h.last() != "" {
				t.Errorf("call %s", h.last())
			}
		})
	}
}

func TestF04UnknownRequest(t *testing.T) {
	unserved := []Request{0, ReqSetLogBase, ReqSetLogFD, ReqIOTLBMsg, ReqGetInflightFD, ReqVringKick, ReqGetSharedObject, 45, 999, 1 << 31}
	for _, req := range unserved {
		t.Run(req.String()+"/need_reply", func(t *testing.T) {
			checkFDs(t)
			refused := make(chan error, 1)
			p := startServe(t, newRecorder(), serveOptions{Options: Options{Refused: func(err error) { refused <- err }}})
			p.negotiate()
			p.message(req, needReply, make([]byte, 20), someFDs(t, 2)...)
			p.wantU64(req, 1)
			p.wantAlive()
			if re := (*RequestError)(nil); !errors.As(<-refused, &re) || re.Request != req {
				t.Errorf("told of request %v", re)
			}
		})
		t.Run(req.String(), func(t *testing.T) {
			checkFDs(t)
			p := startServe(t, newRecorder(), serveOptions{})
			p.negotiate()
			p.message(req, FlagVersion, make([]byte, 20), someFDs(t, 2)...)
			p.wantClosed(ErrProtocol)
		})
	}
}

// TestF04NoHangingGet: a request with a reply of its own that cannot be answered ends the connection.
func TestF04NoHangingGet(t *testing.T) {
	for _, req := range []Request{ReqGetStatus, ReqGetConfig, ReqGetMaxMemSlots, ReqGetQueueNum} {
		for _, flags := range []uint32{FlagVersion, needReply} {
			t.Run(fmt.Sprintf("%v/flags=%#x", req, flags), func(t *testing.T) {
				checkFDs(t)
				h := newRecorder()
				h.protocol = ProtocolReplyAck
				p := startServe(t, h, serveOptions{})
				p.message(ReqSetProtocolFeatures, FlagVersion, encodeU64(uint64(ProtocolReplyAck)))
				var payload []byte
				if req == ReqGetConfig {
					payload = DeviceConfig{}.encode()
				}
				p.message(req, flags, payload)
				p.wantClosed(ErrProtocol)
			})
		}
	}
	t.Run("GET_VRING_BASE/failing", func(t *testing.T) {
		h := newRecorder()
		missing := errors.New("no base")
		h.failWith(missing)
		p := startServe(t, h, serveOptions{})
		p.message(ReqGetVringBase, FlagVersion, VringState{1, 0}.encode())
		p.wantClosed(missing)
	})
	t.Run("GET_PROTOCOL_FEATURES/without bit 30", func(t *testing.T) {
		h := newRecorder()
		h.features = 1
		p := startServe(t, h, serveOptions{})
		p.message(ReqGetProtocolFeatures, FlagVersion, nil)
		p.wantClosed(ErrProtocol)
	})
}

func TestF05FileDescriptors(t *testing.T) {
	oneRegion := MemTable{goldenRegion}.encode()
	tests := []struct {
		name    string
		request Request
		payload []byte
		fds     int
	}{
		{"on a message that takes none", ReqGetFeatures, nil, 1},
		{"on SET_VRING_NUM", ReqSetVringNum, VringState{0, 256}.encode(), 8},
		{"too many", ReqSetVringKick, encodeU64(0), 2},
		{"missing", ReqSetVringKick, encodeU64(0), 0},
		{"with the flag that there is none", ReqSetVringCall, encodeU64(0x100), 1},
		{"fewer than regions", ReqSetMemTable, oneRegion, 0},
		{"more than regions", ReqSetMemTable, oneRegion, 2},
		{"no region file", ReqAddMemReg, encodeMemRegion(goldenRegion), 0},
		{"two region files", ReqAddMemReg, encodeMemRegion(goldenRegion), 2},
		{"two on REM_MEM_REG", ReqRemMemReg, encodeMemRegion(goldenRegion), 2},
		{"no back channel", ReqSetBackendReqFD, nil, 0},
		{"more than any message has", ReqSetMemTable, oneRegion, 9},
		{"more than any message has, regions too", ReqSetMemTable, make(MemTable, 8).encode(), 9},
		{"as many as can be sent, nearly", ReqSetMemTable, oneRegion, 200},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			checkFDs(t)
			h := newRecorder()
			p := startServe(t, h, serveOptions{})
			p.message(test.request, FlagVersion, test.payload, someFDs(t, test.fds)...)
			p.wantClosed(ErrProtocol)
			if h.last() != "" {
				t.Errorf("call %s", h.last())
			}
		})
	}
}

func TestF05LateFileDescriptors(t *testing.T) {
	checkFDs(t)
	p := startServe(t, newRecorder(), serveOptions{})
	p.send(raw(t, "0c000000 01000000 08000000")) // the kernel may join pieces, but the header is read by itself
	p.send(raw(t, "0000000000000000"), someFDs(t, 1)...)
	p.wantClosed(ErrProtocol)
}

// TestF05RemMemRegFile: the one descriptor too many that the specification allows is closed, the request served.
func TestF05RemMemRegFile(t *testing.T) {
	checkFDs(t)
	h := newRecorder()
	p := startServe(t, h, serveOptions{})
	p.negotiate()
	p.message(ReqRemMemReg, needReply, encodeMemRegion(goldenRegion), someFDs(t, 1)...)
	p.wantU64(ReqRemMemReg, 0)
}

func TestF07VringIndex(t *testing.T) {
	states := []Request{ReqSetVringNum, ReqSetVringAddr, ReqSetVringBase, ReqGetVringBase, ReqSetVringEnable}
	for _, req := range states {
		for _, index := range []uint32{4, 255, 256, 0x10001, 1<<32 - 1} {
			payload := VringState{Index: index, Num: 1}.encode()
			if req == ReqSetVringAddr {
				payload = VringAddr{Index: index}.encode()
			}
			t.Run(fmt.Sprintf("%v/%d", req, index), func(t *testing.T) { refusedIndex(t, req, payload) })
		}
	}
	for _, req := range []Request{ReqSetVringKick, ReqSetVringCall, ReqSetVringErr} {
		for _, v := range []uint64{4, 255, 0x200, 0x10001, 0xfffffeff, 1 << 32, 1 << 63} {
			t.Run(fmt.Sprintf("%v/%#x", req, v), func(t *testing.T) { refusedIndex(t, req, encodeU64(v)) })
		}
	}
}

// refusedIndex: the request is refused without a call, whether or not an ack is asked for.
func refusedIndex(t *testing.T, req Request, payload []byte) {
	checkFDs(t)
	fds := someFDs(t, frontEndTable[req].maxFDs)
	h := newRecorder()
	p := startServe(t, h, serveOptions{})
	p.negotiate()
	if req != ReqGetVringBase {
		p.message(req, needReply, payload, fds...)
		p.wantU64(req, 1)
		p.wantAlive()
	}
	p.message(req, FlagVersion, payload, fds...)
	p.wantClosed(ErrProtocol)
	if calls := h.all(); len(calls) != 1 { // SetProtocolFeatures
		t.Errorf("calls %q", calls)
	}
}

func TestF15Features(t *testing.T) {
	for _, test := range []struct {
		name    string
		request Request
		value   uint64
	}{
		{"not offered", ReqSetFeatures, testFeatures | 1<<26},
		{"all", ReqSetFeatures, 1<<64 - 1},
		{"protocol not offered", ReqSetProtocolFeatures, uint64(testProtocol | ProtocolLogShmFD)},
		{"protocol all", ReqSetProtocolFeatures, 1<<64 - 1},
		{"in-band without REPLY_ACK", ReqSetProtocolFeatures, uint64(ProtocolInbandNotify | ProtocolBackendReq)},
		{"in-band without BACKEND_REQ", ReqSetProtocolFeatures, uint64(ProtocolInbandNotify | ProtocolReplyAck)},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newRecorder()
			if ProtocolFeatures(test.value)&ProtocolInbandNotify != 0 && test.value != 1<<64-1 {
				h.protocol |= ProtocolInbandNotify
			}
			p := startServe(t, h, serveOptions{})
			p.negotiate()
			p.message(test.request, needReply, encodeU64(test.value))
			p.wantClosed(ErrProtocol)
		})
	}
}

// TestF18BackChannelFile: what is passed as back channel and is not a connected stream socket is refused and closed.
func TestF18BackChannelFile(t *testing.T) {
	listener, _ := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	tcp, _ := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	dgram, _ := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	t.Cleanup(func() { CloseFDs([]int{listener, tcp, dgram[0], dgram[1]}) })
	for name, fd := range map[string]int{"file": someFDs(t, 1)[0], "unconnected": listener, "tcp": tcp, "dgram": dgram[0]} {
		t.Run(name, func(t *testing.T) {
			checkFDs(t)
			h := newRecorder()
			p := startServe(t, h, serveOptions{})
			p.negotiate()
			p.message(ReqSetBackendReqFD, needReply, nil, fd)
			p.wantU64(ReqSetBackendReqFD, 1)
			p.wantAlive()
			if h.backChannel() != nil {
				t.Error("the handler was called")
			}
		})
	}
}

// TestF19FrontEndDoesNotRead: replies that nobody takes end the session, not the daemon's patience.
func TestF19FrontEndDoesNotRead(t *testing.T) {
	p := startServe(t, newRecorder(), serveOptions{conn: ConnOptions{WriteTimeout: 20 * time.Millisecond}})
	m := Message{Request: ReqGetFeatures, Flags: FlagVersion}
	for {
		if _, err := p.sock.Write(m.Encode()); err != nil {
			break // the other end is closed
		}
	}
	select {
	case err := <-p.result:
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("session ended with %v", err)
		}
	case <-time.After(patience):
		t.Error("session goes on")
	}
}

func TestF20SecondOwner(t *testing.T) {
	h := newRecorder()
	p := startServe(t, h, serveOptions{})
	p.negotiate()
	for _, step := range []struct {
		request Request
		want    uint64
	}{
		{ReqSetOwner, 0}, {ReqSetOwner, 1}, {ReqSetOwner, 1}, {ReqResetDevice, 0}, {ReqSetOwner, 1},
		{ReqResetOwner, 0}, {ReqSetOwner, 0},
	} {
		p.message(step.request, needReply, nil)
		p.wantU64(step.request, step.want)
	}
	p.message(ReqSetOwner, FlagVersion, nil)
	p.wantClosed(ErrProtocol)
}

func TestF21VringEnable(t *testing.T) {
	h := newRecorder()
	p := startServe(t, h, serveOptions{})
	p.negotiate()
	for num, want := range map[uint32]uint64{0: 0, 1: 0, 2: 1, 256: 1, 1<<32 - 1: 1} { // all before SET_FEATURES
		p.message(ReqSetVringEnable, needReply, VringState{1, num}.encode())
		p.wantU64(ReqSetVringEnable, want)
	}
	p.message(ReqSetVringEnable, FlagVersion, VringState{1, 2}.encode())
	p.wantClosed(ErrProtocol)
}

// TestF24ReconnectStorm: while a front-end is served, connections that come and go, or just stay, cost nothing.
func TestF24ReconnectStorm(t *testing.T) {
	checkFDs(t)
	l, dial := testListener(t, ListenOptions{})
	first := dial()
	served, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer served.Close()
	speak := func() {
		if _, err := first.Write((Header{Request: ReqGetFeatures, Flags: FlagVersion}).Append(nil)); err != nil {
			t.Fatal(err)
		}
		if m, err := served.ReadMessage(); err != nil || m.Request != ReqGetFeatures {
			t.Fatalf("the first connection: %+v, %v", m, err)
		}
	}
	speak()
	before, open := runtime.NumGoroutine(), len(openFDs())
	for range 500 {
		c := dial()
		c.SetDeadline(time.Now().Add(patience))
		if n, err := c.Read(make([]byte, 1)); n != 0 || !isHangUp(err) {
			t.Fatalf("second connection: read %d bytes, %v; want the end", n, err)
		}
		c.Close()
	}
	for start := time.Now(); ; time.Sleep(time.Millisecond) { // the last one is seen to end before it is closed
		goroutines, fds := runtime.NumGoroutine(), len(openFDs())
		if goroutines <= before+2 && fds <= open {
			break
		}
		if time.Since(start) > patience {
			t.Fatalf("%d goroutines and %d descriptors, before the storm %d and %d", goroutines, fds, before, open)
		}
	}
	speak()
	first.Close()
	if !served.HungUp() {
		t.Error("the first connection's end goes unnoticed")
	}
}

// A connection that says nothing does not keep the real front-end out; one that has said something does, however long it is silent then.
func TestF24SilentConnectionGivesWay(t *testing.T) {
	checkFDs(t)
	const grace = 50 * time.Millisecond
	l, dial := testListener(t, ListenOptions{Conn: ConnOptions{PartialTimeout: grace}})
	silent := dial()
	defer silent.Close()
	first, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	time.Sleep(2 * grace)
	speaker := dial()
	defer speaker.Close()
	second, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if _, err := first.ReadMessage(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the silent connection: %v, want its end", err)
	}
	if _, err := speaker.Write((Header{Request: ReqGetFeatures, Flags: FlagVersion}).Append(nil)); err != nil {
		t.Fatal(err)
	}
	m, err := second.ReadMessage()
	if err != nil {
		t.Fatal(err)
	}
	m.CloseFDs()
	time.Sleep(2 * grace)
	third := dial()
	defer third.Close()
	third.SetDeadline(time.Now().Add(patience))
	if n, err := third.Read(make([]byte, 1)); n != 0 || !isHangUp(err) {
		t.Errorf("another connection beside one that has spoken: read %d bytes, %v; want the end", n, err)
	}
	if second.HungUp() {
		t.Error("the one that has spoken was closed")
	}
}

func isHangUp(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE)
}
