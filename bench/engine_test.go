package bench

import (
	"encoding/binary"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
)

// rig is an engine whose back-end is the test: it writes the used rings itself.
type rig struct {
	t *testing.T
	*engine
	idx [2]uint16 // used.idx
}

const rigFeatures = virtio.FVersion1 | virtio.FNetMrgRxbuf

func newRig(t *testing.T, direction Direction, verify bool) *rig {
	t.Helper()
	c := brief(func(c *Config) { c.Size, c.Batch, c.Window, c.Direction, c.Verify = 8, 8, 4, direction, verify })
	c.Frames = []int{100}
	s := &session{features: rigFeatures, quit: make(chan struct{}), ended: make(chan struct{})}
	close(s.ended)
	recv, send := c.layout(c.recvSize()), c.layout(virtio.NetHdrSize+c.longest())
	var err error
	if s.mem, err = newMemory(recv.bytes()+send.bytes(), false); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.mem.close)
	for _, q := range []struct {
		q     **queue
		index uint32
		l     layout
	}{{&s.recv, receiveq, recv}, {&s.send, transmitq, send}} {
		if *q.q, err = newQueue(s.mem, q.index, q.l, rigFeatures); err != nil {
			t.Fatal(err)
		}
		t.Cleanup((*q.q).close)
	}
	e, err := newEngine(c, s, &atomic.Bool{})
	if err != nil {
		t.Fatal(err)
	}
	return &rig{t: t, engine: e}
}

