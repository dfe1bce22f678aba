package main

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
)

// frontEndEnv has the test's own program be a guest at this socket, to be killed: see TestFrontEndKilled.
const frontEndEnv = "VHOSTD_TEST_FRONT_END"

func init() {
	path := os.Getenv(frontEndEnv)
	if path == "" {
		return
	}
	result := testing.Benchmark(func(b *testing.B) { // for its testing.TB
		holdFrames(b, vhosttest.Start(b, nil, vhosttest.Options{Path: path, SendSize: 10000}))
		select {}
	})
	fmt.Fprintln(os.Stderr, "the guest ended:", result)
	os.Exit(1)
}

// heldFrames is how many frames wait in the interface.
const heldFrames = 3

// holdFrames sends what the interface lets pass, and then frames that it holds; one of them is too many to go by page, and one too small.
func holdFrames(t testing.TB, g *vhosttest.Guest) {
	for i, n := range []int{9000, 9000, 9000, 9000, 9000, 9000, 100} {
		if err := g.Send(0, virtio.NetHdr{}, vhosttest.Frame(uint64(i), n), nil); err != nil {
			t.Fatal(err)
		}
		if i < 2 {
			if err := g.Transmitq(0).Settle(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// holder is a network namespace with an interface that lets 20000 bytes pass and holds the rest for minutes.
type holder struct {
	t    *testing.T
	name string
}

func newHolder(t *testing.T) *holder {
	t.Helper()
	require.Root(t, "netns")
	require.Tool(t, "netns", "ip")
	require.Tool(t, "netns", "tc")
	h := &holder{t, fmt.Sprintf("vhostd-cmd-%d", os.Getpid())}
	if out, err := exec.Command("ip", "netns", "add", h.name).CombinedOutput(); err != nil {
		require.Skip(t, "netns", "ip netns add: %v: %s", err, out)
	}
	t.Cleanup(func() { h.run("ip netns del " + h.name) })
	if out, err := exec.Command("ip", "-n", h.name, "link", "add", "d0", "mtu", "65535", "type", "ifb").CombinedOutput(); err != nil {
		require.Skip(t, "ifb", "the kernel has no ifb: %v: %s", err, out)
	}
	h.run("ip -n NS address add 10.9.0.1/24 dev d0")
	h.run("ip -n NS link set d0 up")
	h.run("ip -n NS neighbour replace 10.9.0.2 lladdr 02:00:00:00:00:02 dev d0")
	h.run("tc -n NS qdisc replace dev d0 root tbf rate 1kbit burst 20000 limit 10000000")
	return h
}

func (h *holder) run(command string) {
	h.t.Helper()
	args := strings.Fields(strings.ReplaceAll(command, "NS", h.name))
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		h.t.Fatalf("%s: %v: %s", command, err, out)
	}
}

// letGo drops what is held.
func (h *holder) letGo() { h.run("tc -n NS qdisc delete dev d0 root") }

// vhostd starts a daemon in the namespace.
func (h *holder) vhostd(path string) *process {
	h.t.Helper()
	return launch(h.t, exec.Command("ip", "netns", "exec", h.name, binary, "run", "--socket-path", path, "--zerocopy", "auto",
		"--net", "dgram:local=10.9.0.1:7000,remote=10.9.0.2:7000,zerocopy-pending=3"))
}

// transmitq waits until the frames are held, and returns their queue's counters.
func transmitq(t *testing.T, path string) (q queueStats) {
	t.Helper()
	eventually(t, "frames are held", func() bool {
		q = statsOf(t, path).Queues[1]
		return q.Pending == heldFrames+2 && q.MaxWaitNs > 0
	})
	return q
}

// memories counts the mappings of guest memory in a process.
func memories(t *testing.T, pid int) (n int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), "/memfd:vhosttest")
}

func descriptors(t *testing.T, pid int) (fds []string) {
	t.Helper()
	dir, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range dir {
		what, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, e.Name()))
		fds = append(fds, what)
	}
	slices.Sort(fds)
	return fds
}

