//go:build linux

package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/require"
	"github.com/vhostd/vhostd/test/vm/daemon"
	"github.com/vhostd/vhostd/test/vm/machine"
	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/test/vm/rpc"
	"github.com/vhostd/vhostd/virtio"
)

// part is what package require knows these tests by.
const part = "vm"

// workDir lives as long as the test binary.
var workDir string

func TestMain(m *testing.M) {
	code := func() int {
		dir, err := os.MkdirTemp("", "vhostd-vmtest-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		if err := os.Chmod(dir, 0o755); err != nil { // vhostd is in it, for other users too
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		workDir = dir
		return m.Run()
	}()
	os.Exit(code)
}

var assets = sync.OnceValues(func() (machine.Assets, error) {
	return machine.Prepare(context.Background(), workDir, func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, format+"\n", args...)
	})
})

// program builds vhostd, or takes VHOSTD_BIN: an instrumented build, say.
var program = sync.OnceValues(func() (string, error) {
	if path := os.Getenv("VHOSTD_BIN"); path != "" {
		return path, nil
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		return "", err
	}
	out := filepath.Join(workDir, "vhostd")
	return out, machine.BuildGo(context.Background(), root, out, "./cmd/vhostd")
})

// qemuBackend tells that the guest's network is QEMU's own, and vhostd is left out.
func qemuBackend() bool { return os.Getenv("VMTEST_BACKEND") == "qemu" }

// packedRings tells that every guest is to have packed rings.
func packedRings() bool { return os.Getenv("VMTEST_PACKED") != "" }

// needSplit skips what packed rings cannot show, and says why.
func needSplit(t *testing.T, why string) {
	t.Helper()
	if packedRings() {
		t.Skip("skipped with VMTEST_PACKED: " + why)
	}
}

// needVhostd skips what QEMU's own back-end cannot show.
func needVhostd(t *testing.T) {
	t.Helper()
	if qemuBackend() {
		t.Skip("VMTEST_BACKEND=qemu: this test is about vhostd alone")
	}
}

// rig is one guest with its surroundings.
type rig struct {
	t       *testing.T
	ctx     context.Context
	ns      *netlab.Namespace
	servers *netlab.Servers
	vhostd  *daemon.Daemon
	vm      *machine.Machine
	dopts   daemon.Options
	mopts   machine.Options
	boots   int // of the running machine
}

// newRig makes the namespace and its servers. What is started later is ended with the test.
func newRig(t *testing.T, net string) *rig {
	t.Helper()
	require.NotShort(t)
	require.Root(t, part)
	require.Tool(t, part, "qemu-system-x86_64")
	a, err := assets()
	if errors.Is(err, machine.ErrMissing) {
		require.Skip(t, part, "%v", err)
	}
	must(t, err)
	r := &rig{t: t, ctx: t.Context(), mopts: machine.Options{Assets: a}}
	r.ns, err = netlab.New()
	must(t, err)
	t.Cleanup(r.ns.Close)
	r.servers, err = r.ns.Serve("")
	must(t, err)
	t.Cleanup(r.servers.Close)
	dir, err := os.MkdirTemp(workDir, "run-")
	must(t, err)
	r.dopts = daemon.Options{Dir: dir, Net: net, Namespace: r.ns, Metrics: "127.0.0.1:9100"}
	if !qemuBackend() {
		r.mopts.Socket = r.dopts.Socket()
	}
	t.Cleanup(r.close)
	return r
}

// close ends vhostd and the guest, and prints what they wrote if the test failed.
func (r *rig) close() {
	if r.vm != nil {
		r.vm.Close()
	}
	if r.vhostd != nil {
		r.vhostd.Kill()
	}
	if !r.t.Failed() {
		return
	}
	if r.vm != nil {
		r.t.Logf("QEMU: %s\nguest console:\n%s", r.vm.CommandLine(), strings.Join(r.vm.Console(), "\n"))
	}
	if r.vhostd != nil {
		r.t.Logf("vhostd wrote:\n%s", strings.Join(r.vhostd.Log(), "\n"))
	}
}

