package udp_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/shm"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev/netdevtest"
	"github.com/vhostd/vhostd/netdev/udp"
	"github.com/vhostd/vhostd/zerocopy"
)

// guestRAM is a memory file as a guest's, and the mapping of it that a session has.
type guestRAM struct {
	*shm.Mapping
	fd int
}

func newRAM(t testing.TB, size int) *guestRAM {
	t.Helper()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	must(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	must(t, unix.Ftruncate(fd, int64(size)))
	m, err := shm.Map(fd, 0, uint64(size))
	must(t, err)
	t.Cleanup(func() { must(t, m.Unmap()) })
	return &guestRAM{m, fd}
}

// register tells r's device its guest's memory, or ends the test where the kernel cannot do what is wanted with it.
func (r *rig) register(regions ...[]byte) {
	r.Helper()
	if err := r.dev.SetMemory(regions); err != nil {
		if strings.Contains(err.Error(), "Linux 6.15") {
			require.Skip(r, "uring", "%v", err)
		}
		r.Fatal(err)
	}
}

func (r *rig) registered() uint64 { return r.dev.Stats().Registered }

// TestRegisteredFramesArrive: frames leave from registered memory in whatever pieces they are, and what lies elsewhere is no obstacle.
func TestRegisteredFramesArrive(t *testing.T) {
	r := newRig(t, ",zerocopy=on,no-balloon=on")
	defer r.close()
	one, two := newRAM(t, 1<<20), newRAM(t, 1<<20)
	r.register(one.Bytes, two.Bytes)
	heap := make([]byte, 1<<16)
	frame := netdevtest.Frame(60000, 1)
	rng := rand.New(rand.NewPCG(1, 2))
	for round := range 300 {
		n := etherLen + rng.IntN(len(frame)-etherLen)
		if round%2 == 0 {
			n = etherLen + rng.IntN(5000)
		}
		var frags [][]byte
		for off := 0; off < n; {
			mem := [][]byte{one.Bytes, two.Bytes, heap}[rng.IntN(3)]
			m := min(n-off, 1+rng.IntN([]int{n, 150}[rng.IntN(2)]))
			last := off+m == n
			if &mem[0] == &heap[0] {
				if m > 200 || last { // more than joins the tunnel header, or the frame's end
					mem = one.Bytes
				}
			}
			at := rng.IntN(len(mem) - m + 1)
			mem = mem[at : at+m]
			copy(mem, frame[off:])
			frags = append(frags, mem)
			off += m
		}
		if !overlap(frags) {
			r.send(frags...)
			if got := r.far.recv(); !bytes.Equal(got, frame[:n]) {
				t.Fatalf("round %d: %d bytes in %d pieces: %d others arrived", round, n, len(frags), len(got))
			}
			r.next(t)
		}
	}
	if st := r.dev.Stats(); st.Registered < 50 || st.Registered == st.ByCopy+st.ByPage || r.q.Counters().SendDropped != 0 {
		t.Errorf("%+v: want frames of both kinds, and none dropped", st)
	}
}

// overlap reports whether pieces of a frame lie in the same memory, so that they were written over.
func overlap(frags [][]byte) bool {
	for i, a := range frags {
		for _, b := range frags[:i] {
			if shm.Addr(a) < shm.Addr(b)+uintptr(len(b)) && shm.Addr(b) < shm.Addr(a)+uintptr(len(a)) {
				return true
			}
		}
	}
	return false
}

// TestRegisteredPolicy: registered memory has a least size of its own, and first bytes that lie elsewhere travel in private memory.
func TestRegisteredPolicy(t *testing.T) {
	r := newRig(t, ",no-balloon=on")
	defer r.close()
	ram := newRAM(t, 1<<20)
	r.register(ram.Bytes)
	copy(ram.Bytes[100:], netdevtest.Frame(70000, 1))
	heap := netdevtest.Frame(5000, 2)
	const least = udp.DefaultRegisteredMin
	for _, c := range []struct {
		name  string
		frags [][]byte
		want  zerocopy.Outcome
		fixed uint64
	}{
		{"least", [][]byte{ram.Bytes[100:][:least]}, zerocopy.CopiedAnyway, 1},
		{"less", [][]byte{ram.Bytes[100:][:least-1]}, zerocopy.CopiedSmall, 0},
		{"elsewhere, of that size", [][]byte{heap[:least]}, zerocopy.CopiedSmall, 0},
		{"elsewhere, and large", [][]byte{heap}, zerocopy.CopiedAnyway, 0},
		{"header elsewhere", [][]byte{heap[:100], ram.Bytes[200:60000]}, zerocopy.CopiedAnyway, 1},
		{"a page elsewhere", [][]byte{heap[:4096], ram.Bytes[200:10000]}, zerocopy.CopiedAnyway, 1},
		{"more than a page elsewhere", [][]byte{heap[:4097], ram.Bytes[200:10000]}, zerocopy.CopiedAnyway, 0},
		{"18 pages", [][]byte{ram.Bytes[101:][:65000]}, zerocopy.CopiedAnyway, 1},
		{"header elsewhere and 18 pages", [][]byte{heap[:54], ram.Bytes[101:][:65000]}, zerocopy.CopiedAnyway, 1},
		{"trailer elsewhere", [][]byte{ram.Bytes[100:10000], heap[:1]}, zerocopy.CopiedAnyway, 0},
	} {
		before := r.registered()
		r.send(c.frags...)
		if got := r.far.recv(); !bytes.Equal(got, bytes.Join(c.frags, nil)) {
			t.Fatalf("%s: %d bytes arrived, or others", c.name, len(got))
		}
		if o := r.next(t); o != c.want || r.registered()-before != c.fixed {
			t.Errorf("%s: %v, %d from registered memory; want %v, %d", c.name, o, r.registered()-before, c.want, c.fixed)
		}
	}
}

// TestWhyNoBalloonIsAsked: when a page is taken from the guest and it gets another, as by a balloon, a frame from registered memory has the
// old page's bytes. So memory is registered only where somebody promises that this does not happen; else the new page is what is sent.
func TestWhyNoBalloonIsAsked(t *testing.T) {
	for _, c := range []struct{ options, want string }{{",zerocopy=on", "new"}, {",zerocopy=on,no-balloon=on", "old"}, {",zerocopy=off,no-balloon=on", "new"}} {
		t.Run(c.options[1:], func(t *testing.T) {
			r := newRig(t, c.options)
			defer r.close()
			ram := newRAM(t, 1<<20)
			old, fresh := netdevtest.Frame(9000, 1), netdevtest.Frame(9000, 2)
			copy(ram.Bytes, old)
			r.register(ram.Bytes)
			must(t, unix.Fallocate(ram.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20))
			copy(ram.Bytes, fresh)
			r.send(ram.Bytes[:9000])
			got, is := r.far.recv(), "neither"
			if bytes.Equal(got, old) {
				is = "old"
			} else if bytes.Equal(got, fresh) {
				is = "new"
			}
			if is != c.want {
				t.Errorf("the bytes are those of the %s page, want the %s", is, c.want)
			}
			r.next(t)
			// A new table is a new look at the pages.
			r.register(ram.Bytes)
			r.send(ram.Bytes[:9000])
			if !bytes.Equal(r.far.recv(), fresh) {
				t.Error("old bytes after the memory was registered again")
			}
			r.next(t)
		})
	}
}

// TestRegisteredMemoryGoesUnderFrames: memory that goes while the kernel holds a frame of it is waited for as long as Close waits, and the
// frame leaves unharmed whatever the memory is used for afterwards.
func TestRegisteredMemoryGoesUnderFrames(t *testing.T) {
	r := newRig(t, ",zerocopy=on,no-balloon=on")
	defer r.close()
	ram, other := newRAM(t, 1<<20), newRAM(t, 1<<20)
	r.register(ram.Bytes)
	r.fill()
	frame := netdevtest.Frame(9000, 1)
	copy(ram.Bytes, frame[54:])
	r.send(bytes.Clone(frame[:54]), ram.Bytes[:9000-54]) // its first bytes travel in private memory
	r.none(t)
	start := time.Now()
	r.register(other.Bytes)
	if d := time.Since(start); d < udp.DefaultDrain {
		t.Errorf("the memory went after %v, under a frame in flight: not before %v", d, udp.DefaultDrain)
	}
	must(t, unix.Fallocate(ram.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20))
	clear(ram.Bytes)
	must(t, ram.Unmap())
	second := netdevtest.Frame(9000, 2)
	copy(other.Bytes, second)
	r.send(other.Bytes[:9000])
	if n := r.registered(); n != 2 {
		t.Errorf("%d frames from registered memory, want 2", n)
	}
	r.release("v0")
	r.send(netdevtest.Frame(60, 3))
	for i, want := range [][]byte{frame, second, netdevtest.Frame(60, 3)} {
		if got := r.far.recv(); !bytes.Equal(got, want) {
			t.Fatalf("frame %d: %d bytes arrived, want others, %d", i, len(got), len(want))
		}
	}
	r.want(t, zerocopy.CopiedAnyway, zerocopy.CopiedAnyway, zerocopy.CopiedAnyway)
	r.register()
	vhosttest.Eventually(t, "nothing is pinned", func() bool { return pinned(t) == 0 }) // the kernel ends rings, of tests before as well, in its own time
}

// TestRegisteredMemoryIsWaitedFor: a frame that leaves in time does not hold up a change of memory any longer.
func TestRegisteredMemoryIsWaitedFor(t *testing.T) {
	r := newRig(t, ",zerocopy=on,no-balloon=on", drainPatiently)
	defer r.close()
	ram := newRAM(t, 1<<20)
	r.register(ram.Bytes)
	r.fill()
	copy(ram.Bytes, netdevtest.Frame(9000, 1))
	r.send(ram.Bytes[:9000])
	done := make(chan error)
	go func() { done <- r.dev.SetMemory(nil) }()
	r.none(t)
	r.purge("v0")
	must(t, <-done)
	select {
	case <-r.outcomes:
	default:
		t.Error("the memory went before the frame")
	}
}

// TestRegisteringFails: what cannot be registered is an error, and frames leave all the same.
func TestRegisteringFails(t *testing.T) {
	t.Run("heap", func(t *testing.T) {
		r := newRig(t, ",zerocopy=on,no-balloon=on")
		defer r.close()
		frame := netdevtest.Frame(1<<16, 1)
		if err := r.dev.SetMemory([][]byte{frame}); !errors.Is(err, unix.EINVAL) {
			t.Errorf("memory of the heap: %v", err)
		}
		testUnregistered(t, r, frame[:9000])
	})
	t.Run("limit", func(t *testing.T) {
		r := newRig(t, ",zerocopy=on,no-balloon=on")
		r.close()
		options, err := udp.ParseOptions(fmt.Sprintf("dgram:local=%s:7000,remote=%s:7000,zerocopy=on,no-balloon=on", hereIP, thereIP))
		must(t, err)
		r.In(r.Here, func() (err error) {
			if err := dropLockedMemory(); err != nil {
				return err
			}
			r.dev, err = udp.Open(options)
			return err
		})
		r.q = r.dev.Queue(0)
		defer r.close()
		var limit unix.Rlimit
		must(t, unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit))
		if limit.Cur > 64<<20 {
			require.Skip(t, "memlock", "the limit on locked memory is %d bytes, too many to exceed here", limit.Cur)
		}
		ram := newRAM(t, int(limit.Cur)+1<<20)
		copy(ram.Bytes, netdevtest.Frame(9000, 1))
		err = r.dev.SetMemory([][]byte{ram.Bytes})
		if !errors.Is(err, unix.ENOMEM) || !strings.Contains(err.Error(), "LimitMEMLOCK=") {
			t.Errorf("more than the limit: %v", err)
		}
		testUnregistered(t, r, ram.Bytes[:9000])
	})
}

func testUnregistered(t *testing.T, r *rig, frame []byte) {
	t.Helper()
	r.send(frame)
	if !bytes.Equal(r.far.recv(), frame) {
		t.Error("the frame arrived otherwise")
	}
	if o := r.next(t); o != zerocopy.CopiedAnyway || r.registered() != 0 {
		t.Errorf("released as %v, %d from registered memory", o, r.registered())
	}
}

// pinned is how many bytes this process has pinned (VmPin of /proc/self/status).
func pinned(t *testing.T) int {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	must(t, err)
	_, line, _ := strings.Cut(string(status), "VmPin:")
	var kib int
	if _, err := fmt.Sscan(line, &kib); err != nil {
		t.Fatalf("VmPin of /proc/self/status: %v", err)
	}
	return kib << 10
}
