package backend_test

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
)

// The cases of hostile front-ends, F1 to F24, that show at the level of a session; what shows on the wire alone is tested beside the
// codec. Each runs beside a neighbour that must not notice.

// attack is a guest whose front-end misbehaves, after some traffic to show that it works.
func attack(t *testing.T, o vhosttest.Options) *end {
	t.Helper()
	e := start(t, newDevice(t, max(o.Pairs, 1)), o)
	e.works(t)
	return e
}

// works checks that the guest can send and receive.
func (e *end) works(t *testing.T) {
	t.Helper()
	w := e.dev.wires[0]
	for i := range 20 {
		if err := e.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(i), 200), nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.Transmitq(0).Settle(); err != nil {
		t.Fatal(err)
	}
	sent := w.got()
	if len(sent) != 20 {
		t.Fatalf("%d frames were sent, want 20", len(sent))
	}
	for i, p := range sent {
		if err := check(p.data, i); err != nil {
			t.Fatal(err)
		}
		w.push(p)
	}
	if err := (flow{to: e, frames: 20}).receive(); err != nil {
		t.Fatal(err)
	}
	e.faults = e.be.Stats().FrontEndErrors
}

// closed checks that the back-end hangs up for an error of the front-end, and serves the next connection as if nothing had been.
func (e *end) closed(t *testing.T) {
	t.Helper()
	e.FE.ReplyTimeout = vhosttest.Patience
	for {
		m, err := e.FE.Receive()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("the back-end does not hang up")
		}
		if err != nil {
			break
		}
		m.CloseFDs()
	}
	vhosttest.Eventually(t, "a front-end error", func() bool { return e.be.Stats().FrontEndErrors > e.faults })
	e.Reconnect()
	e.works(t)
}

// u64 and u32s are payloads.
func u64(v uint64) []byte { return binary.NativeEndian.AppendUint64(nil, v) }

func u32s(v ...uint32) (b []byte) {
	for _, x := range v {
		b = binary.NativeEndian.AppendUint32(b, x)
	}
	return b
}

func header(req vhostuser.Request, flags uint32, size int) []byte {
	return vhostuser.Header{Request: req, Flags: flags, Size: uint32(size)}.Append(nil)
}

func (e *end) raw(t *testing.T, b []byte, fds ...int) {
	t.Helper()
	if err := e.FE.SendRaw(b, fds); err != nil {
		t.Fatalf("sending %x: %v", b, err)
	}
}

func TestF1Fragments(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	for _, b := range append(header(vhostuser.ReqSetVringEnable, vhostuser.FlagVersion|vhostuser.FlagNeedReply, 8), u32s(0, 1)...) {
		e.raw(t, []byte{b})
	}
	m, err := e.FE.Receive()
	if err != nil || m.Request != vhostuser.ReqSetVringEnable || binary.NativeEndian.Uint64(m.Payload) != 0 {
		t.Fatalf("ack %+v, %v", m, err)
	}
	e.works(t)
	e.raw(t, header(vhostuser.ReqSetVringEnable, vhostuser.FlagVersion, 8)[:7]) // and no more: the deadline
	n.goesOn(t)
	e.closed(t)
	n.goesOn(t)
}

func TestF2Sizes(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	for name, b := range map[string][]byte{
		"over the limit":        header(vhostuser.ReqSetMemTable, vhostuser.FlagVersion, vhostuser.MaxPayload+1),
		"2^32-1":                header(vhostuser.ReqSetMemTable, vhostuser.FlagVersion, math.MaxUint32),
		"less than the struct":  append(header(vhostuser.ReqSetVringAddr, vhostuser.FlagVersion, 8), u64(0)...),
		"more than the struct":  append(header(vhostuser.ReqSetVringNum, vhostuser.FlagVersion, 16), make([]byte, 16)...),
		"payload where is none": append(header(vhostuser.ReqGetFeatures, vhostuser.FlagVersion, 8), u64(0)...),
	} {
		t.Log(name)
		e.raw(t, b, e.Mem.Regions[0].FD)
		e.closed(t)
		n.goesOn(t)
	}
}

func TestF3Flags(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	for _, flags := range []uint32{0, 2, 3, vhostuser.FlagVersion | 1<<4, vhostuser.FlagVersion | 1<<31, vhostuser.FlagVersion | vhostuser.FlagReply} {
		e.raw(t, header(vhostuser.ReqGetFeatures, flags, 0))
		e.closed(t)
		n.goesOn(t)
	}
}

func TestF4UnknownRequest(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	for _, req := range []vhostuser.Request{0, 6, 22, 26, 35, 41, 45, 999, math.MaxUint32} {
		e.raw(t, header(req, vhostuser.FlagVersion|vhostuser.FlagNeedReply, 0))
		m, err := e.FE.Receive()
		if err != nil || m.Request != req || binary.NativeEndian.Uint64(m.Payload) == 0 {
			t.Fatalf("request %d: %+v, %v; want a refusal", req, m, err)
		}
		e.works(t)
		e.raw(t, header(req, vhostuser.FlagVersion, 0))
		e.closed(t)
		n.goesOn(t)
	}
}

