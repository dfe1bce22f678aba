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
	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/control"
)

// statsTimeout bounds the wait for one answer of the daemon.
const statsTimeout = 10 * time.Second

type statsFlags struct {
	control, socketPath string
	json, watch         bool
	interval            time.Duration
}

func newStats() *cobra.Command {
	var f statsFlags
	cmd := &cobra.Command{
		Use:   "stats --socket-path PATH",
		Short: "Show the live counters of a running vhostd",
		Example: `  vhostd stats --socket-path /tmp/vm1.sock --watch
  vhostd stats --control /run/vm1.ctl --json | jq '.queues[] | {index, frames}'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, err := f.path()
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
	fs.StringVar(&f.socketPath, "socket-path", "", "the daemon's vhost-user socket, `path`")
	fs.StringVar(&f.control, "control", "", "the daemon's control socket, `path` (default: --socket-path with "+controlSuffix+" added)")
	fs.BoolVar(&f.json, "json", false, "print JSON; with --watch one object a line")
	fs.BoolVar(&f.watch, "watch", false, "go on until interrupted, with rates")
	fs.DurationVar(&f.interval, "interval", time.Second, "time between two looks with --watch")
	return cmd
}

func (f statsFlags) path() (string, error) {
	switch {
	case f.interval < 10*time.Millisecond:
		return "", usagef("--interval %v: want at least 10ms", f.interval)
	case f.control != "":
		return f.control, nil
	case f.socketPath != "":
		return f.socketPath + controlSuffix, nil
	}
	return "", usagef("--socket-path (as given to vhostd run) or --control is needed: which vhostd to ask")
}

// show asks once, or until ctx ends.
func (f statsFlags) show(ctx context.Context, path string, w io.Writer) error {
	c, err := control.Dial(ctx, path)
	if err != nil {
		return err
	}
	defer c.Close()
	tick := time.NewTicker(f.interval)
	defer tick.Stop()
	var before *report
	for {
		now, err := f.once(ctx, c, before, w)
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

func (f statsFlags) once(ctx context.Context, c *control.Client, before *report, w io.Writer) (*report, error) {
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	var raw json.RawMessage
	if err := c.Call(ctx, "stats", &raw); err != nil {
		return nil, err
	}
	if f.json && f.watch {
		_, err := fmt.Fprintf(w, "%s\n", raw)
		return nil, err
	}
	if f.json {
		return nil, writeJSON(w, raw)
	}
	var r report
	if err := json.Unmarshal(raw, &r); err != nil {
		return nil, fmt.Errorf("the daemon's answer: %w", err)
	}
	if f.watch && terminal(w) {
		fmt.Fprint(w, "\x1b[H\x1b[2J") // home, clear
	}
	return &r, printReport(w, r, before)
}

func terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
