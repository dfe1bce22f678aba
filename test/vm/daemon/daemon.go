//go:build linux

// Package daemon runs the real vhostd program for a test: builds it, starts it, reads its counters as a user would
// (vhostd stats --json), and looks at what it holds from outside, in /proc.
package daemon

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
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/test/vm/netlab"
)

// Options say how vhostd is started.
type Options struct {
	Binary    string
	Dir       string // for the sockets
	Net       string // --net
	Client    bool   // --client: the front-end listens
	Args      []string
	Namespace *netlab.Namespace // nil: the test's own
	Metrics   string            // --metrics; needed by Goroutines
	User      int               // user and group id, without capabilities; 0: the caller's own
	Log       func(line string)
}

// Daemon is one running vhostd.
type Daemon struct {
	opts   Options
	cmd    *exec.Cmd
	exited chan struct{}
	err    error // how it ended; after exited

	mu  sync.Mutex
	log []string
}

// Socket is the vhost-user socket's path.
func (o Options) Socket() string { return filepath.Join(o.Dir, "vhost.sock") }

// Control is the control socket's path.
func (o Options) Control() string { return filepath.Join(o.Dir, "control.sock") }

// Start starts vhostd and waits until its sockets are there.
func Start(ctx context.Context, o Options) (*Daemon, error) {
	if o.Namespace == nil {
		o.Namespace = netlab.Host
	}
	args := []string{"run", "--socket-path", o.Socket(), "--net", o.Net, "--control", o.Control()}
	if o.Client {
		args = append(args, "--client")
	} else if err := os.Remove(o.Socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := os.Remove(o.Control()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if o.Metrics != "" {
		args = append(args, "--metrics", o.Metrics)
	}
	d := &Daemon{opts: o, exited: make(chan struct{})}
	d.cmd = exec.Command(o.Binary, append(args, o.Args...)...)
	if o.User != 0 {
		d.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(o.User), Gid: uint32(o.User)}}
	}
	if err := d.start(); err != nil {
		return nil, fmt.Errorf("vhostd: %w", err)
	}
	if err := d.waitReady(ctx); err != nil {
		d.Kill()
		return nil, err
	}
	return d, nil
}

func (d *Daemon) start() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer w.Close()
	d.cmd.Stdout, d.cmd.Stderr = w, w
	if err := d.opts.Namespace.Start(d.cmd); err != nil {
		r.Close()
		return err
	}
	go func() {
		d.readLog(r)
		d.err = d.cmd.Wait()
		close(d.exited)
	}()
	return nil
}

func (d *Daemon) readLog(r io.ReadCloser) {
	defer r.Close()
	for s := bufio.NewScanner(r); s.Scan(); {
		d.mu.Lock()
		d.log = append(d.log, s.Text())
		d.mu.Unlock()
		if d.opts.Log != nil {
			d.opts.Log(s.Text())
		}
	}
}

func (d *Daemon) waitReady(ctx context.Context) error {
	wanted := []string{d.opts.Control()}
	if !d.opts.Client {
		wanted = append(wanted, d.opts.Socket())
	}
	for _, path := range wanted {
		for {
			if _, err := os.Stat(path); err == nil {
				break
			}
			select {
			case <-d.exited:
				return fmt.Errorf("vhostd ended at once (%v): %s", d.err, strings.Join(d.Log(), "\n"))
			case <-ctx.Done():
				return fmt.Errorf("vhostd made no %s: %w", path, ctx.Err())
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
	return nil
}

// Log returns what vhostd has written so far.
func (d *Daemon) Log() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]string(nil), d.log...)
}

// PID is vhostd's process id.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// CommandLine is the command, to be run by hand.
func (d *Daemon) CommandLine() string { return strings.Join(d.cmd.Args, " ") }

// Exited is closed when vhostd has ended.
func (d *Daemon) Exited() <-chan struct{} { return d.exited }

// Kill ends vhostd as a crash would, and waits for its end.
func (d *Daemon) Kill() {
	_ = d.cmd.Process.Kill()
	<-d.exited
}

// Stop ends vhostd as a service manager would. Any other end than exit code 0 is an error.
func (d *Daemon) Stop(ctx context.Context) error {
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("vhostd: SIGTERM: %w (%v)", err, d.err)
	}
	select {
	case <-d.exited:
		if d.err != nil {
			return fmt.Errorf("vhostd ended with %w after SIGTERM", d.err)
		}
		return nil
	case <-ctx.Done():
		d.Kill()
		return fmt.Errorf("vhostd did not end after SIGTERM: %w", ctx.Err())
	}
}

// Stats runs vhostd stats --json.
func (d *Daemon) Stats(ctx context.Context) (s backend.Stats, err error) {
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, d.opts.Binary, "stats", "--control", d.opts.Control(), "--json")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return s, fmt.Errorf("vhostd stats: %w: %s", err, stderr.String())
	}
	if err := json.Unmarshal(out, &s); err != nil {
		return s, fmt.Errorf("vhostd stats: %w in %s", err, out)
	}
	return s, nil
}

// StatsText runs vhostd stats, as a person would.
func (d *Daemon) StatsText(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, d.opts.Binary, "stats", "--control", d.opts.Control()).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("vhostd stats: %w: %s", err, out)
	}
	return string(out), nil
}