func TestF5Descriptors(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	fd := e.Mem.Regions[0].FD
	many := slices.Repeat([]int{fd}, 9)
	crowd := slices.Repeat([]int{fd}, 200) // more than the receiver has room for
	table := append(u32s(1, 0), make([]byte, 32)...)
	for name, c := range map[string]struct {
		b   []byte
		fds []int
	}{
		"on a message that takes none": {header(vhostuser.ReqGetFeatures, vhostuser.FlagVersion, 0), many[:1]},
		"too many":                     {append(header(vhostuser.ReqSetMemTable, vhostuser.FlagVersion, len(table)), table...), many[:2]},
		"too few":                      {append(header(vhostuser.ReqSetMemTable, vhostuser.FlagVersion, len(table)), table...), nil},
		"none where one was announced": {append(header(vhostuser.ReqSetVringKick, vhostuser.FlagVersion, 8), u64(0)...), nil},
		"one where none was":           {append(header(vhostuser.ReqSetVringKick, vhostuser.FlagVersion, 8), u64(1<<8)...), many[:1]},
		"more than eight":              {append(header(vhostuser.ReqSetMemTable, vhostuser.FlagVersion, len(table)), table...), many},
		"truncated by the kernel":      {append(header(vhostuser.ReqSetMemTable, vhostuser.FlagVersion, len(table)), table...), crowd},
	} {
		t.Log(name)
		e.raw(t, c.b, c.fds...)
		e.closed(t)
		n.goesOn(t)
	}
}

// repeats is 1000000 by hand, as the case asks for: go test ./backend -run TestF6Repeats -repeats 1000000 -timeout 0
var repeats = flag.Int("repeats", 5_000, "how often TestF6Repeats sends each message")

// Every message that allocates or carries descriptors, again and again, without the budget that would hold them up.
func TestF6Repeats(t *testing.T) {
	repeats := *repeats
	if testing.Short() {
		repeats = min(repeats, 300)
	}
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	d := newDevice(t, 2) // the second pair is not in use
	e := start(t, d, vhosttest.Options{}, func(o *backend.Options) { o.MessageRate, o.Log = -1, nil })
	e.works(t)
	extra := vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: 1 << 40, Size: 1 << 20})
	defer extra.Close()
	held := e.Mem.Regions[0]
	shifted := held.MemoryRegion // overlaps held
	shifted.GuestAddr += 4096
	messages := map[string]func() error{
		"SET_MEM_TABLE": func() error { e.ShareMemory(); return nil },
		"ADD and REM_MEM_REG": func() error {
			return errors.Join(e.FE.AddMemReg(extra.MemoryRegion, extra.FD), e.FE.RemMemReg(extra.MemoryRegion))
		},
		"SET_VRING_KICK": func() error { return e.FE.SetVringKick(1, e.Queues[1].Kick.FD()) },
		"SET_VRING_CALL": func() error { return e.FE.SetVringCall(1, e.Queues[1].Call.FD()) },
		"SET_VRING_ERR":  func() error { return e.FE.SetVringErr(1, e.Queues[1].Err.FD()) },
		"SET_VRING_NUM and SET_VRING_BASE of a ring that does not run": func() error {
			return errors.Join(e.FE.SetVringNum(2, 64), e.FE.SetVringBase(2, 7))
		},
		"stop and start": func() error { e.Queues[1].Stop(); e.Queues[1].Start(); return nil },
		"SET_VRING_NUM and SET_VRING_ADDR, refused": func() error {
			if e.FE.SetVringNum(1, 64) == nil {
				return errors.New("SET_VRING_NUM of a running ring was taken")
			}
			return e.FE.SetVringAddr(e.Queues[1].Addr())
		},
		"back channels": func() error {
			c, err := e.FE.OpenBackChannel()
			if err == nil {
				err = c.Close()
			}
			return err
		},
		"SET_MEM_TABLE, refused": func() error {
			return wantRefused(e.FE.SetMemTable([]vhostuser.MemoryRegion{extra.MemoryRegion, held.MemoryRegion, shifted}, []int{extra.FD, held.FD, held.FD}))
		},
		"ADD_MEM_REG, refused": func() error { return wantRefused(e.FE.AddMemReg(shifted, extra.FD)) },
		"REM_MEM_REG with a descriptor": func() error {
			payload := append(u64(0), u64s(shifted.GuestAddr, shifted.Size, shifted.UserAddr, shifted.MmapOffset)...)
			return e.ask(vhostuser.ReqRemMemReg, payload, extra.FD)
		},
		"SET_VRING_KICK of a ring that is not there": func() error { return e.ask(vhostuser.ReqSetVringKick, u64(4), e.Queues[1].Kick.FD()) },
		"SET_VRING_CALL with a file":                 func() error { return e.ask(vhostuser.ReqSetVringCall, u64(1), extra.FD) },
		"SET_BACKEND_REQ_FD with a file":             func() error { return e.ask(vhostuser.ReqSetBackendReqFD, nil, extra.FD) },
	}
	// What is not offered comes with descriptors too: some of its own, some that have no place there.
	for _, req := range []vhostuser.Request{
		vhostuser.ReqSetLogBase, vhostuser.ReqSetLogFD, vhostuser.ReqPostcopyAdvise, vhostuser.ReqGetInflightFD, vhostuser.ReqSetInflightFD,
		vhostuser.ReqGPUSetSocket, vhostuser.ReqGetSharedObject, vhostuser.ReqSetDeviceStateFD, 999,
	} {
		messages[req.String()] = func() error { return e.ask(req, u64s(1<<20, 0), extra.FD, e.Queues[1].Kick.FD()) }
	}
	for name, f := range messages {
		from := time.Now()
		var heap runtime.MemStats
		repeats := repeats
		if name == "stop and start" {
			repeats /= 8 // as many messages
		}
		for i := range repeats {
			if err := f(); err != nil {
				t.Fatalf("repeat %d: %v", i, err)
			}
			if i == repeats/10 {
				runtime.GC()
				runtime.ReadMemStats(&heap)
			}
		}
		t.Logf("%s: %d in %v", name, repeats, time.Since(from).Round(time.Millisecond))
		flat(t, e, heap)
		if n := extra.Mappings(t); n != 0 {
			t.Errorf("%s: %d mappings of a region that is not there are left", name, n)
		}
		e.works(t)
		n.goesOn(t)
	}
}

