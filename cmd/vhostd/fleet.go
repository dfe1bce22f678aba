package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/vhostd/vhostd/internal/config"
)

// fleet is what `vhostd serve` runs: the ports of a configuration, each with a goroutine that serves its front-ends.
//
// The configuration that stands is that of its members, each of which has the port's part of the file that it was opened with. A file that is read
// again is compared with that, and the difference applied: whoever is not named in it is not touched.
type fleet struct {
	ctx   context.Context
	path  string // of the configuration, absolute
	log   *slog.Logger
	level *slog.LevelVar
	start time.Time

	applying sync.Mutex    // one file at a time
	stands   config.Config // but for its ports; guarded by applying

	mu      sync.Mutex // innermost
	members map[string]*member
}

func newFleet(ctx context.Context, path string, log *slog.Logger, level *slog.LevelVar) *fleet {
	return &fleet{ctx: ctx, path: path, log: log, level: level, start: time.Now(), members: map[string]*member{}}
}

// begin opens the ports of the first file.
func (f *fleet) begin(u *understood) {
	f.applying.Lock()
	defer f.applying.Unlock()
	f.stands = u.Config
	_ = f.level.UnmarshalText([]byte(u.Log.Level)) // it was checked
	r := f.apply(u, f.plan(u.Config))
	f.log.Info("ready", "version", buildInfo().Version, "config", f.path, "ports", len(u.Ports), "failed", r.Failed)
	f.notify()
}

// end closes all ports.
func (f *fleet) end() error {
	f.applying.Lock()
	defer f.applying.Unlock()
	errs := f.stop(f.all())
	return errors.Join(slices.Collect(maps.Values(errs))...)
}

// all returns the members by name.
func (f *fleet) all() map[string]*member {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.members)
}

func (f *fleet) member(name string) *member {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.members[name]
}

// put makes m the member of that name; nil is none.
func (f *fleet) put(name string, m *member) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if m == nil {
		delete(f.members, name)
		return
	}
	f.members[name] = m
}

// reload reads the file again and applies it. An error means that nothing has changed; what went wrong in a file that is right is in the report.
func (f *fleet) reload(dry bool) (*reloadReport, error) {
	f.applying.Lock()
	defer f.applying.Unlock()
	if f.ctx.Err() != nil {
		return nil, errEnding
	}
	u, err := understand(f.path)
	if err != nil {
		return nil, err
	}
	p := f.plan(u.Config)
	if dry {
		r := newReloadReport(f.path, p)
		r.DryRun = true
		return r, nil
	}
	notify(f.log, daemon.SdNotifyReloading+"\n"+daemon.SdNotifyMonotonicUsec())
	defer notify(f.log, daemon.SdNotifyReady)
	r := f.apply(u, p)
	f.log.Info("configuration applied", "config", f.path, "steps", len(r.Steps), "failed", r.Failed, "unchanged", r.Unchanged)
	if len(r.Restart) > 0 {
		f.log.Warn("a restart is needed", "for", r.Restart)
	}
	f.notify()
	return r, nil
}

// plan compares c with what stands. A port that could not be opened, or has ended, is to be opened whether its part of the file has changed or not.
func (f *fleet) plan(c config.Config) config.Plan {
	old, failed := f.stands, map[string]bool{}
	old.Ports = map[string]config.Port{}
	for name, m := range f.all() {
		if failed[name] = m.err() != nil; failed[name] && has(c.Ports, name) {
			continue // as if it were not there
		}
		old.Ports[name] = m.configured()
	}
	return config.Compare(old, c)
}

func has[K comparable, V any](m map[K]V, k K) bool { _, ok := m[k]; return ok }

// apply carries out a plan.
func (f *fleet) apply(u *understood, p config.Plan) *reloadReport {
	r := newReloadReport(f.path, p)
	f.close(r)
	for i := range r.Steps {
		s := &r.Steps[i]
		switch s.Action {
		case config.Change:
			f.change(s, u)
		case config.Reopen, config.Add:
			f.open(s, u)
		}
	}
	if slices.Contains(p.Live, "log.level") {
		f.stands.Log.Level = u.Log.Level
		_ = f.level.UnmarshalText([]byte(u.Log.Level)) // it was checked
	}
	for _, s := range r.Steps {
		if s.Error != "" {
			r.Failed++
			f.log.Error("a step of the configuration failed", "step", s.Action, "port", s.Port, "error", s.Error, "stands", s.Stands)
		}
	}
	return r
}

// close closes the ports that go or are to be opened anew, all at the same time: each may take as long as frames are in flight.
func (f *fleet) close(r *reloadReport) {
	going := map[string]*member{}
	for _, s := range r.Steps {
		if s.Action == config.Remove || s.Action == config.Reopen {
			going[s.Port] = f.member(s.Port)
		}
	}
	errs := f.stop(going)
	for i := range r.Steps {
		s := &r.Steps[i]
		if err := errs[s.Port]; err != nil {
			s.fail(err, "the port is closed")
		}
		if s.Action == config.Remove {
			f.put(s.Port, nil)
		}
	}
}

// stop ends members, and returns the errors of those that have one.
func (f *fleet) stop(members map[string]*member) map[string]error {
	var mu sync.Mutex
	var all sync.WaitGroup
	errs := map[string]error{}
	for name, m := range members {
		all.Go(func() {
			if err := m.stop(); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs[name] = fmt.Errorf("closing port %s: %w", name, err)
			}
		})
	}
	all.Wait()
	return errs
}

// open opens a port. A member stands for it in any case, to tell why it is not there.
func (f *fleet) open(s *stepReport, u *understood) {
	m := startMember(f.ctx, u.Ports[s.Port], u.settled[s.Port], f.log.With("port", s.Port))
	f.put(s.Port, m)
	if err := m.err(); err != nil {
		s.fail(err, "the port is closed")
	}
}

// change changes a port that goes on.
func (f *fleet) change(s *stepReport, u *understood) {
	if err := f.member(s.Port).change(u.Ports[s.Port], u.settled[s.Port].settings); err != nil {
		s.fail(err, "the port goes on as before")
	}
}

// notify tells the service manager how many ports there are.
func (f *fleet) notify() {
	all, failed := f.all(), 0
	for _, m := range all {
		if m.err() != nil {
			failed++
		}
	}
	notify(f.log, fmt.Sprintf("STATUS=%d of %s", len(all)-failed, count(len(all), "port")))
}
