package l2switch_test

import (
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/l2switch"
	"github.com/vhostd/vhostd/virtio"
)

// TestTooBigIsCounted: a frame that the guest's buffers can never take is among the drops of its port.
func TestTooBigIsCounted(t *testing.T) {
	s := newSwitch(t, l2switch.Config{})
	a := start(t, s, l2switch.PortConfig{Name: "a"}, vhosttest.Options{})
	start(t, s, l2switch.PortConfig{Name: "b"}, vhosttest.Options{Without: virtio.FNetMrgRxbuf, RecvSize: 256})
	a.send(t, frame(everybody, mac(1), 1, 1000))
	vhosttest.Eventually(t, "the drop", func() bool { return port(t, s, "b").Drops[l2switch.DropTooBig.String()] == 1 })
}

// TestStarvedIsCounted: a frame that was lost because there was no room for its copy is among what the device lost on the way to its guest.
func TestStarvedIsCounted(t *testing.T) {
	const size = 60000
	l := newLab(t, l2switch.Config{Hold: time.Millisecond, BacklogBytes: virtio.MaxFrame}, l2switch.PortConfig{Name: "a"}, l2switch.PortConfig{Name: "b"})
	l.passes("b", "a", frame(everybody, mac(2), 1, 60), nil)
	for i := range uint64(3) {
		l.send("a", virtio.NetHdr{}, frame(mac(2), mac(1), i, size))
	}
	vhosttest.Eventually(t, "the drops", func() bool { return l.drops("b", l2switch.DropBacklog) == 2 })
	if n := l.ports["b"].Queue(0).Counters().RecvDropped; n != 2 {
		t.Errorf("the device counts %d frames, want 2", n)
	}
}

// TestBacklogIsMemory: what is bounded is the memory of copies, not the bytes in it, which the sender chooses: frames of just more than a size of memory take the next.
func TestBacklogIsMemory(t *testing.T) {
	const memory, jumbo = 1 << 20, 16 << 10
	for size, most := range map[int]int{2000: 256, 2100: memory / jumbo, jumbo + 1: memory / virtio.MaxFrame} {
		l := newLab(t, l2switch.Config{Hold: time.Millisecond, Backlog: 256, BacklogBytes: memory}, l2switch.PortConfig{Name: "a"}, l2switch.PortConfig{Name: "b"})
		for i := range uint64(600) {
			l.send("a", virtio.NetHdr{}, frame(everybody, mac(1), i, size)) // a copy at once
		}
		if st := l.stats("b"); st.Waiting == 0 || st.Waiting > most {
			t.Errorf("%d frames of %d bytes wait in %d bytes of memory, want %d at most", st.Waiting, size, memory, most)
		}
	}
}

// TestLostFramesGiveNoMemoryBack: a frame that was lost instead of copied took no memory, and frees none when its turn comes. Whoever has enough of them lost would have
// room for copies without end.
func TestLostFramesGiveNoMemoryBack(t *testing.T) {
	l := newLab(t, l2switch.Config{Hold: 50 * time.Millisecond, BacklogBytes: virtio.MaxFrame}, l2switch.PortConfig{Name: "a"}, l2switch.PortConfig{Name: "b"})
	l.passes("b", "a", frame(everybody, mac(2), 1, 60), nil)
	for i := range uint64(50) {
		l.send("a", virtio.NetHdr{}, frame(mac(2), mac(1), i, 60000))
	}
	vhosttest.Eventually(t, "all are copied, or lost", func() bool { return l2switch.Held(l.ports["b"]) == 0 })
	l.expect("b", frame(mac(2), mac(1), 0, 60000))
	l.passes("a", "b", frame(mac(2), mac(1), 4711, 60), nil) // behind those that are lost
	if all, shares := l2switch.Copied(l.ports["b"]); all != 0 || shares != 0 {
		t.Errorf("copies take %d bytes, %d by shares, with none left", all, shares)
	}
}
