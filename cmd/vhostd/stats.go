package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/config"
	"github.com/vhostd/vhostd/internal/control"
)

// statsTimeout bounds the wait for one answer of the daemon.
const statsTimeout = 10 * time.Second

type statsFlags struct {
	where       address
	port, sw    string
	json, watch bool
	interval    time.Duration
}

// address is how people say which vhostd they mean.
type address struct {
	control, socketPath, config string
	run                         bool // a `vhostd run` may be meant
}

// register adds the options; run says whether a `vhostd run` may be meant.
func (a *address) register(fs *pflag.FlagSet, run bool) {
	usage := "the daemon's control socket, `path`"
	if a.run = run; run {
		fs.StringVar(&a.socketPath, "socket-path", "", "the vhost-user socket of a vhostd run, `path`")
		usage += " (default: --socket-path with " + controlSuffix + " added, or what the configuration says)"
	}
	fs.StringVar(&a.config, "config", "", "the configuration `file` of a vhostd serve")
	fs.StringVar(&a.control, "control", "", usage)
}

// path is the control socket's.
func (a *address) path() (string, error) {
	switch {
	case a.socketPath != "" && a.config != "":
		return "", usagef("--config is of a vhostd serve, --socket-path of a vhostd run: say which one to ask")
	case a.control != "":
		return a.control, nil
	case a.socketPath != "":
		return a.socketPath + controlSuffix, nil
	case a.config == "" && !a.run:
		return "", usagef("--config or --control is needed: which vhostd to ask")
	case a.config == "":
		return "", usagef("--config (of vhostd serve), --socket-path (of vhostd run) or --control is needed: which vhostd to ask")
	}
	file, err := config.Load(a.config)
	if err != nil {
		return "", err
	}
	if err := file.Err(); err != nil {
		return "", fmt.Errorf("the configuration is refused:\n%w", err)
	}
	if file.Control.Socket == config.ControlNone {
		return "", fmt.Errorf("%s has no control socket: send SIGHUP to reload, and see the log", a.config)
	}
	return file.Control.Socket, nil
}

func newStats() *cobra.Command {
	var f statsFlags
	cmd := &cobra.Command{
		Use:   "stats --socket-path PATH",
		Short: "Show the live counters of a running vhostd",
		Example: `  vhostd stats --socket-path /tmp/vm1.sock --watch
  vhostd stats --control /run/vm1.ctl --json | jq '.queues[] | {index, frames}'
  vhostd stats --config /etc/vhostd/vhostd.toml --port vm1`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.interval < 10*time.Millisecond {
				return usagef("--interval %v: want at least 10ms", f.interval)
			}
			path, err := f.where.path()
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return f.show(ctx, path, cmd.OutOrStdout())
		},
	}
	fs := cmd.Flags()
	fs.SortFlags = false
	f.where.register(fs, true)
	fs.StringVar(&f.port, "port", "", "of a vhostd serve, the port `name` alone, with its queues")
	fs.StringVar(&f.sw, "switch", "", "of a vhostd serve, the switch `name` alone, with the addresses that it has learned")
	fs.BoolVar(&f.json, "json", false, "print JSON; with --watch one object a line")
	fs.BoolVar(&f.watch, "watch", false, "go on until interrupted, with rates")
	fs.DurationVar(&f.interval, "interval", time.Second, "time between two looks with --watch")
	return cmd
}

// show asks once, or until ctx ends.
func (f statsFlags) show(ctx context.Context, path string, w io.Writer) error {
	tick := time.NewTicker(f.interval)
	defer tick.Stop()
	var before *answer
	for {
		now, err := f.once(ctx, path, before, w)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil || !f.watch:
			return err
		}
		before = now
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// answer is that of a `vhostd run`, or of a `vhostd serve`: then it has Ports, unless one was asked for.
type answer struct {
	report
	Switches []switchReport `json:"switches"`
	Ports    []portReport   `json:"ports"`
	Switch   *switchReport  `json:"switch"` // that was asked for
}

// once asks in a conversation of its own: the daemon hangs up on who says nothing for long, and an interval may be longer.
func (f statsFlags) once(ctx context.Context, path string, before *answer, w io.Writer) (*answer, error) {
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	c, err := control.Dial(ctx, path)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var args any
	if f.port != "" || f.sw != "" {
		args = statsArgs{f.port, f.sw}
	}
	var raw json.RawMessage
	if err := c.Call(ctx, "stats", args, &raw); err != nil {
		return nil, err
	}
	if f.json && f.watch {
		_, err := fmt.Fprintf(w, "%s\n", raw)
		return nil, err
	}
	if f.json {
		return nil, writeJSON(w, raw)
	}
	var a answer
	if err := json.Unmarshal(raw, &a); err != nil {
		return nil, fmt.Errorf("the daemon's answer: %w", err)
	}
	if f.watch && terminal(w) {
		fmt.Fprint(w, "\x1b[H\x1b[2J") // home, clear
	}
	return &a, a.print(w, before)
}

// print prints for people. before is an earlier answer to make rates from, or nil.
func (a *answer) print(w io.Writer, before *answer) error {
	switch {
	case a.Switch != nil:
		return a.Switch.print(w)
	case a.Ports != nil:
		return printFleet(w, a, before)
	case before == nil:
		return printReport(w, a.report, nil)
	}
	return printReport(w, a.report, &before.report)
}

func terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
