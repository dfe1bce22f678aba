//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/control"
)

// daemon is a `vhostd serve` with many ports.
type daemon struct {
	dir string
	cmd *exec.Cmd
	log bytes.Buffer
}

// Networks of the ports: each returns what it gets, or all are at a switch.
const (
	echoing  = "net = \"null,echo=on\"\n"
	switched = "switch = \"lan\"\n[switch.lan]\n"
)

// startDaemon starts one with n ports on a network, and waits until it is ready.
func startDaemon(vhostd, network string, n int) (*daemon, error) {
	dir, err := os.MkdirTemp("", "vhostd-scale-")
	if err != nil {
		return nil, err
	}
	d := &daemon{dir: dir}
	var b strings.Builder
	fmt.Fprintf(&b, "[control]\nsocket = %q\n[defaults]\nsocket-path = %q\n%s", d.control(), d.dir+"/{port}.sock", network)
	for i := range n {
		fmt.Fprintf(&b, "[port.vm%d]\n", i)
	}
	config := filepath.Join(dir, "vhostd.toml")
	if err := os.WriteFile(config, []byte(b.String()), 0o600); err != nil {
		return nil, err
	}
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: filepath.Join(dir, "notify")})
	if err != nil {
		return nil, err
	}
	defer manager.Close()
	d.cmd = exec.Command(vhostd, "serve", "--config", config)
	d.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+manager.LocalAddr().String())
	d.cmd.Stderr = &d.log
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	if err := told(manager, "READY=1"); err != nil {
		_ = d.stop()
		return nil, fmt.Errorf("vhostd is not ready: %w\n%s", err, d.log.String())
	}
	return d, nil
}

// told waits for a line of what vhostd tells its service manager. Sockets alone tell less: they are there before all that belongs to their ports is.
func told(manager *net.UnixConn, line string) error {
	if err := manager.SetReadDeadline(time.Now().Add(stuck)); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	for {
		n, err := manager.Read(buf)
		if err != nil {
			return err
		}
		if slices.Contains(strings.Split(string(buf[:n]), "\n"), line) {
			return nil
		}
	}
}

func (d *daemon) socket(i int) string { return filepath.Join(d.dir, fmt.Sprintf("vm%d.sock", i)) }
func (d *daemon) control() string     { return filepath.Join(d.dir, "ctl") }

// stop ends the daemon and removes its files.
func (d *daemon) stop() error {
	defer os.RemoveAll(d.dir)
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	if err := d.cmd.Wait(); err != nil {
		return fmt.Errorf("vhostd: %w\n%s", err, d.log.String())
	}
	return nil
}

// stats returns how many ports have a front-end.
func (d *daemon) stats() (connected int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), stuck)
	defer cancel()
	c, err := control.Dial(ctx, d.control())
	if err != nil {
		return 0, err
	}
	defer c.Close()
	var raw json.RawMessage
	if err := c.Call(ctx, "stats", nil, &raw); err != nil {
		return 0, err
	}
	var r struct {
		Ports []struct {
			Connected bool `json:"connected"`
		} `json:"ports"`
	}
	if err := json.Unmarshal(raw, &r); err != nil {
		return 0, err
	}
	for _, p := range r.Ports {
		if p.Connected {
			connected++
		}
	}
	return connected, nil
}

// emptied waits until no port has a front-end.
func (d *daemon) emptied() error {
	for until := time.Now().Add(stuck); ; time.Sleep(5 * time.Millisecond) {
		n, err := d.stats()
		if n == 0 || err != nil {
			return err
		}
		if time.Now().After(until) {
			return fmt.Errorf("%d front-ends are connected still", n)
		}
	}
}

// tidied is usage when the daemon has had the time to return the memory of guests who have left, which it does when nobody has for 2 s.
func (d *daemon) tidied() (usage, error) {
	time.Sleep(5 * time.Second)
	return d.usage()
}

// usage is what a process holds. Guest memory that it has touched is in Shared, for it is the guest's.
type usage struct {
	Private    int `json:"private_kib"` // resident, RssAnon and RssFile
	Shared     int `json:"shared_kib"`
	PageTables int `json:"page_tables_kib"`
	Threads    int `json:"threads"`
	FDs        int `json:"fds"`
}

func (d *daemon) usage() (u usage, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
	if err != nil {
		return u, err
	}
	fields := map[string]int{}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		var n int
		if _, err := fmt.Sscan(value, &n); err == nil {
			fields[name] = n
		}
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.cmd.Process.Pid))
	return usage{
		Private: fields["RssAnon"] + fields["RssFile"], Shared: fields["RssShmem"], PageTables: fields["VmPTE"],
		Threads: fields["Threads"], FDs: len(fds),
	}, err
}

// cpu is the time that all threads of the daemon have run.
func (d *daemon) cpu() (time.Duration, error) {
	const schedClock = 2 // CPUCLOCK_SCHED, as in the C library's clock_getcpuclockid
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^d.cmd.Process.Pid<<3|schedClock), &ts); err != nil {
		return 0, fmt.Errorf("CPU clock of vhostd: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}
