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
	"github.com/vhostd/vhostd/internal/confine"
)

// fleet is what `vhostd serve` runs: the switches, uplinks and ports of a configuration, each port with a goroutine that serves its front-ends.
//
// The configuration that stands is that of its parts, each of which has what it was opened with. A file that is read again is compared
// with that, and the difference applied: whoever is not named in it is not touched.
type fleet struct {
	ctx   context.Context
	path  string // of the configuration, absolute
	log   *slog.Logger
	level *slog.LevelVar
	start time.Time

	applying sync.Mutex     // one file at a time
	stands   config.Config  // but for its parts; guarded by applying
	kept     *confine.Needs // that this process was confined to; nil: it was not
	confined chan struct{}  // closed when it is confined, or is not to be: then front-ends are served

	threads   int    // that there may be
	threadsBy string // what says so
	tidier    tidier

	mu    sync.Mutex // innermost
	parts map[id]part
}

// id names a part.
type id struct {
	kind config.Kind
	name string
}

func (i id) String() string { return string(i.kind) + " " + i.name }

// part is a switch, an uplink or a port, or why it is not there.
type part interface {
	err() error  // why it is not there; nil: it is
	stop() error // ends it
	standsIn(c *config.Config, name string)
	// change gives it what can be changed while it goes on.
	change(f *fleet, u *understood, name string) error
}

func newFleet(ctx context.Context, path string, log *slog.Logger, level *slog.LevelVar) *fleet {
	f := &fleet{ctx: ctx, path: path, log: log, level: level, start: time.Now(), confined: make(chan struct{}), parts: map[id]part{}}
	f.allowThreads()
	return f
}

// begin opens all that the first file has, and serves it once the process is confined.
func (f *fleet) begin(u *understood) error {
	f.applying.Lock()
	defer f.applying.Unlock()
	f.stands = u.Config
	_ = f.level.UnmarshalText([]byte(u.Log.Level)) // it was checked
	r := f.apply(u, f.plan(u.Config))
	if err := f.confine(u); err != nil {
		return errors.Join(err, joined(f.stop(f.all())))
	}
	close(f.confined)
	f.log.Info("ready", "version", buildInfo().Version, "config", f.path, "ports", len(u.Ports), "failed", r.Failed)
	f.notify()
	return nil
}

// end closes everything.
func (f *fleet) end() error {
	f.applying.Lock()
	defer f.applying.Unlock()
	return joined(f.stop(f.all()))
}

func joined(errs map[id]error) error { return errors.Join(slices.Collect(maps.Values(errs))...) }

// all returns the parts.
func (f *fleet) all() map[id]part {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.parts)
}

func (f *fleet) part(i id) part {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.parts[i]
}

// put makes p the part of that name; nil is none.
func (f *fleet) put(i id, p part) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if p == nil {
		delete(f.parts, i)
		return
	}
	f.parts[i] = p
}

// reload reads the file again and applies it. An error means that nothing has changed; what went wrong in a file that is right is in the report.
func (f *fleet) reload(dry bool) (*reloadReport, error) {
	f.applying.Lock()
	defer f.applying.Unlock()
	if f.ctx.Err() != nil {
		return nil, errEnding
	}
	select {
	case <-f.confined:
	default: // the control socket is there before begin, and after one that failed
		return nil, errStarting
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

// plan compares c with what stands. What could not be opened, or has ended, is to be opened whether its part of the file has changed or not.
func (f *fleet) plan(c config.Config) config.Plan {
	old := f.stands
	old.Switches, old.Uplinks, old.Ports = map[string]config.Switch{}, map[string]config.Uplink{}, map[string]config.Port{}
	for i, p := range f.all() {
		if p.err() == nil || !wanted(&c, i) {
			p.standsIn(&old, i.name)
		}
	}
	return config.Compare(old, c)
}

// wanted reports whether c has such a part.
func wanted(c *config.Config, i id) (ok bool) {
	switch i.kind {
	case config.KindSwitch:
		_, ok = c.Switches[i.name]
	case config.KindUplink:
		_, ok = c.Uplinks[i.name]
	default:
		_, ok = c.Ports[i.name]
	}
	return ok
}

// notify tells the service manager how many ports there are.
func (f *fleet) notify() {
	ports, failed := 0, 0
	for i, p := range f.all() {
		if i.kind != config.KindPort {
			continue
		}
		if ports++; p.err() != nil {
			failed++
		}
	}
	notify(f.log, fmt.Sprintf("STATUS=%d of %s", ports-failed, count(ports, "port")))
}
