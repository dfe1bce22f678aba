package backend_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
)

// Cases of what vhostd does not do: dirty logs, inflight regions, postcopy, device state, an IOTLB. It is not offered, and a front-end that goes on as if it
// were gets a refusal, whatever it says; nothing that it hands over is kept.

// unbuilt is a message of a feature that is not there.
type unbuilt struct {
	name    string
	req     vhostuser.Request
	payload []byte
	fds     int // memory files that go with it
}

// u64s is a payload.
func u64s(v ...uint64) (b []byte) {
	for _, x := range v {
		b = binary.NativeEndian.AppendUint64(b, x)
	}
	return b
}

// refusesUnbuilt sends each message as a request that wants an ack, which is refused, and as one that does not, which ends the session.
func refusesUnbuilt(t *testing.T, protocol vhostuser.ProtocolFeatures, features uint64, messages []unbuilt) {
	t.Helper()
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	if offered := e.Protocol & protocol; offered != 0 {
		t.Errorf("protocol features %v are offered", offered)
	}
	if offered := uint64(e.Offered) & features; offered != 0 {
		t.Errorf("features %#x are offered", offered)
	}
	file := vhosttest.NewRegion(t, vhosttest.RegionSpec{Size: 1 << 20})
	defer file.Close()
	for _, m := range messages {
		var fds []int
		for range m.fds {
			fds = append(fds, file.FD)
		}
		e.raw(t, append(header(m.req, vhostuser.FlagVersion|vhostuser.FlagNeedReply, len(m.payload)), m.payload...), fds...)
		reply, err := e.FE.Receive()
		if err != nil || reply.Request != m.req || len(reply.FDs) > 0 || binary.NativeEndian.Uint64(reply.Payload) == 0 {
			t.Fatalf("%s: %+v, %v; want a refusal", m.name, reply, err)
		}
		if n := file.Mappings(t); n != 0 {
			t.Errorf("%s: the file is mapped %d times", m.name, n)
		}
		e.works(t)
	}
	refusals := e.be.Stats().FrontEndErrors
	if refusals != uint64(len(messages)) {
		t.Errorf("%d front-end errors, want %d", refusals, len(messages))
	}
	e.raw(t, append(header(messages[0].req, vhostuser.FlagVersion, len(messages[0].payload)), messages[0].payload...))
	e.closed(t)
	n.goesOn(t)
	for bit := uint64(1); bit != 0; bit <<= 1 {
		if uint64(protocol)&bit != 0 {
			if e.FE.SetProtocolFeatures(e.Protocol|vhostuser.ProtocolFeatures(bit)) == nil {
				t.Errorf("SET_PROTOCOL_FEATURES with %v was taken", vhostuser.ProtocolFeatures(bit))
			}
			e.closed(t)
		}
		if features&bit != 0 {
			e.Stop()
			if e.FE.SetFeatures(uint64(e.Features)|bit) == nil {
				t.Errorf("SET_FEATURES with %#x was taken", bit)
			}
			e.closed(t)
		}
	}
	n.goesOn(t)
}

func TestF12LogSizes(t *testing.T) {
	refusesUnbuilt(t, vhostuser.ProtocolLogShmFD, uint64(virtio.FLogAll), []unbuilt{
		{"a log", vhostuser.ReqSetLogBase, u64s(1<<20, 0), 1},
		{"size and offset overflow", vhostuser.ReqSetLogBase, u64s(math.MaxUint64, 0x2000), 1},
		{"offset behind the file", vhostuser.ReqSetLogBase, u64s(4096, 1<<40), 1},
		{"smaller than memory", vhostuser.ReqSetLogBase, u64s(1, 0), 1},
		{"no file", vhostuser.ReqSetLogBase, u64s(1<<20, 0), 0},
		{"eight files", vhostuser.ReqSetLogBase, u64s(1<<20, 0), 8},
		{"log descriptor", vhostuser.ReqSetLogFD, u64s(0), 1},
	})
}

// A ring may be told to log, anywhere: it runs, and nothing is ever written there.
func TestF12RingLogAddress(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	page := e.Mem.Alloc(4096, 4096)
	canary := e.Mem.At(page, 4096)
	copy(canary, bytes.Repeat([]byte{0xa5}, len(canary)))
	before := bytes.Clone(canary)
	for _, q := range e.Queues {
		for _, log := range []uint64{0, 1, math.MaxUint64, 1 << 63, e.Mem.User(0), uint64(page), e.Mem.User(page)} {
			a := q.Addr()
			a.Flags, a.Log = vhostuser.VringFlagLog, log
			if err := e.FE.SetVringAddr(a); err != nil {
				t.Errorf("log at %#x: %v", log, err)
			}
			q.Stop()
			if err := e.FE.SetVringAddr(a); err != nil {
				t.Errorf("log at %#x, stopped: %v", log, err)
			}
			index := uint32(q.Index)
			if err := errors.Join(e.FE.SetVringNum(index, 256), e.FE.SetVringBase(index, uint32(q.Base)), e.FE.SetVringAddr(a),
				e.FE.SetVringCall(index, q.Call.FD()), e.FE.SetVringKick(index, q.Kick.FD()), e.FE.SetVringEnable(index, true)); err != nil {
				t.Fatalf("log at %#x, started: %v", log, err)
			}
			e.works(t)
		}
	}
	if !bytes.Equal(canary, before) {
		t.Error("something was written to where a ring was told to log")
	}
	n.goesOn(t)
}

