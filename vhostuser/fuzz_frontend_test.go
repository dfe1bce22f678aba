package vhostuser

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// FuzzFrontEnd is a front-end whose back-end answers what it likes. Each call ends within the time that it has; an answer that it accepts
// is of the right form; after any other the connection is closed, and no descriptor that came along stays open.
func FuzzFrontEnd(f *testing.F) {
	f.Add([]byte{callFeatures, replyRight, 8, 0, 0, 0, 0x40, 1, 0, 0, 0, callSetOwner, replyRight, 8, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{callBase, replyRight, 8, 1, 0, 0, 0, 9, 0, 0, 0, callConfig, replyRight, 16, 2, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4})
	f.Add([]byte{callConfig, replyRight, 0, callSetOwner, replyRight, 8, 1, 0, 0, 0, 0, 0, 0, 0, callStatus, replyRight | 3<<4, 8, 1, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{callSlots, 0, 12, 36, 0, 0, 0, 5, 0, 0, 0, 0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{callMemory, 0, 20, 5, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, callKick, replyRight, 7, 0, 0, 0, 0, 0, 0, 0})
	file, err := unix.MemfdCreate("fuzz", unix.MFD_CLOEXEC)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { unix.Close(file) })
	f.Fuzz(func(t *testing.T, script []byte) {
		before := len(openFDs())
		answerFrontEnd(t, script, file)
		for start := time.Now(); len(openFDs()) > before; time.Sleep(time.Millisecond) {
			if time.Since(start) > patience {
				t.Fatalf("descriptors leaked: %d before, now %v", before, openFDs())
			}
		}
	})
}

// What is called.
const (
	callFeatures = iota
	callBase
	callConfig
	callStatus
	callSlots
	callMemory
	callKick
	callSetOwner
	calls
)

// replyRight in the byte before the length of a reply asks for a header that is right; the high four bits are a number of descriptors.
const replyRight = 1

// answerFrontEnd makes the calls of the script, each of which has its reply waiting: one byte for the call, one for the kind of the reply, one
// for its length, and that many bytes.
func answerFrontEnd(t *testing.T, script []byte, file int) {
	a, b := socketPair(t)
	defer a.Close()
	defer b.Close()
	fe := NewFrontEnd(NewConn(a, ConnOptions{PartialTimeout: 10 * time.Millisecond}))
	defer fe.Close()
	fe.ReplyTimeout = 10 * time.Millisecond
	fe.protocol = ProtocolReplyAck | ProtocolConfig | ProtocolStatus | ProtocolConfigureMemSlots | ProtocolMQ
	back := NewConn(b, ConnOptions{WriteTimeout: patience})
	for closed := false; len(script) >= 3; {
		call, kind := script[0]%calls, script[1]
		n := min(int(script[2]), len(script)-3)
		reply := script[3:][:n:n]
		script = script[3+n:]
		if kind&replyRight != 0 {
			m := Message{Request: requestOf[call], Flags: FlagVersion | FlagReply, Payload: reply}
			reply = m.Encode()
		}
		if len(reply) > 0 && !closed {
			_ = back.WriteRaw(reply, manyOf(file, int(kind>>4)))
		}
		start := time.Now()
		err := makeCall(t, fe, call, file)
		if took := time.Since(start); took > patience {
			t.Fatalf("%v took %v", requestOf[call], took)
		}
		var nack *NACKError
		if err != nil && !errors.As(err, &nack) {
			closed = true
		}
		select {
		case <-fe.conn.Closed():
			if !closed {
				t.Fatalf("%v closed the connection and returned %v", requestOf[call], err)
			}
		default:
			if closed {
				t.Fatalf("%v returned %v and left the connection open", requestOf[call], err)
			}
		}
	}
}

// requestOf is the request of a call.
var requestOf = [calls]Request{ReqGetFeatures, ReqGetVringBase, ReqGetConfig, ReqGetStatus, ReqGetMaxMemSlots, ReqSetMemTable, ReqSetVringKick, ReqSetOwner}

func manyOf(fd, n int) (fds []int) {
	for range n {
		fds = append(fds, fd)
	}
	return fds
}

func makeCall(t *testing.T, fe *FrontEnd, call byte, file int) (err error) {
	switch call {
	case callFeatures:
		_, err = fe.GetFeatures()
	case callBase:
		_, err = fe.GetVringBase(1)
	case callConfig:
		var data []byte
		if data, err = fe.GetConfig(2, 4); err == nil && len(data) != 4 {
			t.Fatalf("GetConfig of 4 bytes returned %x", data)
		}
	case callStatus:
		_, err = fe.GetStatus()
	case callSlots:
		_, err = fe.GetMaxMemSlots()
	case callMemory:
		err = fe.SetMemTable([]MemoryRegion{{Size: 4096}}, []int{file})
	case callKick:
		err = fe.SetVringKick(0, file)
	default:
		err = fe.SetOwner()
	}
	return err
}

// TestFrontEndWrongReply: GET_CONFIG of other bytes used to leave the connection open, a base of another vring to pass for the one that was
// asked for, and a status of more than 8 bits to be shortened.
func TestFrontEndWrongReply(t *testing.T) {
	for name, c := range map[string]struct {
		call  byte
		reply []byte
	}{
		"base of another vring":      {callBase, VringState{Index: 2, Num: 7}.encode()},
		"configuration elsewhere":    {callConfig, DeviceConfig{Offset: 3, Data: make([]byte, 4)}.encode()},
		"less configuration":         {callConfig, DeviceConfig{Offset: 2, Data: make([]byte, 3)}.encode()},
		"status of more than 8 bits": {callStatus, encodeU64(0x100)},
	} {
		a, b := socketPair(t)
		fe, back := NewFrontEnd(NewConn(a, ConnOptions{})), NewConn(b, ConnOptions{})
		fe.protocol = ProtocolConfig | ProtocolStatus
		if err := back.WriteMessage(&Message{Request: requestOf[c.call], Flags: FlagVersion | FlagReply, Payload: c.reply}); err != nil {
			t.Fatal(err)
		}
		if err := makeCall(t, fe, c.call, -1); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v, want %v", name, err, ErrProtocol)
		}
		select {
		case <-fe.conn.Closed():
		default:
			t.Errorf("%s: the connection is open", name)
		}
		fe.Close()
		back.Close()
	}
}
