package backend_test

import (
	"context"
	"encoding/binary"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/null"
	"github.com/vhostd/vhostd/offload"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
)

// hang is how long nothing ever takes, and half of what a fuzzing process gives a run.
const hang = 5 * time.Second

// FuzzSession is a front-end and its guest, both hostile: messages whole and mutilated, descriptors of all kinds, rings that are written while
// they run, memory that goes. A session answers as the protocol has it or ends; when it has ended no descriptor, mapping or
// goroutine is left; another session goes on all the while.
func FuzzSession(f *testing.F) {
	for _, s := range sessionSeeds() {
		f.Add(s)
	}
	crashOutput(f)
	v := startVictim(f)
	n := startNeighbour(f)
	var quiet [3]int
	runs := 0
	f.Fuzz(func(t *testing.T, script []byte) {
		h := newHostile(t, v)
		h.play(script)
		h.end()
		n.goesOn(t)
		if runs++; runs == 1 { // the runtime has made by now what it keeps for itself
			quiet = resources(t)
		}
		for start := time.Now(); grown(quiet, resources(t)); time.Sleep(time.Millisecond) {
			runtime.GC() // memory that faulted is unmapped when nothing refers to it any more, which Go's collector finds out
			if time.Since(start) > hang {
				t.Fatalf("descriptors, mappings and goroutines: %v are left, there were %v: after %q", resources(t), quiet, script)
			}
		}
	})
}

// hung fails the test and tells where everything stands.
func hung(t *testing.T, what string) {
	t.Helper()
	stacks := make([]byte, 1<<20)
	t.Fatalf("%s\n%s", what, stacks[:runtime.Stack(stacks, true)])
}

// crashOutput has what Go's runtime says of the end of the whole process go to the file that VHOSTD_CRASH names: what a fuzzing process writes
// to its standard error is lost.
func crashOutput(f *testing.F) {
	path := os.Getenv("VHOSTD_CRASH")
	if path == "" {
		return
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		f.Fatal(err)
	}
	defer file.Close()
	if err := debug.SetCrashOutput(file, debug.CrashOptions{}); err != nil {
		f.Fatal(err)
	}
}

// resources are the descriptors, the mappings of guest memory and the goroutines that there are.
func resources(t *testing.T) [3]int {
	return [3]int{vhosttest.FDs(t), vhosttest.Mappings(t), runtime.NumGoroutine()}
}

// grown reports whether there is more of anything.
func grown(before, now [3]int) bool {
	return now[0] > before[0] || now[1] > before[1] || now[2] > before[2]
}

// lowering is a null device that takes no offloads: everything is checked, cut and summed for it.
type lowering struct{ *null.Device }

func (d lowering) Capabilities() netdev.Capabilities {
	c := d.Device.Capabilities()
	c.FromGuest = 0
	return c
}

// SetOffloads makes sure that the back-end knows what it says.
func (d lowering) SetOffloads(accept offload.Set) error {
	if accept&^offload.All != 0 {
		panic("bug: offloads that there are not")
	}
	return nil
}

// victim is a back-end that serves the connections which come down a channel.
type victim struct {
	b     *backend.Backend
	conns chan *vhostuser.Conn
}

// Accept implements vhostuser.Acceptor.
func (v *victim) Accept(ctx context.Context) (*vhostuser.Conn, error) {
	select {
	case conn := <-v.conns:
		return conn, nil
	case <-ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close implements vhostuser.Acceptor.
func (v *victim) Close() error { return nil }

func startVictim(f *testing.F) *victim {
	dev, err := null.New(null.Options{Pairs: 2, ReadHeaders: true, Generate: true})
	if err != nil {
		f.Fatal(err)
	}
	b, err := backend.New(backend.Options{Device: lowering{dev}, DrainTimeout: 100 * time.Millisecond, MAC: [6]byte{2, 0, 0, 0, 0, 1}, MessageRate: -1})
	if err != nil {
		f.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	v := &victim{b, make(chan *vhostuser.Conn)}
	done := make(chan error)
	go func() { done <- b.Serve(ctx, v) }()
	f.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			f.Error(err)
		}
	})
	return v
}

// idle waits until no session is left.
func (v *victim) idle(t *testing.T) {
	for start := time.Now(); v.b.Stats().Connected; time.Sleep(100 * time.Microsecond) {
		if time.Since(start) > hang {
			hung(t, "the session is not cleared away")
		}
	}
}

// bystander is a session that has nothing to do with the hostile one.
type bystander struct {
	*vhosttest.Guest
	b *backend.Backend
}

func startNeighbour(f *testing.F) *bystander {
	dev, err := null.New(null.Options{ReadHeaders: true})
	if err != nil {
		f.Fatal(err)
	}
	b, err := backend.New(backend.Options{Device: dev})
	if err != nil {
		f.Fatal(err)
	}
	return &bystander{vhosttest.Start(f, b, vhosttest.Options{}), b}
}