// TestSignalWithFramesHeld: a signal ends vhostd although the kernel holds frames, which takes two waits of a second, and it says how many.
func TestSignalWithFramesHeld(t *testing.T) {
	h := newHolder(t)
	path := socketIn(t)
	p := h.vhostd(path)
	g := vhosttest.Start(t, nil, vhosttest.Options{Path: path, SendSize: 10000})
	holdFrames(t, g)
	transmitq(t, path)
	from := time.Now()
	if code := p.end(syscall.SIGTERM); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	t.Logf("ended after %v", time.Since(from).Round(time.Millisecond))
	for _, want := range []string{
		fmt.Sprintf(`frames still in flight were returned to the guest" queue=1 frames=%d`, heldFrames),
		fmt.Sprintf(`ending with frames in the kernel, which will leave all the same" frames=%d `, heldFrames),
	} {
		if !strings.Contains(p.stderr.String(), want) {
			t.Errorf("the log does not say %s", want)
		}
	}
	if n := g.Transmitq(0).Reap(); n != heldFrames+2 || g.Transmitq(0).Driver.Err() != nil {
		t.Errorf("%d chains are back, want %d: %v", n, heldFrames+2, g.Transmitq(0).Driver.Err())
	}
}

// TestFrontEndKilled: the VMM is killed with frames in the kernel. Its memory stays until they have left, and the next VMM need not wait for that.
func TestFrontEndKilled(t *testing.T) {
	h := newHolder(t)
	path := socketIn(t)
	p := h.vhostd(path)
	pid := p.cmd.Process.Pid // ip has become vhostd
	fds := descriptors(t, pid)
	guest := exec.Command(os.Args[0])
	guest.Env = append(os.Environ(), frontEndEnv+"="+path)
	guest.Stderr = os.Stderr
	if err := guest.Start(); err != nil {
		t.Fatal(err)
	}
	defer guest.Wait() //nolint:errcheck // killed
	transmitq(t, path)
	if err := guest.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the session ends", func() bool { return !statsOf(t, path).Connected })
	if q := statsOf(t, path).Queues[1]; q.GivenUp != heldFrames || memories(t, pid) == 0 {
		t.Errorf("%d mappings of guest memory, %+v", memories(t, pid), q)
	}
	next := vhosttest.Start(t, nil, vhosttest.Options{Path: path})
	for _, err := range []error{next.Send(0, virtio.NetHdr{}, vhosttest.Frame(0, 100), nil), next.Transmitq(0).Settle()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	next.Close()
	if memories(t, pid) == 0 {
		t.Error("the memory of frames in the kernel was unmapped")
	}
	h.letGo()
	eventually(t, "the memory is unmapped", func() bool { return memories(t, pid) == 0 })
	eventually(t, "no descriptor is left: "+fmt.Sprint(fds), func() bool { return slices.Equal(descriptors(t, pid), fds) })
	if code := p.end(syscall.SIGTERM); code != exitOK {
		t.Errorf("exit code %d", code)
	}
}

// TestZeroCopyStats: `vhostd stats` tells what became of the guest's pages, and what the kernel holds.
func TestZeroCopyStats(t *testing.T) {
	h := newHolder(t)
	path := socketIn(t)
	h.vhostd(path)
	holdFrames(t, vhosttest.Start(t, nil, vhosttest.Options{Path: path, SendSize: 10000}))
	q := transmitq(t, path)
	if o := q.Outcomes; o["zerocopied"] != 2 || q.MaxPending < heldFrames+2 {
		t.Errorf("%+v", q)
	}
	table := func() string { return command(t, "stats", "--socket-path", path).stdout }
	const columns = `QUEUE +ZEROCOPIED +COPIED +COPIED SMALL +COPIED CAP +COPIED FALLBACK +COPIED ANYWAY +DROPPED +PENDING +AT MOST +LONGEST WAIT +GIVEN UP\n`
	held := regexp.MustCompile(columns + ` +1 +2 +0 +0 +0 +0 +0 +0 +5 +[5-7] +[1-9][0-9.]*[mµ]?s +0\n`)
	if got := table(); !held.MatchString(got) {
		t.Errorf("with frames held:\n%s", got)
	}
	h.letGo()
	gone := regexp.MustCompile(columns + ` +1 +5 +0 +1 +1 +0 +0 +0 +0 +[5-7] +[1-9][0-9.]*[mµ]?s +0\n`)
	eventually(t, "all frames in the table", func() bool { return gone.MatchString(table()) })
}
