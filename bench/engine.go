package bench

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/vhostd/vhostd/virtio"
)

// engine is the guest's thread: it moves frames. All its fields but quit belong to that thread.
type engine struct {
	c     Config
	s     *session
	begin time.Time
	quit  *atomic.Bool // the caller wants an end
	scrap Histogram
	hist  *Histogram // where latencies go: scrap outside of what is measured

	gth, htg Count
	moved    time.Duration // when a frame last went or came, later by what this thread was away since
	idle     time.Duration // when last looked and nothing had moved, or moved
	now      time.Duration // since begin, when last looked at

	// To the host.
	tag    uint32        // of this run's frames
	number uint64        // of the next frame
	turnOf int           // which of Config.Frames it has
	origin time.Duration // with a rate: when the first frame of this run was due
	fired  uint64        // with a rate: frames sent since then
	late   uint64        // with a rate: frames that had to wait for room for longer than lateAfter
	lens   []uint32      // of the frames that are out, by chain
	sample int           // chain whose time is taken, -1: none
	since  time.Duration // when it was sent, or due

	// To the guest.
	rest    int // buffers of the current frame that are still to come
	got     int // bytes of it so far
	first   [offBody]byte
	scratch []byte // with Verify: its bytes so far

	// Of frames that are looked for when they come back (Config.Returns).
	back    uint64        // frames that have come back
	given   uint64        // frames given up, which are those below number gone
	gone    uint64        // frames below this number count no longer as under way
	next    uint64        // with Verify: the least number that may come
	thought time.Duration // until when to pause
	foreign uint64
}

// lateAfter is how late a frame may be sent and the rate still be called kept.
const lateAfter = time.Millisecond

func newEngine(c Config, s *session, quit *atomic.Bool) (*engine, error) {
	if c.Direction == Echo {
		c.Window = max(c.Window, 1)
	}
	e := &engine{c: c, s: s, begin: time.Now(), quit: quit, tag: rand.Uint32(), lens: make([]uint32, c.Size), sample: -1}
	e.hist = &e.scrap
	if c.Direction.receives() {
		return e, e.post()
	}
	return e, nil
}

// look takes the time.
func (e *engine) look() time.Duration {
	e.now = time.Since(e.begin)
	return e.now
}

// post gives all buffers of the receiveq to the device.
func (e *engine) post() error {
	q := e.s.recv
	for {
		if _, ok := q.next(); !ok {
			break
		}
		if _, err := q.add(e.c.recvSize()); err != nil {
			return fmt.Errorf("receiveq: %w", err)
		}
	}
	q.flush()
	return nil
}

// looks is how many turns go by without a look at the clock, where none needs it.
const looks = 16

// run moves frames for a time, and says for how long it did.
func (e *engine) run(d time.Duration) (ran time.Duration, err error) {
	from := e.look()
	e.origin, e.fired = from, 0
	e.progress()
	timed := e.c.Rate > 0 || e.c.Returns()
	for i := 0; ; i++ {
		worked, err := e.turn()
		if err != nil {
			return 0, err
		}
		if !worked || timed || i%looks == 0 {
			e.look()
		}
		if worked {
			e.progress()
		} else if err := e.stuck(); err != nil {
			return 0, err
		}
		if e.now >= from+d || e.quit.Load() {
			return e.now - from, e.s.err()
		}
	}
}

// progress notes that something has moved.
func (e *engine) progress() { e.moved, e.idle = e.now, e.now }

// away is a time between two looks that says that this thread had no processor: nobody looked then whether something moves.
const away = 5 * time.Millisecond

// stuck tells whether nothing has moved for too long, and gives up frames that do not come back.
func (e *engine) stuck() error {
	if gap := e.now - e.idle; gap > away {
		e.moved += gap
	}
	e.idle = e.now
	quiet := e.now - e.moved
	if e.c.Returns() && e.under() > 0 && quiet > e.c.lostAfter() {
		e.giveUp()
	}
	if quiet > e.c.patience() && (e.c.Rate == 0 || e.s.send.driver.Out() > 0) {
		return e.nothingMoves()
	}
	if e.s.fault.Load() != nil {
		return e.s.err()
	}
	return nil
}

func (e *engine) nothingMoves() error {
	if err := e.s.err(); err != nil {
		return err
	}
	what := fmt.Sprintf("the back-end has done nothing for %v", e.c.patience())
	switch {
	case e.c.Direction.sends() && e.s.send.driver.Out() > 0:
		return fmt.Errorf("%s: it holds %d chains of the transmitq", what, e.s.send.driver.Out())
	case e.c.Direction == Through:
		return fmt.Errorf("%s: no frame comes out of the other port; is it one of the same switch?", what)
	case e.c.Direction == Echo:
		return fmt.Errorf("%s: it takes frames and returns none; does it echo? (vhostd run --net null,echo=on; dpdk-testpmd --forward-mode=io)", what)
	}
	return fmt.Errorf("%s: no frame comes; does it make any? (vhostd run --net null,generate=on; dpdk-testpmd --forward-mode=txonly)", what)
}

