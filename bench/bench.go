// Package bench drives a vhost-user net back-end as a guest would, any back-end, and measures what it does: the front-end's messages, guest
// memory, the driver ends of a receiveq and a transmitq, and frames.
//
// # Theory of operation
//
//	          one thread, on one processor                        the back-end, another process
//	+--------------------------------------------+
//	| fill slots -> Add ... Publish -> kick      |   transmitq   +-----------+
//	|                            Reap -> slots   | <-----------> |           |
//	| count, check <- Reap ... Add, Publish      | <-----------> |           |
//	+--------------------------------------------+   receiveq    +-----------+
//	  slots: buffers in a memory file, taken and given back first in, first out
//
// The driver polls and asks for no calls, as a guest under load does, so what is measured is the back-end. It writes the head of each frame
// anew, as a guest's driver and stack do, and looks at the head of each that comes. All else of a frame is written once, unless Verify is set.
//
// Time is cut into windows of a second. Before and after each the thread stands still and measures how far it is from the back-end's
// busiest thread (internal/placement): a window has a class, and windows in which something else had one of the processors are
// not quiet. Only quiet windows of one class are worth comparing; Result keeps them apart.
//
// What a back-end must not do is noticed and ends the run: a used element that makes no sense (vring.Driver), num_buffers that do
// not fit, a chain that never comes back, a message that is refused, a connection that ends. With Verify also a frame that comes back
// changed, twice, or out of order. A frame that does not come back at all is counted as lost.
package bench

