//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/test/vm/netlab"
	"github.com/vhostd/vhostd/zerocopy"
)

// mode is a way to send.
type mode struct {
	name    string
	options string // for --net, with a comma before each
	binary  string // of vhostd; "" is -vhostd
}

func parseMode(s string) mode {
	what, binary, _ := strings.Cut(s, "@")
	policy, extra, found := strings.Cut(what, "+")
	m := mode{s, ",zerocopy=" + policy, binary}
	if found {
		m.options += "," + strings.ReplaceAll(extra, "+", ",")
	}
	return m
}

// off: vhostd must copy.
func (m mode) off() bool { return strings.HasPrefix(m.options, ",zerocopy=off") }

// turn is what one vhostd and one guest did.
type turn struct {
	Path, Mode string
	Size       int // bytes
	Hot        bool
	Round      int
	Frames     uint64
	Ns         int64 // that it took
	CPUNs      int64 // the figure: vhostd and ksoftirqd, and interrupts if they are apart

	VhostdNs, SoftirqdNs, IrqNs, KthreadsNs, GuestNs, BusyNs, StolenNs int64

	Outcomes   map[string]uint64
	MaxPending int
	MaxWaitNs  int64
	Kicks      uint64
	Arrived    uint64 // frames at the path's end

	Noise    string `json:",omitempty"` // why the figure is doubtful
	Unproven string `json:",omitempty"` // why it is not what the mode says
}

func (t *turn) perFrame() float64 { return float64(t.CPUNs) / float64(t.Frames) }

// share is the part of frames with an outcome.
func (t *turn) share(o zerocopy.Outcome) float64 {
	return float64(t.Outcomes[o.String()]) / float64(t.Frames)
}

// rig is a running vhostd with its guest.
type rig struct {
	c       *config
	lab     *lab
	mode    mode
	dir     string
	back    *exec.Cmd
	backLog strings.Builder
	guest   *exec.Cmd
	say     io.WriteCloser
	hear    *bufio.Scanner
}

// child is a process to be, on a processor.
func child(cpu int, name string, args ...string) *exec.Cmd {
	return exec.Command("taskset", append([]string{"-c", strconv.Itoa(cpu), name}, args...)...)
}

// start starts vhostd, and a guest that has walked its memory once. Both are killed when this process ends.
func start(c *config, l *lab, m mode, size int) (r *rig, err error) {
	r = &rig{c: c, lab: l, mode: m}
	defer func() {
		if err != nil {
			r.stop()
		}
	}()
	if r.dir, err = os.MkdirTemp("", "vhostd-perf"); err != nil {
		return r, err
	}
	if m.binary == "" {
		m.binary = c.vhostd
	}
	binary, err := filepath.Abs(m.binary)
	if err != nil {
		return r, err
	}
	r.back = child(c.backCPU, "ip", "netns", "exec", l.here, binary, "run", "--socket-path", r.dir+"/s", "--net", l.net(c.tunnel, m))
	r.back.Stdout, r.back.Stderr = &r.backLog, &r.backLog
	if err := netlab.Host.Start(r.back); err != nil {
		return r, err
	}
	for tries := 0; ; tries++ {
		if _, err := os.Stat(r.dir + "/s"); err == nil {
			break
		}
		var status unix.WaitStatus
		if pid, _ := unix.Wait4(r.back.Process.Pid, &status, unix.WNOHANG, nil); pid > 0 || tries > 500 {
			return r, fmt.Errorf("vhostd does not listen: %s", r.backLog.String())
		}
		time.Sleep(10 * time.Millisecond)
	}
	return r, r.startGuest(size)
}

func (r *rig) startGuest(size int) error {
	o := r.c.guest
	o.Socket, o.Size = r.dir+"/s", size
	if r.c.hot {
		o.Slots = max(hotBytes/size, 1)
	}
	orders, err := json.Marshal(o)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	r.guest = child(r.c.guestCPU, self)
	r.guest.Env = append(os.Environ(), guestEnv+"="+string(orders))
	r.guest.Stderr = os.Stderr
	if r.say, err = r.guest.StdinPipe(); err != nil {
		return err
	}
	out, err := r.guest.StdoutPipe()
	if err != nil {
		return err
	}
	r.hear = bufio.NewScanner(out)
	if err := netlab.Host.Start(r.guest); err != nil {
		return err
	}
	if !r.hear.Scan() || r.hear.Text() != "ready" {
		return fmt.Errorf("the guest did not get ready: %q; vhostd says: %s", r.hear.Text(), r.backLog.String())
	}
	return nil
}