// goesOn sends a frame and has it returned.
func (n *bystander) goesOn(t *testing.T) {
	q := n.Queues[1]
	before := n.b.Stats().Queues[1].Frames
	if err := q.Send(virtio.NetHdr{}, vhosttest.Frame(before, 200), nil); err != nil {
		t.Fatalf("the neighbour: %v", err)
	}
	if err := q.Settle(); err != nil {
		t.Fatalf("the neighbour: %v", err)
	}
	if st := n.b.Stats(); st.Queues[1].Frames != before+1 || st.FrontEndErrors+st.GuestErrors != 0 || st.Sessions != 1 {
		t.Fatalf("the neighbour has %d frames after %d, %d front-end errors, %d guest errors, %d sessions",
			st.Queues[1].Frames, before, st.FrontEndErrors, st.GuestErrors, st.Sessions)
	}
}

// hostile is a front-end over a connection of its own, with guest memory that it only reaches through the files.
type hostile struct {
	*testing.T
	victim  *victim
	front   *vhostuser.Conn
	back    *vhostuser.Conn
	done    chan struct{} // closed when the last reply has been read
	answers atomic.Uint64 // to GET_FEATURES
	files   [2]int        // of guest memory
	given   []int         // other descriptors, to be closed
	placed  [4]uint16     // chains that each queue was given
	packed  bool
}

func newHostile(t *testing.T, v *victim) *hostile {
	h := &hostile{T: t, victim: v}
	for i := range h.files {
		fd, err := unix.MemfdCreate("vhosttest", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		h.files[i] = fd
		h.truncate(i, regionSize)
	}
	h.layOut()
	h.connect()
	return h
}

// connect begins a session.
func (h *hostile) connect() {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		h.Fatal(err)
	}
	o := vhostuser.ConnOptions{PartialTimeout: 50 * time.Millisecond, WriteTimeout: hang}
	if h.front, err = vhostuser.NewConnFD(pair[0], o); err != nil {
		h.Fatal(err)
	}
	if h.back, err = vhostuser.NewConnFD(pair[1], o); err != nil {
		h.Fatal(err)
	}
	select {
	case h.victim.conns <- h.back:
	case <-time.After(hang):
		hung(h.T, "the last session does not end")
	}
	h.done = make(chan struct{})
	go h.read(h.front, h.done)
}

// read reads what is answered, each of which must be a reply, and be well-formed.
func (h *hostile) read(c *vhostuser.Conn, done chan struct{}) {
	defer close(done)
	for {
		m, err := c.ReadMessage()
		if err != nil {
			return
		}
		ack := len(m.Payload) == 8 && binary.NativeEndian.Uint64(m.Payload) <= 1
		if m.Flags != vhostuser.FlagVersion|vhostuser.FlagReply || len(m.FDs) > 0 || !ack && !asked[m.Request] {
			h.Errorf("reply to %v with flags %#x, %d bytes, %d descriptors", m.Request, m.Flags, len(m.Payload), len(m.FDs))
		}
		if m.Request == vhostuser.ReqGetFeatures {
			h.answers.Add(1)
		}
		m.CloseFDs()
	}
}

// asked are the requests that have an answer of their own.
var asked = map[vhostuser.Request]bool{
	vhostuser.ReqGetFeatures: true, vhostuser.ReqGetProtocolFeatures: true, vhostuser.ReqGetQueueNum: true, vhostuser.ReqGetConfig: true,
	vhostuser.ReqGetVringBase: true, vhostuser.ReqGetMaxMemSlots: true, vhostuser.ReqGetStatus: true,
}

// hangUp ends the session, and waits for its end.
func (h *hostile) hangUp() {
	h.front.Close()
	<-h.done
	select {
	case <-h.back.Closed():
	case <-time.After(hang):
		hung(h.T, "the session does not end")
	}
}

// end ends everything.
func (h *hostile) end() {
	h.settle()
	h.hangUp()
	h.victim.idle(h.T)
	vhostuser.CloseFDs(append(h.given, h.files[:]...))
}

// raw sends bytes. A session that has ended takes none, which is no fault.
func (h *hostile) raw(b []byte, fds ...int) {
	if len(b) > 0 {
		_ = h.front.WriteRaw(b, fds)
	}
}

// message sends a request.
func (h *hostile) message(req vhostuser.Request, payload []byte, fds ...int) {
	h.raw(append(header(req, vhostuser.FlagVersion|vhostuser.FlagNeedReply, len(payload)), payload...), fds...)
}

// settle returns when the session has answered or has ended: one of the two it must do, and soon. What runs gets a little time.
func (h *hostile) settle() {
	before := h.answers.Load()
	for start := time.Now(); h.answers.Load() == before; { // again and again: an unfinished message swallows some of it
		if time.Since(start) > hang {
			hung(h.T, "the session neither answers nor ends")
		}
		h.message(vhostuser.ReqGetFeatures, nil)
		select {
		case <-h.done:
			return
		case <-time.After(time.Millisecond):
		}
	}
}
