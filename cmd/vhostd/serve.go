package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/vhostd/vhostd/internal/config"
	"github.com/vhostd/vhostd/internal/control"
	"github.com/vhostd/vhostd/internal/logsink"
)

// configUsage is the option that three commands have.
const configUsage = "the configuration, a TOML `file`"

func newServe() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "serve --config FILE",
		Short: "Serve many virtual machines, as a file says",
		Long: `Serve the network cards of many virtual machines, which a file lists as ports, until a signal ends it.

SIGHUP, or vhostd reload, has the file read again: ports that it no longer has are closed, new ones opened, changed ones changed, and
all others are left alone, frames in flight included. A file with an error in it changes nothing. SIGTERM and SIGINT end vhostd
cleanly; a second one ends it at once.

A port that cannot be opened does not keep the others from being served: vhostd stats shows why, and the next reload tries again.`,
		Example: `  vhostd check --config /etc/vhostd/vhostd.toml
  vhostd serve --config /etc/vhostd/vhostd.toml
  vhostd reload --config /etc/vhostd/vhostd.toml`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if path == "" {
				return usagef("--config is needed: the file that lists the ports")
			}
			return serveMany(path, cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringVar(&path, "config", "", configUsage)
	return cmd
}

func newCheck() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "check --config FILE",
		Short: "Look for errors in a configuration, without doing anything",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if path == "" {
				return usagef("--config is needed: the file to look at")
			}
			u, err := understand(path)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is right: %s\n", path, count(len(u.Ports), "port"))
			return err
		},
	}
	cmd.Flags().StringVar(&path, "config", "", configUsage)
	return cmd
}

// serveMany runs a daemon until a signal.
func serveMany(path string, stderr io.Writer) error {
	signal.Ignore(syscall.SIGPIPE)
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	u, err := understand(path)
	if err != nil {
		return err
	}
	level := new(slog.LevelVar)
	log := newLog(u.Log.Format, level, stderr)
	defer logsink.Flush(log)
	ctx, cancel := untilSignal(log, syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	again := make(chan os.Signal, 1) // a second one while a reload waits asks for nothing more
	signal.Notify(again, syscall.SIGHUP)
	defer signal.Stop(again)

	d := newFleet(ctx, path, log, level)
	closeDoors, err := d.openDoors(u)
	if err != nil {
		return err
	}
	defer closeDoors()
	if err := d.begin(u); err != nil {
		return err
	}
	notify(log, daemon.SdNotifyReady)
	defer notify(log, daemon.SdNotifyStopping)
	for {
		select {
		case <-again:
			if _, err := d.reload(false); err != nil {
				log.Error("nothing is changed", "error", err)
			}
		case <-ctx.Done():
			return d.end()
		}
	}
}

// openDoors opens the ways to ask a daemon about itself, and to have it read its file again.
func (d *fleet) openDoors(c *understood) (closeAll func(), err error) {
	var open doors
	if c.Control.Socket != config.ControlNone {
		s, err := listenControl(c.Control.Socket, map[string]control.Handler{"stats": d.handleStats, "reload": d.handleReload}, nil, c.become)
		if err != nil {
			return nil, fmt.Errorf("%w ([control] socket chooses another path, %q does without)", err, config.ControlNone)
		}
		open = append(open, s)
	}
	if c.Metrics.Listen != "" {
		m, err := serveMetrics(c.Metrics.Listen, c.Metrics.Profiles, portsCollector(d.report), d.log)
		if err != nil {
			open.close(d.log)
			return nil, fmt.Errorf("[metrics] listen: %w", err)
		}
		open = append(open, m)
	}
	return func() { open.close(d.log) }, nil
}

// reloadArgs are those of the control request "reload".
type reloadArgs struct {
	DryRun bool `json:"dry_run"`
}

func (d *fleet) handleReload(args json.RawMessage) (any, error) {
	var a reloadArgs
	if err := control.ParseArgs(args, &a); err != nil {
		return nil, err
	}
	return d.reload(a.DryRun)
}

// These are for what is asked of a daemon that does not serve.
var (
	errStarting = errors.New("vhostd is starting, or could not: ask again")
	errEnding   = errors.New("vhostd is ending")
)