// use writes a used element.
func (r *rig) use(q *queue, id uint32, n int) {
	r.t.Helper()
	used := q.used.mem
	idx := &r.idx[q.index]
	at := 4 + 8*int(*idx%uint16(q.driver.Size()))
	binary.LittleEndian.PutUint32(used[at:], id)
	binary.LittleEndian.PutUint32(used[at+4:], uint32(n))
	*idx++
	word, err := shm.Word(used, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	atomic.StoreUint32(word, uint32(*idx)<<16)
}

// deliver writes a frame into the buffers of receive chains, and uses them.
func (r *rig) deliver(numBuffers uint16, frame []byte, ids ...uint32) {
	r.t.Helper()
	for i, id := range ids {
		buf := r.s.recv.slot(r.s.recv.slotOf[id])
		n := 0
		if i == 0 {
			virtio.NetHdr{NumBuffers: numBuffers}.Encode(buf[:virtio.NetHdrSize])
			n = virtio.NetHdrSize
		}
		part := len(frame)
		if i+1 < len(ids) {
			part = min(part, 50)
		}
		n += copy(buf[n:], frame[:part])
		frame = frame[part:]
		r.use(r.s.recv, id, n)
	}
}

// sent is frame number n as it was sent; the rig sends them in the slots 0, 1, ...
func (r *rig) sent(n int) []byte {
	return append([]byte(nil), r.s.send.slot(uint32(n))[virtio.NetHdrSize:virtio.NetHdrSize+100]...)
}

// wants has the engine take a turn, for its error.
func (r *rig) wants(want string) {
	r.t.Helper()
	_, err := r.turn()
	switch {
	case want == "" && err != nil:
		r.t.Fatal(err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		r.t.Fatalf("%v, want %q", err, want)
	}
}

// TestBrokenRings: what a back-end must not do to a ring ends the run.
func TestBrokenRings(t *testing.T) {
	for want, c := range map[string]struct {
		direction Direction
		do        func(r *rig)
	}{
		"broke the transmitq: used id 9, queue size 8":          {GuestToHost, func(r *rig) { r.use(r.s.send, 9, 0) }},
		"used length 1 of id 0, whose writable part has 0":      {GuestToHost, func(r *rig) { r.use(r.s.send, 0, 1) }},
		"used id 0, which the device does not have":             {Echo, func(r *rig) { r.use(r.s.send, 0, 0); r.use(r.s.send, 0, 0) }},
		"broke the receiveq: used id 8":                         {HostToGuest, func(r *rig) { r.use(r.s.recv, 8, 0) }},
		"used length 5000 of id 1":                              {HostToGuest, func(r *rig) { r.use(r.s.recv, 1, 5000) }},
		"wrote 11 bytes into a buffer of the receiveq":          {HostToGuest, func(r *rig) { r.use(r.s.recv, 1, 11) }},
		"num_buffers 0, queue size 8":                           {HostToGuest, func(r *rig) { r.deliver(0, make([]byte, 60), 0) }},
		"num_buffers 9":                                         {HostToGuest, func(r *rig) { r.deliver(9, make([]byte, 60), 0) }},
		"frame 1 of 100 bytes came back changed":                {Echo, func(r *rig) { f := r.sent(1); f[99] ^= 4; r.deliver(1, f, 0) }},
		"frame 2 came back with 99 bytes, was sent with 100":    {Echo, func(r *rig) { r.deliver(1, r.sent(2)[:99], 0) }},
		"frame 0 came back after frame 1":                       {Echo, func(r *rig) { r.deliver(1, r.sent(1), 0); r.deliver(1, r.sent(0), 1) }},
		"frame 0 came back after frame 0":                       {Echo, func(r *rig) { r.deliver(1, r.sent(0), 0); r.deliver(1, r.sent(0), 1) }},
		"frame 3 of 100 bytes came back changed: checksum 0x00": {Echo, func(r *rig) { f := r.sent(3); clear(f[offSum:offBody]); r.deliver(2, f, 3, 4) }},
	} {
		t.Run(want, func(t *testing.T) {
			r := newRig(t, c.direction, c.direction == Echo)
			r.wants("")
			c.do(r)
			want := strings.TrimSuffix(want, " 0x00")
			r.wants(want)
		})
	}
}

// TestEchoCounts: lost frames, late ones, those of others, and frames over several buffers.
func TestEchoCounts(t *testing.T) {
	r := newRig(t, Echo, true)
	r.wants("") // sends 4
	if r.under() != 4 || r.number != 4 {
		t.Fatalf("%d under way, next is %d", r.under(), r.number)
	}
	swapped := r.sent(0)
	copy(swapped, "\x02vhos\x01\x02vhos\x02") // as a back-end that forwards does
	r.deliver(1, swapped, 0)
	r.deliver(2, r.sent(1), 1, 2)
	r.deliver(1, make([]byte, 60), 3)
	future := r.sent(2)
	binary.LittleEndian.PutUint64(future[offNumber:], 100)
	r.deliver(1, future, 4)
	other := r.sent(2)
	other[offTag]++
	r.deliver(1, other, 5)
	r.deliver(1, make([]byte, 20), 6)
	r.c.Window = 0 // no more
	r.wants("")
	if r.htg != (Count{2, 200}) || r.foreign != 4 || r.under() != 2 {
		t.Fatalf("%+v came back, %d of others, %d under way", r.htg, r.foreign, r.under())
	}
	r.c.Patience = 10 * vhosttest.Patience
	r.moved, r.idle, r.now = 0, 0, 2*r.c.lostAfter()
	if err := r.stuck(); err != nil || r.given != 0 {
		t.Fatalf("%v, %d lost, while nobody looked", err, r.given)
	}
	r.moved = 0
	if err := r.stuck(); err != nil || r.given != 2 || r.under() != 0 {
		t.Fatalf("%v, %d lost, %d under way", err, r.given, r.under())
	}
	late := r.sent(2)
	r.deliver(1, late, 7)
	r.wants("")
	if r.given != 1 || r.under() != 0 || r.htg.Frames != 3 {
		t.Errorf("a late frame: %d lost, %d under way, %d came back", r.given, r.under(), r.htg.Frames)
	}
}

// TestFaultOfSession: an engine that has nothing to do notices that the session is over.
func TestFaultOfSession(t *testing.T) {
	r := newRig(t, HostToGuest, false)
	gone := error(&time.ParseError{Message: "gone"})
	r.s.fault.Store(&gone)
	if _, err := r.run(time.Hour); err != gone {
		t.Errorf("%v", err)
	}
}

// TestBroken: the back-end's err descriptors end the session.
func TestBroken(t *testing.T) {
	for i, name := range []string{"receiveq", "transmitq"} {
		path, _ := listen(t, loopDevice(t), 0)
		s, err := open(t.Context(), brief(func(c *Config) { c.Path = path }))
		if err != nil {
			t.Fatal(err)
		}
		[]*queue{s.recv, s.send}[i].broken.Signal()
		<-s.ended
		if err := s.err(); err == nil || !strings.Contains(err.Error(), "the "+name+" is broken") {
			t.Errorf("%v, want the %s", err, name)
		}
		s.close()
	}
}

// TestTurnAllocates: nothing.
func TestTurnAllocates(t *testing.T) {
	r := newRig(t, GuestToHost, false)
	id := uint32(0)
	n := testing.AllocsPerRun(100, func() {
		r.wants("")
		r.use(r.s.send, id, 0)
		id = (id + 1) % 8
	})
	if n > 0 {
		t.Errorf("a turn allocates %v times", n)
	}
}
