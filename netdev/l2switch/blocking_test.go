package l2switch_test

import (
	"encoding/binary"
	"math"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/l2switch"
	"github.com/vhostd/vhostd/virtio"
)

// TestReceiverWhoseCallBlocks has a guest be sent a frame whose front-end has filled its call descriptor and made it block. It is notified on the sender's
// thread, who has others to send to.
func TestReceiverWhoseCallBlocks(t *testing.T) {
	vhosttest.NoLeaks(t)
	s := newSwitch(t, l2switch.Config{})
	a := start(t, s, l2switch.PortConfig{Name: "a"}, vhosttest.Options{})
	b := start(t, s, l2switch.PortConfig{Name: "b"}, vhosttest.Options{})
	bad := start(t, s, l2switch.PortConfig{Name: "bad"}, vhosttest.Options{Without: virtio.FEventIdx})
	a.meet(t, 0, b, bad)
	b.meet(t, 1, a, bad)
	bad.meet(t, 2, a, b)
	q := bad.Receiveq(0)
	fd := q.Call.FD()
	vhosttest.Eventually(t, "room in the call descriptor", func() bool { // the call for a frame that has come may come behind it
		q.Call.Drain()
		_, err := unix.Write(fd, binary.NativeEndian.AppendUint64(nil, math.MaxUint64-1))
		return err == nil
	})
	if err := unix.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
	defer func() {
		unix.SetNonblock(fd, true)
		q.Call.Drain()
	}()
	q.Driver.EnableCall()
	a.send(t, frame(mac(2), mac(0), 1, 100))
	a.send(t, frame(mac(1), mac(0), 2, 100))
	_, f, err := b.Recv(0, vhosttest.Patience)
	if err != nil {
		t.Fatalf("another guest, after a frame for the bad one: %v", err)
	}
	if seq, err := number(f); seq != 2 || err != nil {
		t.Fatalf("frame %d, %v", seq, err)
	}
	vhosttest.Eventually(t, "the end of the bad one's session", func() bool { return !bad.b.Stats().Connected })
}
