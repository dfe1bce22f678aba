//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// guestEnv tells the program to be the guest, and which.
const guestEnv = "VHOSTD_PERF_GUEST"

const (
	pageSize = 4096
	// inner is how long the headers of a frame are (Ethernet, IPv4, UDP), which the guest's kernel writes: they have a descriptor of their own.
	inner    = 14 + 20 + 8
	minFrame = inner + 18
	maxFrame = 65400

	headSize    = 128 // bytes of a buffer for virtio-net header and frame headers
	indirectLen = 72  // descriptors of an indirect table: maxFrame in the smallest pieces
	addBatch    = 32  // frames between two looks at the used ring
	control     = 8 << 20
	userBase    = 0x7f00_0000_0000
	stuck       = 20 * time.Second
)

// guestOptions say what guest a turn has.
type guestOptions struct {
	Socket string
	Size   int // bytes of a frame
	Span   int // bytes of memory that payload is spread over
	Slots  int // places in it that are used; 0: all
	Ring   int // descriptors
	Window int // frames out at once at most
	Piece  int // bytes of payload in one descriptor at most
	Offset int // of the payload in its page
}

// guest is the driver end of one transmitq, in a memory file that the back-end has mapped as well.
type guest struct {
	guestOptions
	mem    []byte
	fd     int
	used   int // bytes of mem that are allocated
	fe     *vhostuser.FrontEnd
	driver *vring.Driver
	kick   *sys.EventFD
	call   *sys.EventFD
	kicks  uint64

	netHdr int            // bytes
	heads  []guestmem.GPA // buffers for headers
	free   []uint16       // of heads
	headOf []uint16       // by chain
	slots  int            // places of payload
	stride int            // bytes from one to the next
	step   int            // places between two frames: they are visited in scattered order
	at     int            // place of the next frame
	frame  []vring.Buf
}

// guestMain is the whole guest process: it says "ready" after its first walk, and then answers every number that it reads with having sent as many
// frames: how long it took in ns, how many kicks.
func guestMain(orders string) error {
	g := &guest{}
	if err := json.Unmarshal([]byte(orders), &g.guestOptions); err != nil {
		return err
	}
	if err := g.makeMemory(); err != nil {
		return err
	}
	if err := g.connect(); err != nil {
		return err
	}
	if err := g.send(max(g.slots, 4*g.Ring)); err != nil {
		return err
	}
	fmt.Println("ready")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var n int
		if _, err := fmt.Sscan(in.Text(), &n); err != nil {
			return fmt.Errorf("%q: %w", in.Text(), err)
		}
		from, kicks := time.Now(), g.kicks
		if err := g.send(n); err != nil {
			return err
		}
		fmt.Println("done", time.Since(from).Nanoseconds(), g.kicks-kicks)
	}
	return nil
}

// makeMemory makes guest memory: control structures, then the span of payload, every page of which is written.
func (g *guest) makeMemory() (err error) {
	if g.fd, err = unix.MemfdCreate("zerocopy-guest", unix.MFD_CLOEXEC); err != nil {
		return fmt.Errorf("memfd_create: %w", err)
	}
	n := control + g.Span
	if err := unix.Ftruncate(g.fd, int64(n)); err != nil {
		return fmt.Errorf("%d bytes of guest memory: %w", n, err)
	}
	if g.mem, err = unix.Mmap(g.fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		return fmt.Errorf("%d bytes of guest memory: %w", n, err)
	}
	for i, x := control, uint64(1); i < n; i += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		binary.NativeEndian.PutUint64(g.mem[i:], x)
	}
	g.stride = (g.Offset + g.Size - inner + pageSize - 1) / pageSize * pageSize
	g.slots = g.Span / g.stride
	if g.Slots > 0 {
		g.slots = min(g.slots, g.Slots)
	}
	// Near the golden section of the span, and without a common divisor: every place is visited once in a walk, neighbours far apart.
	for g.step = max(g.slots*382/1000, 1); gcd(g.step, g.slots) != 1; g.step++ {
	}
	return nil
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// alloc takes n bytes of control memory, aligned as everything in it wants.
func (g *guest) alloc(n int) (guestmem.GPA, []byte) {
	at := (g.used + 127) &^ 127
	if g.used = at + n; g.used > control {
		panic(fmt.Sprintf("bug: %d bytes of control structures, room for %d", g.used, control))
	}
	return guestmem.GPA(at), g.mem[at : at+n : at+n]
}

// connect does what a VMM does until the transmitq runs.
func (g *guest) connect() error {
	ctx, cancel := context.WithTimeout(context.Background(), stuck)
	defer cancel()
	fe, err := vhostuser.Dial(ctx, g.Socket)
	if err != nil {
		return err
	}
	g.fe = fe
	features, err := g.negotiate()
	if err != nil {
		return err
	}
	region := vhostuser.MemoryRegion{Size: uint64(len(g.mem)), UserAddr: userBase}
	if err := fe.SetMemTable([]vhostuser.MemoryRegion{region}, []int{g.fd}); err != nil {
		return err
	}
	return g.startQueue(features)
}

