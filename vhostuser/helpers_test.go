package vhostuser

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience bounds waits that end at once unless something is broken.
const patience = 30 * time.Second

// openFDs lists the open descriptors of the process with what they refer to.
func openFDs() map[string]string {
	open := map[string]string{}
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			open[e.Name()] = target
		}
	}
	return open
}

// checkFDs fails the test if, after all of its cleanups from here on, there are more descriptors open than now.
func checkFDs(t testing.TB) {
	t.Helper()
	before := openFDs()
	t.Cleanup(func() {
		after := openFDs()
		for start := time.Now(); len(after) > len(before) && time.Since(start) < patience; after = openFDs() {
			time.Sleep(time.Millisecond)
		}
		if len(after) > len(before) {
			t.Errorf("descriptors leaked: %d before, %d after\nbefore: %v\nafter: %v", len(before), len(after), before, after)
		}
	})
}

// raw turns hexadecimal digits into bytes; spaces and bars are for the reader.
func raw(t testing.TB, digits string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.NewReplacer(" ", "", "|", "", "\n", "", "\t", "").Replace(digits))
	if err != nil {
		t.Fatalf("bad hexadecimal %q: %v", digits, err)
	}
	return b
}

func socketPair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return unixConn(t, pair[0]), unixConn(t, pair[1])
}

func unixConn(t testing.TB, fd int) *net.UnixConn {
	t.Helper()
	c, err := NewConnFD(fd, ConnOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.sock
}

// someFDs makes n descriptors that are closed at the end of the test. They are files, not eventfds, since those all
// have the same inode.
func someFDs(t testing.TB, n int) []int {
	t.Helper()
	fds := make([]int, n)
	for i := range fds {
		fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		fds[i] = fd
		t.Cleanup(func() { unix.Close(fd) })
	}
	return fds
}

// peer is a front-end made of bytes, with a session at the other end.
type peer struct {
	t      testing.TB
	sock   *net.UnixConn
	result chan error // what Serve returned
}

type serveOptions struct {
	Options
	conn ConnOptions
}

func startServe(t testing.TB, h Handler, opts serveOptions) *peer {
	t.Helper()
	if opts.MaxVrings == 0 {
		opts.MaxVrings = 4
	}
	front, back := socketPair(t)
	p := &peer{t, front, make(chan error, 1)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.result <- Serve(context.Background(), NewConn(back, opts.conn), h, opts.Options)
	}()
	t.Cleanup(func() { front.Close(); <-done })
	front.SetDeadline(time.Now().Add(patience))
	return p
}

func (p *peer) send(b []byte, fds ...int) {
	p.t.Helper()
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := p.sock.WriteMsgUnix(b, oob, nil); err != nil {
		p.t.Fatalf("send: %v", err)
	}
}

// message sends one message; payload parts are uint32, uint64 or bytes.
func (p *peer) message(req Request, flags uint32, payload []byte, fds ...int) {
	p.t.Helper()
	m := Message{Request: req, Flags: flags, Payload: payload}
	p.send(m.Encode(), fds...)
}

func (p *peer) receive(n int) []byte {
	p.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(p.sock, b); err != nil {
		p.t.Fatalf("receive %d bytes: %v", n, err)
	}
	return b
}

// wantReply reads a reply with a u64 and compares it.
func (p *peer) wantU64(req Request, want uint64) {
	p.t.Helper()
	got := p.receive(HeaderSize + 8)
	m := Message{Request: req, Flags: FlagVersion | FlagReply, Payload: encodeU64(want)}
	if string(got) != string(m.Encode()) {
		p.t.Fatalf("reply to %v: % x, want % x", req, got, m.Encode())
	}
}

// wantAlive shows that the session serves requests, and that nothing unasked for came before.
func (p *peer) wantAlive() {
	p.t.Helper()
	p.message(ReqGetFeatures, FlagVersion, nil)
	p.wantU64(ReqGetFeatures, testFeatures)
}

// wantClosed waits for the end of the session and of the connection, and checks that nothing was answered.
func (p *peer) wantClosed(want error) {
	p.t.Helper()
	select {
	case err := <-p.result:
		if !errors.Is(err, want) {
			p.t.Fatalf("session ended with %v, want %v", err, want)
		}
	case <-time.After(patience):
		p.t.Fatal("session goes on")
	}
	if n, err := p.sock.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		p.t.Fatalf("read %d bytes, %v; want the end of the connection", n, err)
	}
}

// negotiate acks every protocol feature that the recorder offers.
func (p *peer) negotiate() {
	p.t.Helper()
	p.message(ReqSetProtocolFeatures, FlagVersion, encodeU64(uint64(testProtocol)))
}

// What the recorder offers.
const (
	testFeatures uint64 = 1<<32 | FProtocolFeatures | 1
	testProtocol        = ProtocolMQ | ProtocolRARP | ProtocolReplyAck | ProtocolNetMTU | ProtocolBackendReq |
		ProtocolConfig | ProtocolBackendSendFD | ProtocolResetDevice | ProtocolConfigureMemSlots | ProtocolStatus
)

// recorder is a Handler that writes down its calls and closes what it is passed.
type recorder struct {
	features uint64
	protocol ProtocolFeatures
	fail     error // result of every call that can fail

	mu    sync.Mutex
	calls []string
	files []uint64 // inodes of the descriptors it was passed, 0 for -1
	back  *BackendConn
}