// startVhostd starts the daemon (again).
func (r *rig) startVhostd() {
	r.t.Helper()
	if qemuBackend() {
		return
	}
	var err error
	r.dopts.Binary, err = program()
	must(r.t, err)
	ctx, cancel := context.WithTimeout(r.ctx, 20*time.Second)
	defer cancel()
	d, err := daemon.Start(ctx, r.dopts)
	must(r.t, err)
	r.vhostd = d
}

// boot starts QEMU (again) and waits until the guest is up.
func (r *rig) boot() {
	r.t.Helper()
	r.startMachine()
	r.waitBoot()
}

func (r *rig) startMachine() {
	r.t.Helper()
	if r.vm != nil {
		r.vm.Close()
	}
	ctx, cancel := context.WithTimeout(r.ctx, time.Minute)
	defer cancel()
	opts := r.mopts
	if packedRings() && !slices.Contains(opts.DeviceProps, "packed=on") {
		opts.DeviceProps = append([]string{"packed=on"}, opts.DeviceProps...)
	}
	start := func() (err error) {
		r.vm, err = machine.Start(ctx, opts)
		return err
	}
	r.boots = 0
	if qemuBackend() {
		must(r.t, r.ns.Do(start)) // QEMU opens the tap device itself
		return
	}
	must(r.t, start())
}

// waitBoot waits for the guest's next boot.
func (r *rig) waitBoot() {
	r.t.Helper()
	start := time.Now()
	ctx, cancel := context.WithTimeout(r.ctx, 5*time.Minute) // three seconds where nothing else runs
	defer cancel()
	r.boots++
	h, err := r.vm.WaitBoot(ctx, r.boots)
	must(r.t, err)
	r.logf("guest is up (Linux %s, boot %d) after %.1f s", h.Kernel, r.boots, time.Since(start).Seconds())
	if packedRings() && !qemuBackend() {
		r.features(virtio.FRingPacked, 0)
	}
}

func (r *rig) logf(format string, args ...any) {
	r.t.Helper()
	r.t.Logf(format, args...)
}

// exec runs a program in the guest.
func (r *rig) exec(argv ...string) string {
	r.t.Helper()
	out, err := r.vm.Exec(r.ctx, argv...)
	must(r.t, err)
	return out
}

// link configures an interface of the guest.
func (r *rig) link(a rpc.LinkArgs) rpc.LinkResult {
	r.t.Helper()
	l, err := r.vm.Link(r.ctx, a)
	must(r.t, err)
	return l
}

// healthy prints vhostd's counters of each queue, and wants none of those that count faults.
func (r *rig) healthy() {
	r.t.Helper()
	if r.vhostd == nil {
		return
	}
	s, err := r.vhostd.Stats(r.ctx)
	must(r.t, err)
	for _, q := range s.Queues {
		if q.Frames == 0 && !q.Started {
			continue
		}
		r.logf("vhostd: queue %d %s: %d frames, %d bytes, outcomes %v, %d kicks, %d calls, %d waits", q.Index, q.Direction,
			q.Frames, q.Bytes, q.Outcomes, q.Kicks, q.Calls, q.Waits)
		if q.Broken != "" || q.Malformed+q.Invalid+q.NotifyErrors+q.GivenUp != 0 {
			r.t.Errorf("queue %d: broken %q, malformed %d, invalid %d, notify errors %d, given up %d", q.Index, q.Broken,
				q.Malformed, q.Invalid, q.NotifyErrors, q.GivenUp)
		}
	}
	if s.GuestErrors+s.FrontEndErrors != 0 {
		r.t.Errorf("vhostd counted %d errors of the guest and %d of the front-end", s.GuestErrors, s.FrontEndErrors)
	}
}

// must ends the test at an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until f is true, and ends the test if it never is. The limit is generous: it ends a hang, it is no
// measurement.
func eventually(t testing.TB, limit time.Duration, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !f(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not after %v", what, limit)
		}
	}
}
