package vhostuser

import (
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// golden is one message as the specification lays it out on a little-endian machine.
type golden struct {
	name    string
	request Request
	bytes   string // request, version flag only
	fds     int
	call    string // what the Handler sees
	reply   string // of its own; "" if there is none
	send    func(f *FrontEnd, fds []int) (any, error)
	result  any // of send
}

func ok(err error) (any, error) { return nil, err }

var goldenRegion = MemoryRegion{GuestAddr: 0x1_0000_0000, Size: 0x4000_0000, UserAddr: 0x7f10_0000_0000, MmapOffset: 0x8000_0000}

var goldens = []golden{
	{"GetFeatures", ReqGetFeatures, "01000000 01000000 00000000", 0, "",
		"01000000 05000000 08000000 | 0100004001000000",
		func(f *FrontEnd, _ []int) (any, error) { return f.GetFeatures() }, uint64(0x1_4000_0001)},
	{"SetFeatures", ReqSetFeatures, "02000000 01000000 08000000 | 0100004001000000", 0, "SetFeatures(0x140000001)", "",
		func(f *FrontEnd, _ []int) (any, error) { return ok(f.SetFeatures(0x1_4000_0001)) }, nil},
	{"SetOwner", ReqSetOwner, "03000000 01000000 00000000", 0, "SetOwner()", "",
		func(f *FrontEnd, _ []int) (any, error) { return ok(f.SetOwner()) }, nil},
	{"ResetOwner", ReqResetOwner, "04000000 01000000 00000000", 0, "ResetOwner()", "",
		func(f *FrontEnd, _ []int) (any, error) { return ok(f.ResetOwner()) }, nil},
	{"SetMemTable", ReqSetMemTable, `05000000 01000000 48000000 | 02000000 00000000 |
		0000000000000000 00000a0000000000 00000000007f0000 0000000000000000 |
		0000000001000000 0000004000000000 00000000107f0000 0000008000000000`, 2,
		"SetMemTable([{0x0 0xa0000 0x7f0000000000 0x0} {0x100000000 0x40000000 0x7f1000000000 0x80000000}], 2 fds)", "",
		func(f *FrontEnd, fds []int) (any, error) {
			low := MemoryRegion{GuestAddr: 0, Size: 0xa0000, UserAddr: 0x7f00_0000_0000, MmapOffset: 0}
			return ok(f.SetMemTable([]MemoryRegion{low, goldenRegion}, fds))
		}, nil},
	{"SetVringNum", ReqSetVringNum, "08000000 01000000 08000000 | 01000000 00010000", 0, "SetVringNum(1, 256)", "",
		func(f *FrontEnd, _ []int) (any, error) { return ok(f.SetVringNum(1, 256)) }, nil},
	{"SetVringAddr", ReqSetVringAddr, `09000000 01000000 28000000 | 01000000 01000000 |
		00100000107f0000 00300000107f0000 00200000107f0000 0030000001000000`, 0,
		"SetVringAddr(1, {0x1 0x1 0x7f1000001000 0x7f1000003000 0x7f1000002000 0x100003000})", "",
		func(f *FrontEnd, _ []int) (any, error) {
			return ok(f.SetVringAddr(VringAddr{Index: 1, Flags: VringFlagLog, Desc: 0x7f10_0000_1000,
				Used: 0x7f10_0000_3000, Avail: 0x7f10_0000_2000, Log: 0x1_0000_3000}))
		}, nil},
	{"SetVringBase", ReqSetVringBase, "0a000000 01000000 08000000 | 03000000 f0ff0000", 0, "SetVringBase(3, 0xfff0)", "",
		func(f *FrontEnd, _ []int) (any, error) { return ok(f.SetVringBase(3, 0xfff0)) }, nil},
	{"GetVringBase", ReqGetVringBase, "0b000000 01000000 08000000 | 01000000 00000000", 0, "GetVringBase(1)",
		"0b000000 05000000 08000000 | 01000000 f0ff0000",
		func(f *FrontEnd, _ []int) (any, error) { return f.GetVringBase(1) }, uint32(0xfff0)},
	{"SetVringKick", ReqSetVringKick, "0c000000 01000000 08000000 | 0100000000000000", 1, "SetVringKick(1, fd true)", "",
		func(f *FrontEnd, fds []int) (any, error) { return ok(f.SetVringKick(1, fds[0])) }, nil},
	{"SetVringKick/none", ReqSetVringKick, "0c000000 01000000 08000000 | 0101000000000000", 0, "SetVringKick(1, fd false)", "",
		func(f *FrontEnd, _ []int) (any, error) { return ok(f.SetVringKick(1, -1)) }, nil},
	{"SetVringCall", ReqSetVringCall, "0d000000 01000000 08000000 | 0200000000000000", 1, "SetVringCall(2, fd true)", "",
		func(f *FrontEnd, fds []int) (any, error) { return ok(f.SetVringCall(2, fds[0])) }, nil},
	{"SetVringCall/none", ReqSetVringCall, "0d000000 01000000 08000000 | 0001000000000000", 0, "SetVringCall(0, fd false)", "",
		func(f *FrontEnd, _ []int) (any, error) { return ok(f.SetVringCall(0, -1)) }, nil},
	{"SetVringErr", ReqSetVringErr, "0e000000 01000000 08000000 | 0300000000000000", 1, "SetVringErr(3, fd true)", "",
		func(f *FrontEnd, fds []int) (any, error) { return ok(f.SetVringErr(3, fds[0])) }, nil},
	{"GetProtocolFeatures", ReqGetProtocolFeatures, "0f000000 01000000 00000000", 0, "",
		"0f000000 05000000 08000000 | 3da6010000000000",
		func(f *FrontEnd, _ []int) (any, error) { return f.GetProtocolFeatures() }, ProtocolFeatures(0x1a63d)},
	{"SetProtocolFeatures", ReqSetProtocolFeatures, "10000000 01000000 08000000 | 3da6010000000000", 0, "SetProtocolFeatures(0x1a63d)", "",
		func(f *FrontEnd, _ []int) (any, error) { return ok(f.SetProtocolFeatures(0x1a63d)) }, nil},
	{"GetQueueNum", ReqGetQueueNum, "11000000 01000000 00000000", 0, "",
		"11000000 05000000 08000000 | 0200000000000000",
		func(f *FrontEnd, _ []int) (any, error) { return f.GetQueueNum() }, uint64(2)},
	{"SetVringEnable", ReqSetVringEnable, "12000000 01000000 08000000 | 01000000 01000000", 0, "SetVringEnable(1, true)", "",
		func(f *FrontEnd, _ []int) (any, error) { return ok(f.SetVringEnable(1, true)) }, nil},
	{"SendRARP", ReqSendRARP, "13000000 01000000 08000000 | 525400123456 0000", 0, "SendRARP(52 54 00 12 34 56)", "",
		func(f *FrontEnd, _ []int) (any, error) {
			return ok(f.SendRARP([6]byte{0x52, 0x54, 0x00, 0x12, 0x34, 0x56}))
		}, nil},
	{"NetSetMTU", ReqNetSetMTU, "14000000 01000000 08000000 | 2823000000000000", 0, "NetSetMTU(9000)", "",
		func(f *FrontEnd, _ []int) (any, error) { return ok(f.NetSetMTU(9000)) }, nil},
	{"SetBackendReqFD", ReqSetBackendReqFD, "15000000 01000000 00000000", 1, "SetBackendReqFD()", "",
		func(f *FrontEnd, _ []int) (any, error) {
			c, err := f.OpenBackChannel()
			if err == nil {
				c.Close()
			}
			return nil, err
		}, nil},
	{"GetConfig", ReqGetConfig, "18000000 01000000 10000000 | 02000000 04000000 00000000 | 00000000", 0, "GetConfig(2, 4)",
		"18000000 05000000 10000000 | 02000000 04000000 00000000 | 00123456",
		func(f *FrontEnd, _ []int) (any, error) { return f.GetConfig(2, 4) }, []byte{0x00, 0x12, 0x34, 0x56}},
	{"SetConfig", ReqSetConfig, "19000000 01000000 0e000000 | 0a000000 02000000 01000000 | 2823", 0, "SetConfig(10, 1, 28 23)", "",
		func(f *FrontEnd, _ []int) (any, error) {
			return ok(f.SetConfig(DeviceConfig{Offset: 10, Flags: ConfigMigration, Data: []byte{0x28, 0x23}}))
		}, nil},
	{"ResetDevice", ReqResetDevice, "22000000 01000000 00000000", 0, "ResetDevice()", "",
		func(f *FrontEnd, _ []int) (any, error) { return ok(f.ResetDevice()) }, nil},
	{"GetMaxMemSlots", ReqGetMaxMemSlots, "24000000 01000000 00000000", 0, "",
		"24000000 05000000 08000000 | fd01000000000000",
		func(f *FrontEnd, _ []int) (any, error) { return f.GetMaxMemSlots() }, uint64(509)},
	{"AddMemReg", ReqAddMemReg, `25000000 01000000 28000000 | 0000000000000000 |
		0000000001000000 0000004000000000 00000000107f0000 0000008000000000`, 1,
		"AddMemReg({0x100000000 0x40000000 0x7f1000000000 0x80000000})", "",
		func(f *FrontEnd, fds []int) (any, error) { return ok(f.AddMemReg(goldenRegion, fds[0])) }, nil},
	{"RemMemReg", ReqRemMemReg, `26000000 01000000 28000000 | 0000000000000000 |
		0000000001000000 0000004000000000 00000000107f0000 0000008000000000`, 0,
		"RemMemReg({0x100000000 0x40000000 0x7f1000000000 0x80000000})", "",
		func(f *FrontEnd, _ []int) (any, error) { return ok(f.RemMemReg(goldenRegion)) }, nil},
	{"SetStatus", ReqSetStatus, "27000000 01000000 08000000 | 0f00000000000000", 0, "SetStatus(0xf)", "",
		func(f *FrontEnd, _ []int) (any, error) { return ok(f.SetStatus(0x0f)) }, nil},
	{"GetStatus", ReqGetStatus, "28000000 01000000 00000000", 0, "",
		"28000000 05000000 08000000 | 0f00000000000000",
		func(f *FrontEnd, _ []int) (any, error) { return f.GetStatus() }, uint8(0x0f)},
}

// TestTable: every row has a typed call and golden bytes, and nothing else has.
func TestTable(t *testing.T) {
	seen := map[Request]bool{}
	for _, g := range goldens {
		seen[g.request] = true
	}
	for req, row := range frontEndTable {
		if dispatchTable[req] == nil || !seen[req] {
			t.Errorf("%v: dispatch %t, golden bytes %t", req, dispatchTable[req] != nil, seen[req])
		}
		if row.reply != noPayload && row.reply != u64Payload && row.reply != row.payload {
			t.Errorf("%v: reply kind %d", req, row.reply)
		}
	}
	if len(dispatchTable) != len(frontEndTable) || len(seen) != len(frontEndTable) {
		t.Errorf("%d rows, %d calls, %d goldens", len(frontEndTable), len(dispatchTable), len(seen))
	}
}

// TestGoldenBackEnd feeds the bytes of each request to a session and looks at the call and at the bytes of the answer,
// without and with an ack asked for.
func TestGoldenBackEnd(t *testing.T) {
	for _, g := range goldens {
		for _, needReply := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/need_reply=%t", g.name, needReply), func(t *testing.T) {
				checkFDs(t)
				h := newRecorder()
				p := startServe(t, h, serveOptions{})
				t.Cleanup(h.closeBack)
				p.negotiate()
				fds := someFDs(t, g.fds)
				if g.request == ReqSetBackendReqFD {
					fds = []int{socketFD(t)}
				}
				b := raw(t, g.bytes)
				want := raw(t, g.reply)
				if needReply {
					b[4] |= 0x08
					if g.reply == "" {
						want = raw(t, "00000000 05000000 08000000 | 0000000000000000")
						want[0] = b[0]
					}
				}
				p.send(b, fds...)
				if got := p.receive(len(want)); string(got) != string(want) {
					t.Errorf("reply\n% x, want\n% x", got, want)
				}
				p.wantAlive()
				if g.call != "" && h.last() != g.call {
					t.Errorf("call %s, want %s", h.last(), g.call)
				}
				if g.fds > 0 && g.request != ReqSetBackendReqFD {
					if diff := cmp.Diff(inodes(fds), h.passed()); diff != "" {
						t.Errorf("files (-want +got):\n%s", diff)
					}
				}
			})
		}
	}
}