func newRecorder() *recorder { return &recorder{features: testFeatures, protocol: testProtocol} }

func (r *recorder) log(format string, args ...any) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, fmt.Sprintf(format, args...))
	return r.fail
}

func (r *recorder) take(fds ...int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, fd := range fds {
		r.files = append(r.files, inode(fd))
		CloseFDs([]int{fd})
	}
}

// all returns the calls so far.
func (r *recorder) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.calls)
}

// last returns the latest call.
func (r *recorder) last() string {
	if calls := r.all(); len(calls) > 0 {
		return calls[len(calls)-1]
	}
	return ""
}

// failWith sets the result of every call from here on that can fail.
func (r *recorder) failWith(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fail = err
}

// backChannel returns the back channel, nil if there is none.
func (r *recorder) backChannel() *BackendConn {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.back
}

// passed returns the inodes of the descriptors that the recorder was passed.
func (r *recorder) passed() []uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.files)
}

func inode(fd int) uint64 {
	var st unix.Stat_t
	if fd < 0 || unix.Fstat(fd, &st) != nil {
		return 0
	}
	return st.Ino
}

func (r *recorder) checkIndex(i int) {
	if i < 0 || i >= 4 {
		panic(fmt.Sprintf("vring index %d reached the handler", i))
	}
}

func (r *recorder) GetFeatures() uint64                   { return r.features }
func (r *recorder) GetProtocolFeatures() ProtocolFeatures { return r.protocol }
func (r *recorder) GetMaxMemSlots() uint64                { return 509 }
func (r *recorder) GetQueueNum() uint64                   { return 2 }
func (r *recorder) GetStatus() uint8                      { return 0x0f }
func (r *recorder) SetFeatures(f uint64) error            { return r.log("SetFeatures(%#x)", f) }
func (r *recorder) SetOwner() error                       { return r.log("SetOwner()") }
func (r *recorder) ResetOwner() error                     { return r.log("ResetOwner()") }
func (r *recorder) ResetDevice() error                    { return r.log("ResetDevice()") }
func (r *recorder) RemMemReg(g MemoryRegion) error        { return r.log("RemMemReg(%#x)", g) }
func (r *recorder) SendRARP(mac [6]byte) error            { return r.log("SendRARP(% x)", mac) }
func (r *recorder) NetSetMTU(mtu uint16) error            { return r.log("NetSetMTU(%d)", mtu) }
func (r *recorder) SetStatus(s uint8) error               { return r.log("SetStatus(%#x)", s) }

func (r *recorder) SetProtocolFeatures(f ProtocolFeatures) error {
	return r.log("SetProtocolFeatures(%#x)", uint64(f))
}

func (r *recorder) SetMemTable(regions []MemoryRegion, fds []int) error {
	r.take(fds...)
	return r.log("SetMemTable(%#x, %d fds)", regions, len(fds))
}

func (r *recorder) AddMemReg(g MemoryRegion, fd int) error {
	r.take(fd)
	return r.log("AddMemReg(%#x)", g)
}

func (r *recorder) SetVringNum(i int, n uint32) error {
	r.checkIndex(i)
	return r.log("SetVringNum(%d, %d)", i, n)
}

func (r *recorder) SetVringAddr(i int, a VringAddr) error {
	r.checkIndex(i)
	return r.log("SetVringAddr(%d, %#x)", i, a)
}

func (r *recorder) SetVringBase(i int, n uint32) error {
	r.checkIndex(i)
	return r.log("SetVringBase(%d, %#x)", i, n)
}

func (r *recorder) GetVringBase(i int) (uint32, error) {
	r.checkIndex(i)
	return 0xfff0, r.log("GetVringBase(%d)", i)
}

func (r *recorder) SetVringKick(i int, fd int) error { return r.vringFD("Kick", i, fd) }
func (r *recorder) SetVringCall(i int, fd int) error { return r.vringFD("Call", i, fd) }
func (r *recorder) SetVringErr(i int, fd int) error  { return r.vringFD("Err", i, fd) }

func (r *recorder) vringFD(what string, i, fd int) error {
	r.checkIndex(i)
	r.take(fd)
	return r.log("SetVring%s(%d, fd %t)", what, i, fd >= 0)
}

func (r *recorder) SetVringEnable(i int, on bool) error {
	r.checkIndex(i)
	return r.log("SetVringEnable(%d, %t)", i, on)
}

func (r *recorder) GetConfig(offset, size uint32) ([]byte, error) {
	err := r.log("GetConfig(%d, %d)", offset, size)
	space := append([]byte{0x52, 0x54, 0x00, 0x12, 0x34, 0x56}, make([]byte, MaxConfigSize)...)
	return space[offset : offset+size], err
}

func (r *recorder) SetConfig(c DeviceConfig) error {
	return r.log("SetConfig(%d, %d, % x)", c.Offset, c.Flags, c.Data)
}

func (r *recorder) SetBackendReqFD(back *BackendConn) error {
	r.mu.Lock()
	if r.back != nil {
		r.back.Close()
	}
	r.back = back
	r.mu.Unlock()
	return r.log("SetBackendReqFD()")
}

// closeBack closes the back channel that the recorder owns.
func (r *recorder) closeBack() {
	if back := r.backChannel(); back != nil {
		back.Close()
	}
}
