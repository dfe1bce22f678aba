package xdp_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/virtio"
)

// sendPage sends a frame from memory that the test has a hand on, which is returned: the kernel has the frame when nothing more of it is to be sent.
func (m *machine) sendPage(frame []byte) []byte {
	m.Helper()
	a := m.Mem.Alloc(virtio.NetHdrSize+len(frame), 1)
	mem := m.Mem.At(a, virtio.NetHdrSize+len(frame))
	copy(mem[virtio.NetHdrSize:], frame)
	q := m.Transmitq(0)
	if _, err := q.Driver.Add([]vhosttest.Piece{{GPA: a, Len: uint32(len(mem))}}, nil); err != nil {
		m.Fatal(err)
	}
	q.Flush()
	return mem[virtio.NetHdrSize:]
}

// TestPageChangedWhileHeld is the evidence that vhostd copies nothing: while the interface is down frames wait in the Tx ring, and a page that changes meanwhile
// arrives changed. On the copying path it arrives as it was.
func TestPageChangedWhileHeld(t *testing.T) {
	for _, c := range []struct {
		options string
		pages   bool
	}{{"", false}, {",no-balloon=on", true}, {",no-balloon=on,zerocopy=off", false}, {",no-balloon=on,zerocopy=on,mode=generic", true}} {
		t.Run("options"+c.options, func(t *testing.T) {
			m := newMachine(t, "xdp:v0"+c.options, 1500, vhosttest.Options{})
			m.Run("ip -n " + m.Here + " link set v0 down")
			frame := netdevtest.Frame(1500, 7)
			page := m.sendPage(frame)
			vhosttest.Eventually(t, "the frame at the device", func() bool {
				q := m.be.Stats().Queues[1]
				return q.Pending == 1 && c.pages || q.Frames == 1
			})
			if !c.pages {
				must(t, m.Transmitq(0).Settle())
			} else if n := m.Transmitq(0).Reap(); n != 0 {
				t.Fatal("the page came back before the kernel had read it")
			}
			want := bytes.Clone(frame)
			for i := 14; i < len(page); i++ {
				page[i] ^= 0xff
				if c.pages {
					want[i] ^= 0xff
				}
			}
			m.Up()
			if got, _ := m.far.recv(); !bytes.Equal(got, want) {
				t.Errorf("%d bytes arrived, as they were when sent: %v", len(got), bytes.Equal(got, frame))
			}
			must(t, m.Transmitq(0).Settle()) // the guest is quiet, and gets its page back
		})
	}
}

// TestStopWithFramesHeld: whatever the front-end does while the kernel has frames that it does not send, it takes no longer than the drain, every page is
// given back, and none of these frames is sent later.
func TestStopWithFramesHeld(t *testing.T) {
	const held = 5
	for name, stop := range map[string]func(m *machine){
		"GET_VRING_BASE": func(m *machine) { m.Stop() },
		"SET_MEM_TABLE":  func(m *machine) { m.ShareMemory() },
		"RESET_DEVICE":   func(m *machine) { must(m, m.FE.ResetDevice()) },
		"disconnect":     func(m *machine) { m.Hangup() },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, "xdp:v0,no-balloon=on", 1500, vhosttest.Options{})
			m.toGuest(100, sizes(1500))
			m.Run("ip -n " + m.Here + " link set v0 down")
			for i := range held {
				must(t, m.Send(0, virtio.NetHdr{}, netdevtest.Frame(1000, uint32(i)), nil))
			}
			vhosttest.Eventually(t, "frames at the device", func() bool { return m.be.Stats().Queues[1].Pending == held })
			stop(m)
			if name == "disconnect" {
				vhosttest.Eventually(t, "the end of the session", func() bool { return !m.be.Stats().Connected })
			}
			vhosttest.Eventually(t, "pages given back", func() bool { return m.be.Stats().Queues[1].Pending == 0 })
			st := m.be.Stats().Queues[1]
			if st.GivenUp != 0 || st.Outcomes["dropped"] != held {
				t.Errorf("%+v", st)
			}
			m.Hangup()
			m.Up()
			m.Guest = m.Successor(vhosttest.Options{})
			m.toHost(20, sizes(1500), nil) // in which none of the old ones shows
			m.toGuest(100, sizes(1500))
		})
	}
}

