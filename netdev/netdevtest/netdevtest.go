// Package netdevtest is the suite that every device passes: what netdev.Device promises, tried on a device and the far end of its wire.
//
//	guest's rings (vring.Driver) -> zerocopy.Window -> Device -> Harness.Capture
//	guest's rings (vring.Driver) <- zerocopy.Posted <- Device <- Harness.Inject
//
// A device's own test calls Run with a function that opens the device and says how to reach the far end:
//
//	func TestDevice(t *testing.T) {
//		netdevtest.Run(t, func(t *testing.T) netdevtest.Harness { ... })
//	}
package netdevtest

import (
	"testing"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/virtio"
)

// Harness is a device that was opened for one subtest, with what is known of it.
type Harness struct {
	// Device is closed by the suite.
	Device netdev.Device
	// MaxFrame is the longest frame in bytes that the wire carries; 0 means 1514.
	MaxFrame int

	// Capture waits for the next frame of the suite's that the device sent, and returns it with what is left to do for it: the zero NetHdr
	// when it is complete. It fails the test when none comes. nil: the device's far end is no Ethernet.
	Capture func() (virtio.NetHdr, []byte)
	// Inject has a frame come from outside. nil: no frame can.
	Inject func(frame []byte)
	// Close frees the far end, after the device was closed; may be nil.
	Close func()

	// Lossless: frames that Send took arrive, however slow the far end is.
	Lossless bool
	// SendAllocates, RecvAllocates: the device does not promise to work without allocating.
	SendAllocates, RecvAllocates bool
}

// Run runs the suite. open is called for every subtest.
func Run(t *testing.T, open func(t *testing.T) Harness) {
	for _, c := range []struct {
		name string
		run  func(s *suite)
	}{
		{"Capabilities", (*suite).capabilities},
		{"SendLengths", (*suite).sendLengths},
		{"SendFragments", (*suite).sendFragments},
		{"SendWindowOrder", (*suite).sendWindowOrder},
		{"SendChecksum", (*suite).sendChecksum},
		{"SendSegments", (*suite).sendSegments},
		{"SendBadOffload", (*suite).sendBadOffload},
		{"SendBackpressure", (*suite).sendBackpressure},
		{"SendAllocates", (*suite).sendAllocates},
		{"SendThenClose", (*suite).sendThenClose},
		{"SendFaults", (*suite).sendFaults},
		{"RecvLengths", (*suite).recvLengths},
		{"RecvMerges", (*suite).recvMerges},
		{"RecvWaitsForFrame", (*suite).recvWaitsForFrame},
		{"RecvWaitsForGuest", (*suite).recvWaitsForGuest},
		{"RecvAllocates", (*suite).recvAllocates},
		{"RecvFaults", (*suite).recvFaults},
		{"CloseReturnsDescriptors", (*suite).closeReturnsDescriptors},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &suite{T: t, reopen: open}
			s.Harness = open(t)
			if s.MaxFrame == 0 {
				s.MaxFrame = 1514
			}
			if err := s.Device.SetPairs(1); err != nil {
				t.Fatalf("SetPairs(1): %v", err)
			}
			s.queue = s.Device.Queue(0)
			defer s.end()
			c.run(s)
		})
	}
}

// suite is one subtest.
type suite struct {
	*testing.T
	Harness
	reopen func(t *testing.T) Harness
	queue  netdev.Queue
	ledger ledger
	closed bool
}

// end closes the device, after which every buffer must have been released exactly once.
func (s *suite) end() {
	s.close()
	if s.Harness.Close != nil {
		s.Harness.Close()
	}
	s.ledger.check(s.T)
}

func (s *suite) close() {
	if s.closed {
		return
	}
	s.closed = true
	if err := s.Device.Close(); err != nil {
		s.Errorf("Close: %v", err)
	}
}

// needCapture and needInject skip what a device without such a far end cannot be asked.
func (s *suite) needCapture() {
	if s.Capture == nil {
		s.Skip("skipped: what this device sends cannot be captured as frames")
	}
}

func (s *suite) needInject() {
	if s.Inject == nil {
		s.Skip("skipped: no frame can come to this device from outside")
	}
}

// patience is how long the suite waits for what must come.
const patience = vhosttest.Patience

// await polls fd for events; it must become ready.
func (s *suite) await(fd int, events int16, what string) {
	s.Helper()
	if fd < 0 {
		s.Fatalf("%s is %d although something is to be waited for", what, fd)
	}
	if !Poll(s, fd, events, patience) {
		s.Fatalf("%s is not ready after %v", what, patience)
	}
}

func (s *suite) capabilities() {
	c := s.Device.Capabilities()
	if c.Kind == "" || c.MaxPairs < 1 || c.MTU < 0 || c.ZeroCopy == "" {
		s.Errorf("capabilities %+v", c)
	}
	for i := range c.MaxPairs {
		if s.Device.Queue(i) == nil {
			s.Errorf("no queue pair %d of %d", i, c.MaxPairs)
		}
	}
	for _, n := range []int{0, c.MaxPairs, 1} {
		if err := s.Device.SetPairs(n); err != nil {
			s.Errorf("SetPairs(%d): %v", n, err)
		}
	}
	if err := s.Device.SetOffloads(0); err != nil {
		s.Errorf("SetOffloads(0): %v", err)
	}
}
