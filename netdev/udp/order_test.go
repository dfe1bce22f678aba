package udp_test

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os/exec"
	"testing"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/udp"
	"github.com/vhostd/vhostd/virtio"
	"github.com/vhostd/vhostd/vring"
)

// orderFrames is a million in `make soak-order`.
var orderFrames = flag.Int("frames", 20_000, "frames in each case of TestOrderThroughTheKernel")

// crossing is a guest with two peers, behind an interface each: one lets go of frames at once, the other one keeps them for a while.
type crossing struct {
	*lab
	dev   *udp.Device
	be    *backend.Backend
	g     *vhosttest.Guest
	q     *vhosttest.Queue
	slots []guestmem.GPA // that are free
	at    []guestmem.GPA // by head
	out   []uint16       // heads that are out, in order
	room  *vhosttest.Region
}

// Last bytes of the peers' addresses.
const (
	fastPeer = 0xa
	slowPeer = 0xb
)

// orderCap is the cap on frames that are sent from guest pages.
const orderCap = 60

func newCrossing(t *testing.T, o vhosttest.Options, more string) *crossing {
	t.Helper()
	c := &crossing{lab: newLab(t, 1500)}
	c.sink()
	c.Run("ip -n " + c.Here + " link add i1 mtu 65535 type ifb")
	c.Run("ip -n " + c.Here + " address add 10.7.0.1/24 dev i1")
	c.Run("ip -n " + c.Here + " link set i1 up")
	c.dev = c.device(fmt.Sprintf("vxlan:vni=42,remote=10.8.0.2;10.7.0.2,local=0.0.0.0,mtu=9000,zerocopy-min=500,zerocopy-pending=%d%s", orderCap, more))
	t.Cleanup(func() { must(t, c.dev.Close()) })
	var err error
	c.be, err = backend.New(backend.Options{Device: c.dev, Poll: 20 * time.Microsecond})
	must(t, err)
	c.g = vhosttest.Start(t, c.be, o)
	c.q = c.g.Transmitq(0)
	c.room = vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: roomAt, Size: roomSize})
	t.Cleanup(c.room.Close)
	must(t, c.g.FE.AddMemReg(c.room.MemoryRegion, c.room.FD))
	c.g.Mem.Add(c.room)
	n := c.q.Driver.Size()
	c.at = make([]guestmem.GPA, n)
	for i := range n {
		c.slots = append(c.slots, guestmem.GPA(roomAt+i*roomSize/n))
	}
	c.learn("10.8.0.2", fastPeer)
	c.learn("10.7.0.2", slowPeer)
	return c
}

// learn has the device learn that a station is behind a peer, from a frame that comes from there.
func (c *crossing) learn(peer string, station byte) {
	c.Helper()
	c.Run("ip -n " + c.Here + " address add " + peer + "/32 dev lo")
	c.In(c.Here, func() error {
		conn, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.ParseIP(peer)}, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 4789})
		if err != nil {
			return err
		}
		defer conn.Close()
		f := netdevtest.Frame(60, 0)
		copy(f[6:], []byte{2, 0, 0, 0, 1, station})
		_, err = conn.Write(append([]byte{8, 0, 0, 0, 0, 0, 42, 0}, f...))
		return err
	})
	_, _, err := c.g.Recv(0, patience)
	must(c, err)
	c.Run("ip -n " + c.Here + " address del " + peer + "/32 dev lo")
}

// add sends n bytes to a station, seen by the device after Flush. It reports false when there is no room.
func (c *crossing) add(station byte, n int) bool {
	c.Helper()
	k := len(c.slots)
	if k == 0 {
		return false
	}
	at := c.slots[k-1]
	b := c.room.Mem[at-roomAt:][:virtio.NetHdrSize+n]
	clear(b[:virtio.NetHdrSize])
	copy(b[virtio.NetHdrSize:], []byte{2, 0, 0, 0, 1, station, 2, 0, 0, 0, 0, 1, 0x88, 0xb5})
	id, err := c.q.Driver.Add([]vhosttest.Piece{{GPA: at, Len: uint32(len(b))}}, nil)
	if errors.Is(err, vring.ErrFull) {
		return false
	}
	must(c, err)
	c.slots, c.at[id], c.out = c.slots[:k-1], at, append(c.out, id)
	return true
}

// reap takes back what has come, and checks that it is what was to come.
func (c *crossing) reap() int {
	c.Helper()
	ids := reapInOrder(c, c.q, c.out)
	c.out = c.out[len(ids):]
	for _, id := range ids {
		c.slots = append(c.slots, c.at[id])
	}
	return len(ids)
}