// TestChecksumIsLeftToTheKernel: of a frame whose checksum is to be completed the headers leave from private memory, the payload from the guest's pages, and
// the checksum is the kernel's to complete where somebody needs it.
func TestChecksumIsLeftToTheKernel(t *testing.T) {
	for _, options := range []string{"", ",no-balloon=on", ",no-balloon=on,mode=generic"} {
		t.Run("options"+options, func(t *testing.T) {
			m := newMachine(t, "xdp:v0"+options, 1500, vhosttest.Options{})
			for i := range 20 {
				frame, hdr := datagram(30+i*70, uint32(i))
				must(t, m.Send(0, hdr, frame, []vhosttest.Layout{nil, vhosttest.HeaderApart, vhosttest.Crumbs, {12 + 41}}[i%4]))
				got, unfinished := m.far.recv()
				if !unfinished || !bytes.Equal(got, frame) {
					t.Fatalf("frame %d of %d bytes: checksum left to be completed %v, %d bytes arrived, the same: %v",
						i, len(frame), unfinished, len(got), bytes.Equal(got, frame))
				}
			}
			must(t, m.Transmitq(0).Settle())
			if o := m.be.Stats().Queues[1].Outcomes; o["copied_anyway"]+o["copied"] != 20 {
				t.Errorf("%v", o)
			}
			// A header that lies about where the checksum is harms nobody.
			frame, hdr := datagram(100, 1)
			for _, lie := range [][2]uint16{{140, 6}, {65535, 65535}, {34, 120}} {
				hdr.CsumStart, hdr.CsumOffset = lie[0], lie[1]
				must(t, m.Send(0, hdr, frame, nil))
			}
			must(t, m.Transmitq(0).Settle())
			m.toHost(5, sizes(1500), nil)
		})
	}
}

// TestSegments: a frame that is cut into segments leaves from the guest's pages all the same, each segment behind headers of its own.
func TestSegments(t *testing.T) {
	m := newMachine(t, "xdp:v0,no-balloon=on", 1500, vhosttest.Options{SendSize: 1 << 16})
	const n, size = 9000, 1000
	for i := range 20 {
		frame, hdr := datagram(12+n, uint32(i)) // a TCP header is 12 bytes longer than a UDP header
		frame[14+9] = 6
		copy(frame[34+8:], []byte{0, 0, 0, 0, 5 << 4, 0x10, 0, 0, 0, 0, 0, 0})
		hdr.CsumOffset, hdr.HdrLen, hdr.GSOType, hdr.GSOSize = 16, 54, virtio.GSOTCPv4, size
		must(t, m.Send(0, hdr, frame, []vhosttest.Layout{nil, vhosttest.HeaderApart, {12 + 54, 700, 3000}}[i%3]))
		var payload []byte
		for range n / size {
			got, _ := m.far.recv()
			if len(got) != 54+size {
				t.Fatalf("a segment of %d bytes", len(got))
			}
			payload = append(payload, got[54:]...)
		}
		if !bytes.Equal(payload, frame[54:]) {
			t.Fatalf("frame %d: the segments carry other bytes", i)
		}
	}
	must(t, m.Transmitq(0).Settle())
	if o := m.be.Stats().Queues[1].Outcomes; o["copied_anyway"] != 20 {
		t.Errorf("%v", o)
	}
}

// datagram is an IPv4 UDP frame with n bytes of payload whose checksum is to be completed.
func datagram(n int, seed uint32) ([]byte, virtio.NetHdr) {
	b := netdevtest.Frame(42+n, seed)
	be := binary.BigEndian
	be.PutUint16(b[12:], 0x0800)
	copy(b[14:], []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 198, 18, 0, 1, 198, 18, 0, 2})
	be.PutUint16(b[16:], uint16(28+n))
	be.PutUint16(b[38:], uint16(8+n))
	return b, virtio.NetHdr{Flags: virtio.NetHdrNeedsCsum, CsumStart: 34, CsumOffset: 6, HdrLen: 42}
}

// TestAliasedPages: a guest that has several frames lie in the same memory gets every one of its chains back, once.
func TestAliasedPages(t *testing.T) {
	m := newMachine(t, "xdp:v0,no-balloon=on", 1500, vhosttest.Options{})
	a := m.Mem.Alloc(3000, 1)
	copy(m.Mem.At(a, 3000)[virtio.NetHdrSize:], netdevtest.Frame(2000, 1))
	q := m.Transmitq(0)
	for i := range 2000 {
		n := 60 + i%400
		for {
			_, err := q.Driver.Add([]vhosttest.Piece{
				{GPA: a, Len: uint32(virtio.NetHdrSize + n)}, {GPA: a + guestmem.GPA(i%3), Len: uint32(n)}, {GPA: a, Len: 1},
			}, nil)
			if err == nil {
				break
			}
			q.Flush()
			must(t, q.Wait(patience))
			q.Reap()
		}
		q.Flush()
	}
	must(t, q.Settle())
	o := m.be.Stats().Queues[1].Outcomes
	if o["copied_anyway"] != 2000 {
		t.Errorf("%v", o)
	}
	m.quiesce()
	m.toHost(20, sizes(1500), nil)
}