func inodes(fds []int) (list []uint64) {
	for _, fd := range fds {
		list = append(list, inode(fd))
	}
	return list
}

func socketFD(t *testing.T) int {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { CloseFDs(pair[:]) })
	return pair[0]
}

// TestGoldenFrontEnd looks at the bytes that each method sends, and at what it makes of the bytes of the reply.
func TestGoldenFrontEnd(t *testing.T) {
	for _, g := range goldens {
		for _, ack := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/ack=%t", g.name, ack), func(t *testing.T) {
				checkFDs(t)
				front, back := socketPair(t)
				f := NewFrontEnd(NewConn(front, ConnOptions{}))
				want, reply := raw(t, g.bytes), raw(t, g.reply)
				if ack {
					f.protocol = ProtocolReplyAck
					if g.reply == "" {
						reply = raw(t, "00000000 05000000 08000000 | 0000000000000000")
						reply[0] = want[0]
						want[4] |= 0x08
					}
				}
				back.SetDeadline(time.Now().Add(patience))
				back.Write(reply) // it waits in the socket
				result, err := g.send(f, someFDs(t, g.fds))
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(g.result, result); diff != "" {
					t.Errorf("result (-want +got):\n%s", diff)
				}
				got, fds := readRaw(t, back, len(want))
				if string(got) != string(want) || fds != g.fds {
					t.Errorf("sent with %d descriptors, want %d\n% x, want\n% x", fds, g.fds, got, want)
				}
			})
		}
	}
}

// readRaw reads n bytes and counts, and closes, the descriptors that come with the first of them.
func readRaw(t *testing.T, c *net.UnixConn, n int) ([]byte, int) {
	t.Helper()
	b, oob := make([]byte, n), make([]byte, 256)
	got, oobn, _, _, err := c.ReadMsgUnix(b, oob)
	if err != nil {
		t.Fatal(err)
	}
	fds, err := parseFDs(oob[:oobn])
	if err != nil {
		t.Fatal(err)
	}
	defer CloseFDs(fds)
	if _, err := io.ReadFull(c, b[got:]); err != nil {
		t.Fatal(err)
	}
	return b, len(fds)
}