// turn does what there is to do, once.
func (e *engine) turn() (worked bool, err error) {
	if e.c.Direction.sends() {
		n, err := e.transmit()
		if err != nil {
			return false, err
		}
		worked = e.collect() || n > 0
		if err := e.s.send.err(); err != nil {
			return false, err
		}
	}
	if e.c.Direction.receives() {
		n, err := e.receive()
		if err != nil {
			return false, err
		}
		return worked || n > 0, nil
	}
	return worked, nil
}

// transmit sends what is to be sent now.
func (e *engine) transmit() (int, error) {
	switch {
	case e.c.Rate > 0:
		return e.sendDue()
	case !e.c.Returns():
		if e.sample < 0 {
			e.look()
		}
		return e.sendBatch(e.c.Batch, e.now, 0)
	case e.c.Think > 0:
		if e.under() > 0 || e.now < e.thought {
			return 0, nil
		}
	}
	if n := e.c.Window - e.under(); n > 0 {
		return e.sendBatch(min(n, e.c.Batch), e.look(), 0)
	}
	return 0, nil
}

// sendDue sends the frames whose time has come, each with the time at which it was due.
func (e *engine) sendDue() (int, error) {
	ready := uint64((e.now-e.origin).Seconds()*e.c.Rate) + 1
	if ready <= e.fired {
		return 0, nil
	}
	gap := float64(time.Second) / e.c.Rate
	due := e.origin + time.Duration(float64(e.fired)*gap)
	n, err := e.sendBatch(int(min(ready-e.fired, uint64(e.c.Batch))), due, time.Duration(gap))
	if e.now-due > lateAfter {
		e.late += uint64(n)
	}
	e.fired += uint64(n)
	return n, err
}

// sendBatch sends up to max frames, as far as there is room; stamp is the first one's time, gap what the others are later.
func (e *engine) sendBatch(max int, stamp, gap time.Duration) (n int, err error) {
	q := e.s.send
	for ; n < max; n++ {
		buf, ok := q.next()
		if !ok {
			break
		}
		size := e.c.Frames[e.turnOf]
		if e.turnOf++; e.turnOf == len(e.c.Frames) {
			e.turnOf = 0
		}
		frame := buf[virtio.NetHdrSize : virtio.NetHdrSize+size]
		writeHead(frame, e.tag, e.number, stamp)
		if e.c.Verify {
			writeBody(frame, e.number)
		}
		id, err := q.add(virtio.NetHdrSize + size)
		if err != nil {
			return n, fmt.Errorf("transmitq: %w", err)
		}
		e.lens[id] = uint32(size)
		if e.sample < 0 {
			e.sample, e.since = int(id), stamp
		}
		e.number++
		stamp += gap
	}
	if n > 0 {
		q.flush()
	}
	return n, nil
}

// collect takes back the chains that the device has used of the transmitq.
func (e *engine) collect() bool {
	q := e.s.send
	n := 0
	for {
		id, _, _, ok := q.reap()
		if !ok {
			return n > 0
		}
		n++
		e.gth.Frames++
		e.gth.Bytes += uint64(e.lens[id])
		if int(id) == e.sample {
			e.sample = -1
			if !e.c.Returns() {
				e.hist.Add(e.look() - e.since)
			}
		}
	}
}

// receive takes frames that have come, and posts their buffers anew.
func (e *engine) receive() (n int, err error) {
	q := e.s.recv
	for ; n < e.c.Size; n++ {
		_, buf, written, ok := q.reap()
		if !ok {
			break
		}
		if n == 0 && e.c.Returns() {
			e.look()
		}
		if err := e.take(buf[:written]); err != nil {
			return n, err
		}
		if _, err := q.add(e.c.recvSize()); err != nil {
			return n, fmt.Errorf("receiveq: %w", err)
		}
	}
	if n == 0 {
		return 0, q.err()
	}
	q.flush()
	return n, q.err()
}

// take looks at a buffer that was filled. With mergeable buffers a frame may span several (virtio-v1.2 §5.1.6.3.2).
func (e *engine) take(b []byte) error {
	if e.rest == 0 {
		if err := e.takeFirst(b); err != nil {
			return err
		}
		b = b[virtio.NetHdrSize:]
	}
	e.got += len(b)
	e.rest--
	if e.c.Verify {
		e.scratch = append(e.scratch, b...)
	}
	if e.rest > 0 {
		return nil
	}
	if e.c.Returns() {
		return e.returned()
	}
	e.htg.Frames++
	e.htg.Bytes += uint64(e.got)
	return nil
}

// takeFirst looks at the first buffer of a frame.
func (e *engine) takeFirst(b []byte) error {
	if len(b) < virtio.NetHdrSize {
		return fmt.Errorf("the back-end wrote %d bytes into a buffer of the receiveq, the header alone has %d", len(b), virtio.NetHdrSize)
	}
	e.rest = 1
	if e.c.Mergeable {
		e.rest = int(binary.LittleEndian.Uint16(b[10:]))
		if e.rest == 0 || e.rest > e.c.Size {
			return fmt.Errorf("the back-end wrote num_buffers %d, queue size %d", e.rest, e.c.Size)
		}
	}
	e.got = 0
	if e.c.Returns() {
		e.scratch = e.scratch[:0]
		clear(e.first[copy(e.first[:], b[virtio.NetHdrSize:]):])
	}
	return nil
}