// ask sends a request that wants an ack, and returns an error unless it is refused.
func (e *end) ask(req vhostuser.Request, payload []byte, fds ...int) error {
	if err := e.FE.SendRaw(append(header(req, vhostuser.FlagVersion|vhostuser.FlagNeedReply, len(payload)), payload...), fds); err != nil {
		return err
	}
	m, err := e.FE.Receive()
	if err == nil && (m.Request != req || len(m.FDs) > 0 || binary.NativeEndian.Uint64(m.Payload) == 0) {
		err = fmt.Errorf("%v: %+v, want a refusal", req, m)
	}
	return err
}

// wantRefused is nil for a refusal.
func wantRefused(err error) error {
	if nack := (*vhostuser.NACKError)(nil); !errors.As(err, &nack) {
		return fmt.Errorf("%v, want a refusal", err)
	}
	return nil
}

// flat checks that there are no more mappings than a session has, and no more heap than there was, a tenth of it for noise.
func flat(t *testing.T, e *end, before runtime.MemStats) {
	t.Helper()
	vhosttest.Eventually(t, "no more heap than before", func() bool { // but for what the neighbour makes and has not dropped yet
		var now runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&now)
		return now.HeapAlloc < before.HeapAlloc+before.HeapAlloc/10+1<<20
	})
	for i, r := range e.Mem.Regions {
		if n := r.Mappings(t); n != 1 {
			t.Errorf("region %d: %d mappings, want 1", i, n)
		}
	}
	// A guest has 2 regions and 6 eventfds, the back-end as many eventfds again and 2 to wake its workers, a session 2 sockets, and
	// everything is here three times. What is not bounded is beyond any such number.
	if n := vhosttest.FDs(t); n > 150 {
		t.Errorf("%d descriptors are open", n)
	}
}

func TestF7VringIndex(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	for _, i := range []uint32{2, 255, 256, 0x10001, 0x80000001, math.MaxUint32} {
		for _, c := range []struct {
			req     vhostuser.Request
			payload []byte
			fds     []int
		}{
			{vhostuser.ReqSetVringNum, u32s(i, 256), nil},
			{vhostuser.ReqSetVringBase, u32s(i, 0), nil},
			{vhostuser.ReqSetVringEnable, u32s(i, 0), nil},
			{vhostuser.ReqSetVringAddr, append(u32s(i, 0), make([]byte, 32)...), nil},
			{vhostuser.ReqSetVringKick, u64(uint64(i) | 1<<8), nil},
			{vhostuser.ReqSetVringCall, u64(uint64(i) | 1<<8), nil},
			{vhostuser.ReqSetVringErr, u64(uint64(i) | 1<<8), nil},
		} {
			if i == 256 && c.fds == nil && len(c.payload) == 8 && c.req >= vhostuser.ReqSetVringKick && c.req <= vhostuser.ReqSetVringErr {
				continue // 256 is the flag itself, and the index 0: legal
			}
			e.raw(t, append(header(c.req, vhostuser.FlagVersion|vhostuser.FlagNeedReply, len(c.payload)), c.payload...), c.fds...)
			m, err := e.FE.Receive()
			if err != nil || m.Request != c.req || binary.NativeEndian.Uint64(m.Payload) == 0 {
				t.Fatalf("%v of vring %#x: %+v, %v; want a refusal", c.req, i, m, err)
			}
		}
		e.works(t)
		e.raw(t, append(header(vhostuser.ReqGetVringBase, vhostuser.FlagVersion, 8), u32s(i, 0)...))
		e.closed(t)
		n.goesOn(t)
	}
}
