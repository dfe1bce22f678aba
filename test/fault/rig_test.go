//go:build linux

// Package fault has the system calls of a running vhostd fail, one kind after the other, and looks at what becomes of its guests.
//
// A daemon serves two guests: one on the network under test, whose peer is served by another daemon that is well, and a neighbour. While calls fail,
// the guest goes on sending and receiving. Then it must be as if nothing had been: every chain has come back, frames go both ways, the
// neighbour has lost nothing, the daemon answers questions and ends when it is asked to. Which errors are tried is what the kernel can answer; each case
// says in its name what is expected of the frames that it strikes.
package fault

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/internal/sysfault"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/test/vm/daemon"
	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/virtio"
)

// part is what package require knows these tests by.
const part = "netns"

// program is the vhostd under test.
var program string

func TestMain(m *testing.M) {
	sysfault.Exec()
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "vhostd-fault-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, "vhostd")
		build := exec.Command("go", "build", "-o", program, "../../cmd/vhostd")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building vhostd: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// rig is a daemon whose calls fail, its two guests, and the peer.
type rig struct {
	t              *testing.T
	in             *sysfault.Injector
	cmd            *exec.Cmd
	log            safeBuffer
	ended          chan struct{}
	socket, beside string // of the guest, and of the neighbour
	guest, peer    *vhosttest.Guest
	seq            [2]uint64
	rounds         atomic.Uint64 // of the neighbour
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

const serving = `
[log]
level = "debug"
[control]
socket = "%[1]s/control.sock"
[port.guest]
socket-path = "%[1]s/guest.sock"
net = "%[2]s"
[port.neighbour]
socket-path = "%[1]s/neighbour.sock"
net = "null,echo=on"
`

// newRig serves net, and peer by another daemon, in a namespace.
func newRig(t *testing.T, ns *netlab.Namespace, calls []int, net, peer string) *rig {
	t.Helper()
	require.Root(t, part)
	dir := vhosttest.ShortDir(t)
	r := &rig{t: t, ended: make(chan struct{}), socket: filepath.Join(dir, "guest.sock"), beside: filepath.Join(dir, "neighbour.sock")}
	file := filepath.Join(dir, "vhostd.toml")
	if err := os.WriteFile(file, fmt.Appendf(nil, serving, dir, net), 0o600); err != nil {
		t.Fatal(err)
	}
	r.cmd = sysfault.Command(calls, program, "serve", "--config", file)
	r.cmd.Stderr = &r.log
	var err error
	if r.in, err = sysfault.Start(r.cmd, ns.Start); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = r.cmd.Wait()
		close(r.ended)
	}()
	t.Cleanup(r.end)
	vhosttest.Eventually(t, "the daemon's start", func() bool { return strings.Contains(r.log.String(), "msg=ready") })
	r.neighbour()
	r.guest = vhosttest.Start(t, nil, vhosttest.Options{Path: r.socket})
	if peer == "" {
		r.peer = r.guest // the network returns all that it gets
		return r
	}
	ctx, cancel := context.WithTimeout(context.Background(), vhosttest.Patience)
	defer cancel()
	o := daemon.Options{Binary: program, Dir: vhosttest.ShortDir(t), Net: peer, Namespace: ns}
	d, err := daemon.Start(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Kill)
	r.peer = vhosttest.Start(t, nil, vhosttest.Options{Path: o.Socket()})
	return r
}

// end ends the daemon as a service manager would.
func (r *rig) end() {
	r.in.Set()
	_ = r.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-r.ended:
	case <-time.After(vhosttest.Patience):
		r.t.Error("vhostd does not end")
		_ = r.cmd.Process.Kill()
		<-r.ended
	}
	if code := r.cmd.ProcessState.ExitCode(); code != 0 {
		r.t.Errorf("vhostd ended with code %d", code)
	}
	if log := r.log.String(); r.t.Failed() || strings.Contains(log, "panic") {
		r.t.Errorf("the log:\n%s", log[max(0, len(log)-8000):])
	}
}

// alive fails the test at once when the daemon has ended.
func (r *rig) alive() {
	r.t.Helper()
	select {
	case <-r.ended:
		r.t.Fatal("vhostd has ended")
	default:
	}
}

// neighbour starts a guest that plays with itself until the end of the test, and must not lose a frame.
func (r *rig) neighbour() {
	g := vhosttest.Start(r.t, nil, vhosttest.Options{Path: r.beside})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.play(ctx, g) }()
	r.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("the neighbour noticed: %v", err)
		}
	})
}

func (r *rig) play(ctx context.Context, g *vhosttest.Guest) error {
	for i := uint64(0); ctx.Err() == nil; i++ {
		if err := g.Send(0, virtio.NetHdr{}, vhosttest.Frame(i, 100+int(i%1000)), nil); err != nil {
			return err
		}
		_, f, err := g.Recv(0, 20*time.Second)
		if err != nil {
			return fmt.Errorf("frame %d: %w", i, err)
		}
		if seq, err := vhosttest.CheckFrame(f); err != nil || seq != i {
			return fmt.Errorf("frame %d came back as %d: %v", i, seq, err)
		}
		r.rounds.Add(1)
		time.Sleep(200 * time.Microsecond)
	}
	return nil
}

// goesOn waits until the neighbour has played some rounds.
func (r *rig) goesOn() {
	r.t.Helper()
	want := r.rounds.Load() + 3
	vhosttest.Eventually(r.t, "the neighbour's next rounds", func() bool { r.alive(); return r.rounds.Load() >= want })
}