// hotBytes of payload stay in the processor's second-level cache.
const hotBytes = 128 << 10

// stop ends both. Nothing is drained: whatever is in flight is nobody's any more.
func (r *rig) stop() {
	for _, cmd := range []*exec.Cmd{r.guest, r.back} {
		if cmd != nil && cmd.Process != nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	if r.dir != "" {
		_ = os.RemoveAll(r.dir)
	}
}

// send has the guest send frames, and returns how long it took and how many kicks.
func (r *rig) send(frames uint64) (ns int64, kicks uint64, err error) {
	if _, err := fmt.Fprintln(r.say, frames); err != nil {
		return 0, 0, err
	}
	if !r.hear.Scan() {
		return 0, 0, fmt.Errorf("the guest has ended; vhostd says: %s", r.backLog.String())
	}
	_, err = fmt.Sscanf(r.hear.Text(), "done %d %d", &ns, &kicks)
	return ns, kicks, err
}

// stats asks vhostd for the transmitq's counters.
func (r *rig) stats() (q backend.QueueStats, err error) {
	out, err := child(r.c.guestCPU, r.c.vhostd, "stats", "--control", r.dir+"/s.ctl", "--json").Output()
	if err != nil {
		return q, fmt.Errorf("vhostd stats: %w", err)
	}
	var s backend.Stats
	if err := json.Unmarshal(out, &s); err != nil {
		return q, fmt.Errorf("vhostd stats: %w in %s", err, out)
	}
	for _, q := range s.Queues {
		if q.Index == 1 {
			return q, nil
		}
	}
	return q, errors.New("vhostd stats: no queue 1")
}

// rate finds how many frames a second the mode sends, roughly.
func rate(c *config, l *lab, m mode, size int) (float64, error) {
	r, err := start(c, l, m, size)
	if err != nil {
		return 0, err
	}
	defer r.stop()
	for n := uint64(256); ; n *= 2 {
		ns, _, err := r.send(n)
		if err != nil || float64(ns) > min(c.seconds/4, 0.1)*1e9 {
			return float64(n) / time.Duration(ns).Seconds(), err
		}
	}
}

// take runs one turn.
func take(ctx context.Context, c *config, l *lab, t turn, m mode) (turn, error) {
	r, err := start(c, l, m, t.Size)
	if err != nil {
		return t, err
	}
	defer r.stop()
	meter, err := newMeter(r.back.Process.Pid, r.guest.Process.Pid, c.backCPU, c.guestCPU)
	if err != nil {
		return t, err
	}
	before, err := r.stats()
	if err != nil {
		return t, err
	}
	arrived, err := l.arrived(t.Size)
	if err != nil {
		return t, err
	}
	stopRecord, err := r.record(ctx, t)
	if err != nil {
		return t, err
	}
	from, err := meter.read()
	if err != nil {
		return t, err
	}
	if t.Ns, t.Kicks, err = r.send(t.Frames); err != nil {
		return t, err
	}
	to, err := meter.read()
	if err != nil {
		return t, err
	}
	stopRecord()
	t.count(from, to)
	after, err := r.stats()
	if err != nil {
		return t, err
	}
	if t.Arrived, err = l.arrived(t.Size); err != nil {
		return t, err
	}
	t.Arrived -= arrived
	t.prove(m, before, after, c.capture)
	return t, ctx.Err()
}

// record starts perf(1) on vhostd, if that was asked for.
func (r *rig) record(ctx context.Context, t turn) (stop func(), err error) {
	if r.c.record == "" {
		return func() {}, nil
	}
	if err := os.MkdirAll(r.c.record, 0o755); err != nil {
		return nil, err
	}
	file := fmt.Sprintf("%s/%s-%d-%s-%d.data", r.c.record, t.Path, t.Size, strings.ReplaceAll(t.Mode, "/", "_"), t.Round)
	cmd := exec.CommandContext(ctx, "perf", "record", "-q", "-g", "-F", "1999", "-o", file, "-p", strconv.Itoa(r.back.Process.Pid))
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("-record: %w", err)
	}
	time.Sleep(500 * time.Millisecond) // until it has attached
	return func() {
		_ = cmd.Process.Signal(syscall.SIGINT)
		_ = cmd.Wait()
	}, nil
}