// TestQueues: each pair sends through a queue of its own, and every queue of the interface is received from, by two pairs or by one.
func TestQueues(t *testing.T) {
	for _, options := range []string{"", ",no-balloon=on"} {
		t.Run("options"+options, func(t *testing.T) {
			m := newMachine(t, "xdp:v0"+options, 1500, vhosttest.Options{Pairs: 2})
			if n := m.dev.Capabilities().MaxPairs; n != 2 {
				t.Fatalf("%d pairs, the interface has 2 queues", n)
			}
			for pair := range 2 {
				f := netdevtest.Frame(500, uint32(pair))
				must(t, m.Send(pair, virtio.NetHdr{}, f, nil))
				if got, _ := m.far.recv(); !bytes.Equal(got, f) {
					t.Fatalf("pair %d: other bytes", pair)
				}
			}
			// Flows go to queues by their hash.
			sent := map[string]bool{}
			send := func() {
				for i := range 64 {
					f, _ := datagram(100, uint32(i))
					binary.BigEndian.PutUint16(f[34:], uint16(1000+i))
					f[40], f[41] = 0, 0
					sent[string(f)] = true
					m.far.Send(f)
				}
			}
			var got [2]int
			collect := func() {
				vhosttest.Eventually(t, "every frame", func() bool {
					for pair := range 2 {
						if _, f, err := m.Recv(pair, 0); err == nil && sent[string(f)] {
							got[pair]++
							delete(sent, string(f))
						}
					}
					return len(sent) == 0
				})
			}
			for range 8 {
				send()
				collect()
			}
			t.Logf("by pair: %v", got)
			first := got[0]
			m.Queues[2].Enable(false)
			m.Queues[3].Enable(false)
			if st := m.dev.Stats(); options != "" && st.InPlace == 0 || st.Unruly > 0 {
				t.Errorf("%+v", st)
			}
			send()
			collect()
			if got[0] != first+64 {
				t.Errorf("by pair: %v: one has none enabled", got)
			}
		})
	}
}

// TestRefusals: what cannot be is said at Open, and leaves nothing behind.
func TestRefusals(t *testing.T) {
	vhosttest.NoLeaks(t)
	l := newLab(t, 1500, 1)
	for options, want := range map[string]string{
		"xdp:nothere":                    "not found",
		"xdp:v0,mtu=1501":                "the interface has 1500",
		"xdp:v0,queue=1":                 "the interface has 1: 0 to 0",
		"xdp:v0,mode=zerocopy":           "zero-copy",
		"xdp:v0,zerocopy=on":             "no-balloon=on",
		"xdp:v0,mode=fast":               "want one of auto",
		"xdp:":                           "name an interface",
		"xdp:v0,queue=-1":                "want a number",
		"xdp:v0,no-balloon":              "want KEY=VALUE",
		"xdp:v0,mtu=1000,mtu=1000":       "given twice",
		"xdp:" + fmt.Sprintf("%016d", 1): "no interface name",
		"xdp:v0,speed=9":                 "unknown key",
	} {
		d, err := l.open(options)
		if err == nil {
			must(t, d.Close())
		}
		if err == nil || !bytes.Contains([]byte(err.Error()), []byte(want)) {
			t.Errorf("%s: %v, want %q", options, err, want)
		}
	}
	d := l.device("xdp:v0")
	defer func() { must(t, d.Close()) }()
	if !l.attached() {
		t.Error("no XDP program is on the interface")
	}
	if _, err := l.open("xdp:v0"); err == nil || !bytes.Contains([]byte(err.Error()), []byte("another XDP program")) {
		t.Errorf("a second device on the interface: %v", err)
	}
}

// TestOtherQueuesPass: with queue= the host keeps the frames of the other queues.
func TestOtherQueuesPass(t *testing.T) {
	l := newLab(t, 1500, 2)
	d := l.device("xdp:v0,queue=1")
	defer func() { must(t, d.Close()) }()
	if c := d.Capabilities(); c.MaxPairs != 1 {
		t.Errorf("%+v", c)
	}
	far := l.wire(l.There)
	host := l.wire(l.Here)
	n := 0
	for i := range 64 {
		f, _ := datagram(100, uint32(i))
		binary.BigEndian.PutUint16(f[34:], uint16(1000+i))
		far.Send(f)
	}
	for _, ok := host.tryRecv(patience); ok; _, ok = host.tryRecv(5e7) {
		n++
	}
	if n == 0 || n == 64 {
		t.Errorf("the host has %d of 64 frames, of one queue of two", n)
	}
}

// TestInterfaceGoes: an interface that is taken away ends reception with an error, and Close has nothing left.
func TestInterfaceGoes(t *testing.T) {
	m := newMachine(t, "xdp:v0,no-balloon=on", 1500, vhosttest.Options{})
	m.toGuest(20, sizes(1500))
	m.Run("ip -n " + m.Here + " link del v0")
	must(t, m.Send(0, virtio.NetHdr{}, netdevtest.Frame(100, 1), nil))
	m.Stop()
	m.Hangup()
	m.Run("ip -n " + m.Here + " link add v0 type veth peer name v1") // attached looks for one
}
