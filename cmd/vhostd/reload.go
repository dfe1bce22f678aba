package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/vhostd/vhostd/internal/config"
	"github.com/vhostd/vhostd/internal/control"
)

// reloadReport says what a reload has done, or is to do.
type reloadReport struct {
	Config    string       `json:"config"`
	DryRun    bool         `json:"dry_run,omitempty"`
	Steps     []stepReport `json:"steps"`
	Failed    int          `json:"failed"` // steps
	Unchanged int          `json:"unchanged"`
	Changed   []string     `json:"changed,omitempty"`       // keys of the daemon itself
	Restart   []string     `json:"needs_restart,omitempty"` // keys that were not applied
}

// stepReport is a step with what became of it.
type stepReport struct {
	config.Step
	Error  string `json:"error,omitempty"`
	Stands string `json:"stands,omitempty"` // after an error
}

func (s *stepReport) fail(err error, stands string) { s.Error, s.Stands = err.Error(), stands }

// steps are those with some actions.
func (r *reloadReport) steps(actions ...config.Action) iter.Seq[*stepReport] {
	return func(yield func(*stepReport) bool) {
		for i := range r.Steps {
			if s := &r.Steps[i]; slices.Contains(actions, s.Action) && !yield(s) {
				return
			}
		}
	}
}

func newReloadReport(path string, p config.Plan) *reloadReport {
	r := &reloadReport{Config: path, Steps: []stepReport{}, Unchanged: p.Unchanged, Changed: p.Live, Restart: p.Restart}
	for _, s := range p.Steps {
		r.Steps = append(r.Steps, stepReport{Step: s})
	}
	return r
}

// reloadTimeout bounds the wait for a reload: ports close at the same time, each within seconds, and opening hundreds is no matter of minutes.
const reloadTimeout = 5 * time.Minute

func newReload() *cobra.Command {
	var where address
	var dry, asJSON bool
	cmd := &cobra.Command{
		Use:   "reload --config FILE",
		Short: "Have a running vhostd serve read its configuration again",
		Long: `Have a running vhostd serve read its configuration again, and wait until the difference is applied.

What was done is printed for each port. The exit code is 1 if a step failed, if something needs a restart, or if the file has an error in it;
then nothing has been changed.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			path, err := where.path()
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			return reload(ctx, path, reloadArgs{dry}, asJSON, cmd.OutOrStdout())
		},
	}
	fs := cmd.Flags()
	fs.SortFlags = false
	where.register(fs, false)
	fs.BoolVar(&dry, "dry-run", false, "tell what would be done, and do nothing")
	fs.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func reload(ctx context.Context, path string, args reloadArgs, asJSON bool, w io.Writer) error {
	c, err := control.Dial(ctx, path)
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, reloadTimeout)
	defer cancel()
	var r reloadReport
	if err := c.Call(ctx, "reload", args, &r); err != nil {
		return err
	}
	if asJSON {
		err = writeJSON(w, r)
	} else {
		_, err = io.WriteString(w, r.String())
	}
	switch {
	case err != nil:
		return err
	case r.Failed > 0:
		return fmt.Errorf("%s of %d failed", count(r.Failed, "step"), len(r.Steps))
	case len(r.Restart) > 0:
		return errors.New("a restart is needed: " + strings.Join(r.Restart, ", "))
	}
	return nil
}

// done are the actions in the past, as they are told.
var done = map[config.Action]string{
	config.Remove: "removed", config.Reopen: "reopened", config.Change: "changed", config.Add: "added",
}

// String is for people.
func (r reloadReport) String() string {
	var b strings.Builder
	for _, s := range r.Steps {
		what := done[s.Action]
		if r.DryRun {
			what = "would be " + what
		}
		if s.Error != "" {
			what = "FAILED to " + string(s.Action)
		}
		fmt.Fprintf(&b, "%v %s", s.id(), what)
		if len(s.Keys) > 0 {
			fmt.Fprintf(&b, " (%s)", strings.Join(s.Keys, ", "))
		}
		if s.Error != "" {
			fmt.Fprintf(&b, ": %s; %s", s.Error, s.Stands)
		}
		b.WriteByte('\n')
	}
	for _, key := range r.Changed {
		fmt.Fprintf(&b, "%s changed\n", key)
	}
	for _, key := range r.Restart {
		fmt.Fprintf(&b, "%s NEEDS A RESTART\n", key)
	}
	fmt.Fprintf(&b, "%d unchanged\n", r.Unchanged)
	return b.String()
}