// left counts the frames that have left through an interface.
func (c *crossing) left(dev string) (n uint64) {
	c.Helper()
	out, err := exec.Command("ip", "-n", c.Here, "-s", "-j", "link", "show", "dev", dev).Output()
	must(c, err)
	var links []struct {
		Stats struct {
			RX struct{ Packets uint64 } `json:"rx"`
		} `json:"stats64"`
	}
	must(c, json.Unmarshal(out, &links))
	return links[0].Stats.RX.Packets
}

// overtake shows that completions do come out of order: the kernel keeps the first frames, and lets go of those behind them. Then it gets
// as many as there may be, and some more.
func (c *crossing) overtake() (frames int) {
	c.Helper()
	c.hold("i1")
	for i := range 4 { // the last one is held
		c.add(slowPeer, big-500)
		c.q.Flush()
		if i < 2 {
			vhosttest.Eventually(c, "a frame that passes", func() bool { return c.reap() == 1 })
		}
	}
	had := c.dev.Stats().ByPage
	for range 50 {
		c.add(fastPeer, 1000)
	}
	c.q.Flush()
	vhosttest.Eventually(c, "completions out of order", func() bool { return c.dev.Stats().ByPage == had+50 })
	if n := c.reap(); n != 0 {
		c.Fatalf("%d chains are back before the first", n)
	}
	for range orderCap { // two more than there may be
		c.add(slowPeer, 1000)
	}
	c.q.Flush()
	vhosttest.Eventually(c, "as many frames in the kernel as there may be", func() bool {
		return c.dev.Stats().InFlight == orderCap && c.be.Stats().Queues[1].Pending == 50+2+orderCap
	})
	return 54 + orderCap
}

// TestOrderThroughTheKernel: frames to two peers, of which one is slow, copied and not, so that the kernel's completions come out of order. Every
// frame leaves once, every chain comes back once and in order, and the kernel never has more than the cap.
func TestOrderThroughTheKernel(t *testing.T) {
	for _, tt := range []struct {
		name, more string
		o          vhosttest.Options
	}{
		{"split", ",gso=off", vhosttest.Options{Without: virtio.FInOrder}},
		{"packed, in order", ",gso=off", vhosttest.Options{Packed: true}},
		{"trains", "", vhosttest.Options{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCrossing(t, tt.o, tt.more)
			fast, slow := c.left("i0"), c.left("i1")
			sent := c.overtake()
			c.Run("tc -n " + c.Here + " qdisc change dev i1 root tbf rate 600mbit burst 60000 limit 10000000")
			from, n := time.Now(), *orderFrames
			r := rand.New(rand.NewPCG(1, 2))
			for back := 0; len(c.out) > 0 || sent < n; {
				for burst := r.IntN(64); burst > 0 && sent < n; burst-- {
					if !c.add(fastPeer+byte(r.IntN(2)), []int{100, 400, 1000, 4000, 8500}[r.IntN(5)]) {
						break
					}
					sent++
				}
				c.q.Flush()
				got := c.reap()
				if back += got; got == 0 && (sent == n || len(c.slots) == 0) {
					must(t, c.q.Wait(patience))
				}
			}
			t.Logf("%d frames in %v: %v", n, time.Since(from).Round(time.Millisecond), c.be.Stats().Queues[1].Outcomes)
			c.check(n, fast, slow)
		})
	}
}

func (c *crossing) check(n int, fast, slow uint64) {
	c.Helper()
	q, st := c.be.Stats().Queues[1], c.dev.Stats()
	o := q.Outcomes
	if q.Frames != uint64(n) || q.Pending != 0 || q.SendDropped != 0 || o["dropped"] != 0 || o["zerocopied"] == 0 || o["copied_small"] == 0 || o["copied_cap"] < 2 {
		c.Errorf("%d frames sent: %+v", n, q)
	}
	if o["zerocopied"] != st.ByPage || o["copied_anyway"] != st.ByCopy || st.Most != orderCap || st.InFlight != 0 || st.Flooded != 0 {
		c.Errorf("%+v, outcomes %v", st, o)
	}
	// What was copied is back before it has left.
	var i0, i1 uint64
	vhosttest.Eventually(c, "all frames have left", func() bool {
		i0, i1 = c.left("i0")-fast, c.left("i1")-slow
		return st.Trains > 0 || i0+i1 >= uint64(n)
	})
	// A train is one to the counters, unless somebody cut it.
	if i0+i1 > uint64(n) || st.Trains == 0 && i0+i1 != uint64(n) || i0 == 0 || i1 == 0 {
		c.Errorf("%d and %d frames left, %d were sent", i0, i1, n)
	}
}
