package vhostuser

import (
	"bytes"
	"context"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// FuzzDecode: a header and payload that pass the checks decode without fault, and encode to the same bytes again.
func FuzzDecode(f *testing.F) {
	for _, g := range goldens {
		f.Add(raw(f, g.bytes))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < HeaderSize {
			return
		}
		h, err := DecodeHeader(b)
		if err != nil || int(h.Size) > len(b)-HeaderSize {
			return
		}
		p := b[HeaderSize:][:h.Size]
		if got := (&Message{Request: h.Request, Flags: h.Flags, Payload: p}).Encode(); !bytes.Equal(got, b[:len(got)]) {
			t.Fatalf("message % x became % x", b, got)
		}
		row := frontEndTable[h.Request]
		if row.payload.checkSize(p) != nil {
			return
		}
		var got []byte
		switch row.payload {
		case vringState:
			got = decodeVringState(p).encode()
		case vringAddr:
			got = decodeVringAddr(p).encode()
		case memTable:
			got = decodeMemTable(p).encode()
			copy(got[4:8], p[4:8]) // padding
		case memRegion:
			got = encodeMemRegion(decodeMemRegion(p))
			copy(got[:8], p[:8])
		case deviceConfig:
			got = decodeConfig(p).encode()
		default:
			got = p
		}
		if !bytes.Equal(got, p) {
			t.Fatalf("%v: payload % x became % x", h.Request, p, got)
		}
	})
}

// script turns fuzz input into what a front-end does: each step is one byte for the number of descriptors (low four
// bits) and for the kind of the step (high bits), one byte for a length, and that many bytes to send.
type step struct {
	fds   int
	bytes []byte
}

func script(b []byte) (steps []step) {
	for len(b) >= 2 && len(steps) < 32 {
		s := step{fds: int(b[0] & 0xf)}
		n := min(int(b[1]), len(b)-2)
		s.bytes = b[2:][:n]
		if b[0]&0x10 != 0 && n > 8 { // repair the header, to get deeper
			s.bytes = slices.Clone(s.bytes)
			copy(s.bytes[1:8], []byte{0, 0, 0, s.bytes[4]&needReplyByte | 1, 0, 0, 0})
			if n >= HeaderSize {
				copy(s.bytes[8:], []byte{byte(n - HeaderSize), 0, 0, 0})
			}
		}
		steps = append(steps, s)
		b = b[2+n:]
	}
	return steps
}

// needReplyByte is FlagNeedReply in the first byte of the flags.
const needReplyByte = byte(FlagNeedReply)

// FuzzServe: whatever sequence of messages, pieces and descriptors comes, the session ends when the front-end does,
// and every descriptor is closed.
func FuzzServe(f *testing.F) {
	var all []byte
	for _, g := range goldens {
		b := raw(f, g.bytes)
		one := append([]byte{byte(g.fds), byte(len(b))}, b...)
		f.Add(one)
		all = append(all, one...)
	}
	f.Add(all)
	f.Add(append([]byte{0x10, 20, 16, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0, 0, 0x3d, 0xa6, 1, 0, 0, 0, 0, 0}, all...))
	f.Add([]byte{1, 5, 12, 0, 0, 0, 1, 1, 15, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}) // late descriptor
	file, err := unix.MemfdCreate("fuzz", unix.MFD_CLOEXEC)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { unix.Close(file) })
	f.Fuzz(func(t *testing.T, b []byte) {
		before := len(openFDs())
		play(t, script(b), file)
		for start := time.Now(); len(openFDs()) > before; time.Sleep(time.Millisecond) {
			if time.Since(start) > patience {
				t.Fatalf("descriptors leaked: %d before, now %v", before, openFDs())
			}
		}
	})
}

func play(t *testing.T, steps []step, file int) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	front, err := NewConnFD(pair[0], ConnOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer front.Close()
	back, err := NewConnFD(pair[1], ConnOptions{})
	if err != nil {
		t.Fatal(err)
	}
	h := newRecorder()
	defer h.closeBack()
	done := make(chan struct{})
	go func() {
		defer close(done)
		Serve(context.Background(), back, h, Options{MaxVrings: 4})
	}()
	go io.Copy(io.Discard, front.sock) // ends with the session
	hangUp(front.sock, steps, file)
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("session hangs")
	}
}

// hangUp sends all steps, as far as the session lets it, and then ends the front-end's side of the connection.
func hangUp(sock *net.UnixConn, steps []step, file int) {
	for _, s := range steps {
		if len(s.bytes) == 0 {
			continue
		}
		fds := slices.Repeat([]int{file}, s.fds)
		if _, _, err := sock.WriteMsgUnix(s.bytes, unix.UnixRights(fds...), nil); err != nil {
			return
		}
	}
	sock.CloseWrite()
}