func TestF13Inflight(t *testing.T) {
	inflight := func(size, off uint64, queues, entries uint16) []byte {
		return append(u64s(size, off), byte(queues), byte(queues>>8), byte(entries), byte(entries>>8), 0, 0, 0, 0)
	}
	refusesUnbuilt(t, vhostuser.ProtocolInflightShmFD, 0, []unbuilt{
		{"to be made", vhostuser.ReqGetInflightFD, inflight(0, 0, 2, 256), 0},
		{"to be made, for 65535 queues", vhostuser.ReqGetInflightFD, inflight(0, 0, math.MaxUint16, math.MaxUint16), 0},
		{"a region", vhostuser.ReqSetInflightFD, inflight(1<<16, 0, 2, 256), 1},
		{"more queues than it holds", vhostuser.ReqSetInflightFD, inflight(64, 0, math.MaxUint16, 256), 1},
		{"entries beyond its end", vhostuser.ReqSetInflightFD, inflight(4096, 0, 2, 32768), 1},
		{"wrapping", vhostuser.ReqSetInflightFD, inflight(math.MaxUint64, 4096, 2, 256), 1},
		{"no file", vhostuser.ReqSetInflightFD, inflight(4096, 0, 2, 256), 0},
	})
}

func TestF22PostcopyAndDeviceState(t *testing.T) {
	refusesUnbuilt(t, vhostuser.ProtocolPageFault|vhostuser.ProtocolDeviceState, 0, []unbuilt{
		{"advise", vhostuser.ReqPostcopyAdvise, nil, 0},
		{"advise, with a file", vhostuser.ReqPostcopyAdvise, nil, 1},
		{"listen before advise", vhostuser.ReqPostcopyListen, nil, 0},
		{"end before listen", vhostuser.ReqPostcopyEnd, nil, 0},
		{"state to be loaded", vhostuser.ReqSetDeviceStateFD, u32s(1, 0), 1},
		{"wrong direction and phase", vhostuser.ReqSetDeviceStateFD, u32s(99, 77), 1},
		{"no file", vhostuser.ReqSetDeviceStateFD, u32s(0, 0), 0},
		{"check", vhostuser.ReqCheckDeviceState, nil, 0},
	})
}

func TestF23IOTLB(t *testing.T) {
	const update, invalidate = 2, 3
	entry := func(iova, size, user uint64, perm, kind byte) []byte {
		return append(u64s(iova, size, user), perm, kind, 0, 0, 0, 0, 0, 0)
	}
	messages := []unbuilt{
		{"update", vhostuser.ReqIOTLBMsg, entry(0, 4096, 0x5500_0000_0000, 3, update), 0},
		{"size 0", vhostuser.ReqIOTLBMsg, entry(0, 0, 0x5500_0000_0000, 3, update), 0},
		{"permission 0", vhostuser.ReqIOTLBMsg, entry(0, 4096, 0x5500_0000_0000, 0, update), 0},
		{"wrapping", vhostuser.ReqIOTLBMsg, entry(math.MaxUint64-1, 4096, math.MaxUint64-1, 3, update), 0},
		{"outside memory", vhostuser.ReqIOTLBMsg, entry(1<<50, 1<<40, 1, 3, update), 0},
		{"invalidation", vhostuser.ReqIOTLBMsg, entry(0, math.MaxUint64, 0, 0, invalidate), 0},
		{"unknown type", vhostuser.ReqIOTLBMsg, entry(0, 4096, 0, 3, 255), 0},
	}
	for i := range uint64(1000) { // none is kept
		messages = append(messages, unbuilt{"one of many", vhostuser.ReqIOTLBMsg, entry(i<<12, 4096, i<<12, 3, update), 0})
	}
	refusesUnbuilt(t, 0, uint64(virtio.FAccessPlatform), messages)
}

// Descriptors that go with a message which is refused are closed here: the peer of one sees its end.
func TestF22DescriptorsAreClosed(t *testing.T) {
	vhosttest.NoLeaks(t)
	neighbour := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	e.raw(t, append(header(vhostuser.ReqSetDeviceStateFD, vhostuser.FlagVersion|vhostuser.FlagNeedReply, 8), u32s(0, 0)...), p[1])
	unix.Close(p[1])
	if _, err := e.FE.Receive(); err != nil {
		t.Fatal(err)
	}
	vhosttest.Eventually(t, "the end of the pipe", func() bool { // the answer may come before it
		n, err := unix.Read(p[0], make([]byte, 1))
		return n == 0 && err == nil
	})
	neighbour.goesOn(t)
}
