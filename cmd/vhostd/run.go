package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/vhostd/vhostd/internal/confine"
	"github.com/vhostd/vhostd/internal/control"
	"github.com/vhostd/vhostd/internal/logsink"
	"github.com/vhostd/vhostd/internal/sys"
	"github.com/vhostd/vhostd/vhostuser"
)

func newRun() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "run --socket-path PATH [--net KIND]",
		Short: "Serve one virtual machine",
		Long: `Serve one virtual machine's network card, until a signal ends it.

vhostd stays in the foreground and writes its log to the standard error. It waits for a VMM on the vhost-user socket, and for the
next one when that goes away: a reboot of the guest or a restart of the VMM needs no restart of vhostd. SIGTERM, SIGINT
and SIGHUP end it cleanly; a second one ends it at once.

The guest's frames go to one of these networks:

` + kindsHelp(),
		Example: `  vhostd run --socket-path /tmp/vm1.sock
  vhostd run --socket-path /tmp/vm1.sock --hostfwd tcp:127.0.0.1:2222-:22
  vhostd run --socket-path /run/vm1.sock --net tap:vnet0,bridge=br0 --queues 4`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.printCapabilities {
				return printCapabilities(cmd.OutOrStdout())
			}
			if f.socketPath == "" && !cmd.Flags().Changed("fd") && !activated() {
				return usagef("--socket-path is needed: where the VMM is to connect")
			}
			s, err := f.settle(cmd.Flags().Changed)
			if err != nil {
				return err
			}
			return serve(s, cmd.OutOrStdout(), newLog(s.logFormat, s.level, cmd.ErrOrStderr()))
		},
	}
	f.register(cmd.Flags())
	cmd.Flags().SortFlags = false
	return cmd
}

// printCapabilities answers as the vhost-user "backend program conventions" have it. A net back-end has no capabilities to list.
func printCapabilities(w io.Writer) error {
	return writeJSON(w, struct {
		Type string `json:"type"`
	}{"net"})
}

// newLog makes the daemon's log, which never holds up who logs. What ends the daemon flushes it.
func newLog(format string, level slog.Leveler, w io.Writer) *slog.Logger {
	return logsink.New(w, format == "json", level)
}

// serve puts the parts together and runs them until a signal.
func serve(s settings, stdout io.Writer, log *slog.Logger) (err error) {
	defer logsink.Flush(log)
	signal.Ignore(syscall.SIGPIPE) // a reader of the log that goes away must not take the guest's network with it
	ends := []os.Signal{syscall.SIGTERM, syscall.SIGINT}
	if !signal.Ignored(syscall.SIGHUP) { // else somebody started us with nohup
		ends = append(ends, syscall.SIGHUP)
	}
	ctx, cancel := untilSignal(log, ends...)
	defer cancel()
	open, err := parseDevice(&s)
	if err != nil {
		return &usageError{err}
	}
	p, err := openPort(s, open, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	path := p.src.path
	closeDoors, err := openDoors(s, path, p.report, log)
	if err != nil {
		return err
	}
	defer closeDoors()
	if err := s.confine(p, log); err != nil {
		return err
	}
	if p.src.hint {
		printHint(stdout, s, path, p.be)
	}
	caps := p.dev.Capabilities()
	log.Info("ready", "version", buildInfo().Version, "socket", path, "net", caps.Kind, "name", caps.Name, "mtu", caps.MTU)
	notify(log, daemon.SdNotifyReady)
	defer notify(log, daemon.SdNotifyStopping)
	return p.be.Serve(ctx, announcing{p.src, log})
}

// doors are open ways to ask the daemon about itself.
type doors []io.Closer

func (d doors) close(log *slog.Logger) {
	for _, c := range d {
		if err := c.Close(); err != nil {
			log.Warn("cannot close", "error", err)
		}
	}
}

// openDoors opens the control socket, and metrics if they are asked for.
func openDoors(s settings, socket string, stats func() report, log *slog.Logger) (closeAll func(), err error) {
	var open doors
	if path := s.controlPath(socket); path != "" {
		c, err := listenControl(path, map[string]control.Handler{"stats": func(args json.RawMessage) (any, error) {
			if err := control.ParseArgs(args, &struct{}{}); err != nil {
				return nil, fmt.Errorf("a vhostd run has one port and no switch to be asked for by name (%w)", err)
			}
			return stats(), nil
		}}, s.mayControl(), s.become)
		if err != nil {
			return nil, fmt.Errorf("%w (--control chooses another path, --control %s does without)", err, controlNone)
		}
		open = append(open, c)
	}
	if s.metrics != "" {
		m, err := serveMetrics(s.metrics, s.pprof, collector(stats), log)
		if err != nil {
			open.close(log)
			return nil, fmt.Errorf("--metrics: %w", err)
		}
		open = append(open, m)
	}
	return func() { open.close(log) }, nil
}

// listenControl makes the control socket, which belongs to whom vhostd becomes.
func listenControl(path string, handlers map[string]control.Handler, admits func(sys.Peer) error, become *confine.User) (*control.Server, error) {
	c, err := control.Listen(path, handlers, admits)
	if err != nil || become == nil {
		return c, err
	}
	if err := sys.OwnSocket(path, become.UID, become.GID, 0o600); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// controlPath is where the control socket is to be, given the vhost-user socket's path; "" is nowhere.
func (s settings) controlPath(socket string) string {
	switch {
	case s.control == controlNone:
		return ""
	case s.control != "":
		return s.control
	case socket == "":
		return ""
	}
	return socket + controlSuffix
}

// untilSignal returns a context that the first of some signals ends. The second ends the process.
func untilSignal(log *slog.Logger, ends ...os.Signal) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	got := make(chan os.Signal, 2)
	signal.Notify(got, ends...)
	go func() {
		log.Info("ending", "signal", (<-got).String())
		cancel()
		sig := <-got
		log.Warn("ending at once", "signal", sig.String())
		logsink.Flush(log)
		os.Exit(exitFailure)
	}()
	return ctx, cancel
}

// notify tells the service manager, if there is one, about our state (sd_notify).
func notify(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("cannot tell the service manager", "state", state, "error", err)
	}
}

// announcing tells the service manager whether there is a front-end.
type announcing struct {
	source
	log *slog.Logger
}

// Accept implements vhostuser.Acceptor.
func (a announcing) Accept(ctx context.Context) (*vhostuser.Conn, error) {
	notify(a.log, "STATUS=Waiting for a VMM on "+a.path)
	c, err := a.source.Accept(ctx)
	if err == nil {
		notify(a.log, "STATUS=Serving a VMM since "+time.Now().Format(time.DateTime))
	}
	return c, err
}