// negotiate accepts what QEMU and a Linux guest do.
func (g *guest) negotiate() (virtio.Features, error) {
	offered, err := g.fe.GetFeatures()
	if err != nil {
		return 0, err
	}
	features := virtio.Features(offered) &^ (virtio.FRingPacked | virtio.FInOrder | virtio.FLogAll | virtio.FAccessPlatform)
	protocol, err := g.fe.GetProtocolFeatures()
	if err != nil {
		return 0, err
	}
	if err := g.fe.SetProtocolFeatures(protocol); err != nil {
		return 0, err
	}
	if err := g.fe.SetOwner(); err != nil {
		return 0, err
	}
	return features, g.fe.SetFeatures(uint64(features))
}

func (g *guest) startQueue(features virtio.Features) (err error) {
	n := g.Ring
	g.netHdr = virtio.NetHdrLen(features)
	cfg := vring.DriverConfig{Size: n, Features: features, IndirectLen: indirectLen}
	addr := vhostuser.VringAddr{Index: 1}
	var desc, avail, used guestmem.GPA
	desc, cfg.Desc = g.alloc(virtio.DescTableLen(n))
	avail, cfg.Avail = g.alloc(virtio.AvailLen(n))
	used, cfg.Used = g.alloc(virtio.UsedLen(n))
	cfg.IndirectAddr, cfg.Indirect = g.alloc(n * indirectLen * virtio.DescSize)
	addr.Desc, addr.Avail, addr.Used = userBase+uint64(desc), userBase+uint64(avail), userBase+uint64(used)
	if g.driver, err = vring.NewDriver(cfg); err != nil {
		return err
	}
	g.driver.DisableCall()
	g.headOf = make([]uint16, n)
	for i := range n {
		at, _ := g.alloc(headSize)
		g.heads, g.free = append(g.heads, at), append(g.free, uint16(i))
	}
	for _, fd := range []**sys.EventFD{&g.kick, &g.call} {
		if *fd, err = sys.NewEventFD(); err != nil {
			return err
		}
	}
	for _, step := range []func() error{
		func() error { return g.fe.SetVringNum(1, uint32(n)) },
		func() error { return g.fe.SetVringBase(1, 0) },
		func() error { return g.fe.SetVringAddr(addr) },
		func() error { return g.fe.SetVringCall(1, g.call.FD()) },
		func() error { return g.fe.SetVringKick(1, g.kick.FD()) },
		func() error { return g.fe.SetVringEnable(1, true) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// send sends n frames and waits until all have come back.
func (g *guest) send(n int) error {
	progress := time.Now()
	for sent, back := 0, 0; back < n; {
		added := min(addBatch, n-sent, g.Window-(sent-back))
		for range added {
			if err := g.add(); err != nil {
				return err
			}
		}
		sent += added
		g.driver.Publish()
		if g.driver.NeedsKick() {
			g.kick.Signal()
			g.kicks++
		}
		reaped := g.reap()
		back += reaped
		if added+reaped > 0 {
			progress = time.Now()
			continue
		}
		if err := g.driver.Err(); err != nil {
			return err
		}
		if time.Since(progress) > stuck {
			return fmt.Errorf("%d of %d frames came back, and none for %v", back, n, stuck)
		}
	}
	return nil
}

// add makes the next frame available: headers in one buffer, written anew, payload as it lies.
func (g *guest) add() error {
	head := g.free[len(g.free)-1]
	g.free = g.free[:len(g.free)-1]
	at := g.heads[head]
	writeHeaders(g.mem[at:at+headSize], g.netHdr, g.Size)
	g.frame = append(g.frame[:0], vring.Buf{GPA: at, Len: uint32(g.netHdr + inner)})
	place, left := guestmem.GPA(control+g.at*g.stride+g.Offset), g.Size-inner
	for left > 0 {
		n := min(left, g.Piece)
		g.frame = append(g.frame, vring.Buf{GPA: place, Len: uint32(n)})
		place, left = place+guestmem.GPA(n), left-n
	}
	g.at = (g.at + g.step) % g.slots
	id, err := g.driver.Add(g.frame, nil)
	if err == nil {
		g.headOf[id] = head
	}
	return err
}

// writeHeaders writes a virtio-net header that asks for nothing, and the headers of a UDP datagram in IPv4.
func writeHeaders(b []byte, netHdr, size int) {
	clear(b[:netHdr+inner])
	f := b[netHdr:]
	copy(f, "\x02\x00\x00\x00\x00\x02\x02\x00\x00\x00\x00\x01\x08\x00\x45")
	binary.BigEndian.PutUint16(f[16:], uint16(size-14))
	copy(f[22:], "\x40\x11\x00\x00\x0a\x00\x00\x01\x0a\x00\x00\x02\x10\x00\x20\x00")
	binary.BigEndian.PutUint16(f[38:], uint16(size-34))
}

func (g *guest) reap() (n int) {
	for {
		id, _, ok := g.driver.Reap()
		if !ok {
			return n
		}
		g.free = append(g.free, g.headOf[id])
		n++
	}
}
