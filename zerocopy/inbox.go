package zerocopy

import (
	"fmt"
	"sync"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// InboxFeatures are what the driver of an Inbox takes: frames over several buffers, with all offloads.
const InboxFeatures = virtio.FVersion1 | virtio.FNetMrgRxbuf | virtio.FNetGuestCsum | virtio.FNetGuestTSO4 | virtio.FNetGuestTSO6 |
	virtio.FNetGuestECN | virtio.FNetGuestUFO | virtio.FNetGuestUSO4 | virtio.FNetGuestUSO6

// inboxBuffer is the size in bytes of a posted buffer of an Inbox: a frame of 1500 bytes takes one.
const inboxBuffer = 4096

// inboxBase is the guest address of an Inbox's memory.
const inboxBase = guestmem.GPA(1 << 20)

// Inbox is a receiveq without a guest, for whoever wants the frames that a device receives: both ends of a ring, and buffers, in private memory. A frame
// goes out as a Buffer that carries a Ubuf, and the ring's buffers are posted anew when it comes back.
//
//	device.Recv(Posted) --> ring --> Take --> Buffers ... Release --> Post
//
// It belongs to one goroutine, but for the releases, which may come from anywhere.
type Inbox struct {
	posted *Posted
	ring   *vring.Device
	driver *vring.Driver
	table  *guestmem.Table
	mem    []byte // the buffers
	slots  []inboxSlot
	slotOf []uint16 // by head
	idle   []*letter

	mu      sync.Mutex
	back    []uint16 // slots that are free, not posted yet
	letters []*letter
	starved bool   // somebody waits for free slots
	wake    func() // told then
}

// inboxSlot is a posted buffer.
type inboxSlot struct {
	addr guestmem.GPA
	mem  []byte
}

// letter is a frame on its way from an Inbox.
type letter struct {
	in    *Inbox
	buf   Buffer
	slots []uint16
	frags [][]byte
}

// NewInbox returns an Inbox of n buffers, a power of two, all posted. wake is called, on any goroutine, when a buffer has come back after Post found none.
func NewInbox(n int, wake func()) (*Inbox, error) {
	desc, avail, used := virtio.DescTableLen(n), (virtio.AvailLen(n)+15)&^15, (virtio.UsedLen(n)+15)&^15
	data := (desc + avail + used + inboxBuffer - 1) &^ (inboxBuffer - 1)
	region, err := guestmem.NewHeapRegion(inboxBase, 1<<40, data+n*inboxBuffer)
	if err != nil {
		return nil, fmt.Errorf("inbox: %w", err)
	}
	table, err := guestmem.NewTable(region)
	if err != nil {
		return nil, fmt.Errorf("inbox: %w", err)
	}
	b := region.Bytes()
	parts := [3][]byte{b[:desc], b[desc : desc+avail], b[desc+avail : desc+avail+used]}
	in := &Inbox{table: table, mem: b[data:], slots: make([]inboxSlot, n), slotOf: make([]uint16, n), wake: wake}
	in.driver, err = vring.NewDriver(vring.DriverConfig{Size: n, Desc: parts[0], Avail: parts[1], Used: parts[2], Features: InboxFeatures})
	if err == nil {
		cfg := vring.Config{Size: n, Desc: parts[0], Avail: parts[1], Used: parts[2], Features: InboxFeatures}
		in.ring, err = vring.NewDevice(cfg, guestmem.NewView(table, nil))
	}
	if err != nil {
		table.Unpin()
		return nil, fmt.Errorf("inbox: %w", err)
	}
	in.posted = NewPosted(in.ring, InboxFeatures)
	for i := range in.slots {
		at := i * inboxBuffer
		in.slots[i] = inboxSlot{addr: inboxBase + guestmem.GPA(data+at), mem: in.mem[at : at+inboxBuffer : at+inboxBuffer]}
		in.back = append(in.back, uint16(i))
	}
	in.Post()
	return in, nil
}

// Posted is what a device's Recv is to be called with.
func (in *Inbox) Posted() *Posted { return in.posted }

// Post posts the buffers that came back, and reports whether any is posted at all. If not, wake will be called.
func (in *Inbox) Post() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	for _, s := range in.back {
		id, err := in.driver.Add(nil, []vring.Buf{{GPA: in.slots[s].addr, Len: inboxBuffer}})
		if err != nil {
			panic("bug: an inbox has more buffers than its ring: " + err.Error())
		}
		in.slotOf[id] = s
	}
	if len(in.back) > 0 {
		in.driver.Publish()
	}
	in.back = in.back[:0]
	in.starved = in.driver.Out() == 0
	return !in.starved
}

// Take appends the frames that came, which the caller releases.
func (in *Inbox) Take(to []*Buffer) []*Buffer {
	in.ring.Publish()
	for {
		id, n, ok := in.driver.Reap()
		if !ok {
			return to
		}
		l := in.letter()
		hdr := in.add(l, id, n, virtio.NetHdrSize)
		for i := 1; i < int(hdr.NumBuffers); i++ {
			if id, n, ok = in.driver.Reap(); !ok {
				panic("bug: a merged frame is not whole")
			}
			in.add(l, id, n, 0)
		}
		hdr.NumBuffers = 0
		if err := l.buf.RecycleUbuf(Ubuf{Callback: letterBack, Arg: l}, hdr, l.frags...); err != nil {
			panic("bug: a letter is out: " + err.Error())
		}
		to = append(to, &l.buf)
	}
}

// add appends the n bytes of a used buffer to a frame, of which the first skip are the virtio-net header.
func (in *Inbox) add(l *letter, id uint16, n uint32, skip int) (hdr virtio.NetHdr) {
	s := in.slotOf[id]
	m := in.slots[s].mem[:n]
	if skip > 0 && len(m) >= skip {
		hdr = virtio.DecodeNetHdr(m[:skip])
		m = m[skip:]
	}
	l.slots = append(l.slots, s)
	l.frags = append(l.frags, m)
	return hdr
}

// letter returns one that is not out.
func (in *Inbox) letter() *letter {
	if len(in.idle) == 0 {
		in.mu.Lock()
		in.idle, in.letters = in.letters, in.idle
		in.mu.Unlock()
	}
	n := len(in.idle)
	if n == 0 {
		return &letter{in: in}
	}
	l := in.idle[n-1]
	in.idle = in.idle[:n-1]
	return l
}

// letterBack runs when the last reference to a frame goes.
func letterBack(u *Ubuf, _ Outcome) {
	l := u.Arg.(*letter)
	in := l.in
	in.mu.Lock()
	in.back = append(in.back, l.slots...)
	held := l.buf.Held() // orphaned: the Buffer is its holder's for good
	l.slots, l.frags = l.slots[:0], l.frags[:0]
	if !held {
		in.letters = append(in.letters, l)
	}
	starved := in.starved
	in.starved = false
	in.mu.Unlock()
	if starved {
		in.wake()
	}
}

// Close ends the Inbox, whose frames have all been released.
func (in *Inbox) Close() { in.table.Unpin() }