import (
	"errors"
	"fmt"
	"time"

	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// Direction says which way frames go, in words that are the same for guest and host.
type Direction string

// The directions. Echo is for a back-end that returns what it gets.
const (
	GuestToHost Direction = "guest-to-host"
	HostToGuest Direction = "host-to-guest"
	Both        Direction = "both"
	Echo        Direction = "echo"
	Through     Direction = "through" // into one port of a switch and out of another
)

// sends and receives tell what the driver does in a direction.
func (d Direction) sends() bool    { return d != HostToGuest }
func (d Direction) receives() bool { return d != GuestToHost }

// Limits of a frame in bytes, without frame check sequence: the shortest is Ethernet's.
const (
	MinFrame = 60
	MaxFrame = virtio.MaxFrame
)

// Config says what to do. DefaultConfig is a start.
type Config struct {
	Path   string // of the vhost-user socket
	To     string // with Through: of the other port's
	Server bool   // listen there for a back-end that connects

	Packed    bool
	Size      int  // of each queue, in descriptors
	Batch     int  // frames made available at once
	Chain     int  // descriptors of a chain: header and frame in one, or the header in one and the frame cut into the others
	Indirect  bool // chains in tables of their own
	InOrder   bool
	Mergeable bool
	EventIdx  bool // if the back-end offers it
	Buffer    int  // bytes of a receive buffer; 0: 2048, or what the longest frame takes if that is more and buffers are not mergeable

	Direction Direction
	Frames    []int         // lengths in bytes, in turns; the longest is also the longest that is expected to come
	Rate      float64       // frames per second to send; 0: as fast as they go
	Window    int           // with Echo or Through and no Rate: frames under way; 0: with Echo 1, with Through as many as go
	Think     time.Duration // with a Window: pause from the last frame's return to the next
	Duration  time.Duration // that is measured
	WarmUp    time.Duration // before that
	Verify    bool          // with Echo, or Through and a Window: make, number and check all bytes
	LostAfter time.Duration // with these: how long nothing may come back before what is under way is lost; 0: 1 s
	Patience  time.Duration // how long the back-end may do nothing; 0: 10 s

	Huge bool // memory of huge pages, 2 MiB each
	Cold int  // bytes that the buffers of each queue are spread over; 0: as few as there can be
	CPU  int  // processor to run on; -1: any

	// Progress, if not nil, is told each second; from the goroutine of Run.
	Progress func(done, total int, s Second)
}

// DefaultConfig sends frames of 64 bytes, as fast as they go.
func DefaultConfig() Config {
	return Config{
		Size: 256, Batch: 32, Chain: 1, Mergeable: true, EventIdx: true, Direction: GuestToHost, Frames: []int{64},
		Duration: 10 * time.Second, WarmUp: time.Second, CPU: -1,
	}
}

// maxChain is the most descriptors of a chain that the driver makes.
const maxChain = 64

// Returns tells whether each frame is looked for when it comes back: with Echo, and with Through if there is a Window.
func (c Config) Returns() bool { return c.Direction == Echo || c.Direction == Through && c.Window > 0 }

// Check says what is wrong with c, in the words of vhostd bench.
func (c Config) Check() error {
	if err := vring.CheckSize(c.Size, c.Packed); err != nil {
		return err
	}
	switch {
	case c.Path == "":
		return errors.New("the path of the socket is empty")
	case c.Batch < 1 || c.Batch > c.Size:
		return fmt.Errorf("batches of %d frames, must be 1 to the queue size %d", c.Batch, c.Size)
	case c.Chain < 1 || c.Chain > min(maxChain, c.Size):
		return fmt.Errorf("chains of %d descriptors, must be 1 to %d", c.Chain, min(maxChain, c.Size))
	case c.Indirect && c.Chain < 2:
		return errors.New("indirect chains have at least 2 descriptors")
	case c.Duration <= 0 || c.WarmUp < 0 || c.Patience < 0 || c.LostAfter < 0:
		return fmt.Errorf("measuring for %v after %v, with patience for %v", c.Duration, c.WarmUp, c.Patience)
	case c.Cold < 0:
		return fmt.Errorf("buffers spread over %d bytes", c.Cold)
	case c.CPU < -1:
		return fmt.Errorf("processor %d", c.CPU)
	}
	return errors.Join(c.checkFrames(), c.checkTraffic())
}

func (c Config) checkFrames() error {
	if len(c.Frames) == 0 {
		return errors.New("no frame length")
	}
	for _, n := range c.Frames {
		if n < MinFrame || n > MaxFrame {
			return fmt.Errorf("frames of %d bytes, must be %d to %d", n, MinFrame, MaxFrame)
		}
		if c.Chain > 1 && n < c.Chain {
			return fmt.Errorf("frames of %d bytes in %d descriptors", n, c.Chain)
		}
	}
	if least := virtio.NetHdrSize + c.Chain; c.Buffer != 0 && (c.Buffer < least || c.Buffer > maxBuffer) {
		return fmt.Errorf("receive buffers of %d bytes, must be %d to %d", c.Buffer, least, maxBuffer)
	}
	return nil
}

func (c Config) checkTraffic() error {
	switch c.Direction {
	case GuestToHost, HostToGuest, Both, Echo, Through:
	default:
		return fmt.Errorf("unknown direction %q", c.Direction)
	}
	switch {
	case (c.To != "") != (c.Direction == Through):
		return fmt.Errorf("a second port is for direction %s, and needed there", Through)
	case c.To != "" && c.Server:
		return errors.New("back-ends that connect have one port")
	case c.Rate < 0 || c.Rate > 1e9:
		return fmt.Errorf("a rate of %g frames per second", c.Rate)
	case c.Rate > 0 && !c.Direction.sends():
		return errors.New("a rate is for frames that the guest sends")
	case c.Rate > 0 && c.Think > 0:
		return errors.New("a rate and a pause between frames exclude each other")
	case c.Window < 0 || c.Window > c.Size/c.Chain:
		return fmt.Errorf("%d frames under way, must be 1 to %d", c.Window, c.Size/c.Chain)
	case c.Window > 0 && c.Rate > 0 && c.Direction == Through:
		return errors.New("a rate and a number of frames under way exclude each other")
	case c.Think < 0 || c.Think > 0 && !c.Returns():
		return fmt.Errorf("a pause of %v between frames is for echo, or through with a number of frames under way", c.Think)
	case c.Verify && !c.Returns():
		return errors.New("contents can be verified with echo, or through with a number of frames under way")
	}
	return nil
}

// maxBuffer is the most bytes of a receive buffer.
const maxBuffer = 1 << 20

// defaultBuffer is what a page holds twice, as drivers like it.
const defaultBuffer = 2048

// longest is the longest frame.
func (c Config) longest() (n int) {
	for _, f := range c.Frames {
		n = max(n, f)
	}
	return n
}

// recvSize is the length of a receive buffer.
func (c Config) recvSize() int {
	switch {
	case c.Buffer > 0:
		return c.Buffer
	case c.Mergeable:
		return defaultBuffer
	}
	return max(defaultBuffer, virtio.NetHdrSize+c.longest())
}

// featureOf says how to do without a feature, for the error when it is missing.
var featureOf = []struct {
	f       virtio.Features
	want    func(c Config) bool
	without string
}{
	{virtio.FVersion1, func(Config) bool { return true }, ""},
	{virtio.FRingPacked, func(c Config) bool { return c.Packed }, "; --ring split does without"},
	{virtio.FIndirectDesc, func(c Config) bool { return c.Indirect }, "; without --indirect it is not needed"},
	{virtio.FInOrder, func(c Config) bool { return c.InOrder }, "; without --in-order it is not needed"},
	{virtio.FNetMrgRxbuf, func(c Config) bool { return c.Mergeable }, "; --mrg-rxbuf off does without"},
}

// features are those to accept of what is offered.
func (c Config) features(offered virtio.Features) (virtio.Features, error) {
	accept := offered & virtio.FProtocolFeatures
	if c.EventIdx {
		accept |= offered & virtio.FEventIdx
	}
	for _, row := range featureOf {
		if !row.want(c) {
			continue
		}
		if !offered.Has(row.f) {
			return 0, fmt.Errorf("the back-end does not offer %v%s (it offers %v)", row.f, row.without, offered)
		}
		accept |= row.f
	}
	return accept, nil
}
