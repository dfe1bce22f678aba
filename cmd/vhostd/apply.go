package main

import (
	"fmt"
	"slices"
	"sync"

	"github.com/vhostd/vhostd/internal/config"
)

// apply carries out a plan: what goes makes room (a socket, an interface, an address) for what comes.
func (f *fleet) apply(u *understood, p config.Plan) *reloadReport {
	r := newReloadReport(f.path, p)
	f.refuse(r, u)
	f.close(r)
	f.change(r, u)
	for _, kind := range config.Kinds {
		for s := range r.steps(config.Reopen, config.Add) {
			if s.Kind == kind && s.Error == "" {
				f.open(s, u)
			}
		}
	}
	if slices.Contains(p.Live, "log.level") {
		f.stands.Log.Level = u.Log.Level
		_ = f.level.UnmarshalText([]byte(u.Log.Level)) // it was checked
	}
	for _, s := range r.Steps {
		if s.Error != "" {
			r.Failed++
			f.log.Error("a step of the configuration failed", "step", s.Action, string(s.Kind), s.Name, "error", s.Error, "stands", s.Stands)
		}
	}
	return r
}

func (s *stepReport) id() id { return id{s.Kind, s.Name} }

// close closes what goes or is to be opened anew.
func (f *fleet) close(r *reloadReport) {
	going := map[id]part{}
	for s := range r.steps(config.Remove, config.Reopen) {
		if s.Error == "" {
			going[s.id()] = f.part(s.id())
		}
	}
	errs := f.stop(going)
	for s := range r.steps(config.Remove, config.Reopen) {
		if err := errs[s.id()]; err != nil {
			s.fail(err, "it is closed")
		}
		if s.Action == config.Remove {
			f.put(s.id(), nil)
		}
	}
}

// stop ends parts, and returns the errors of those that have one. Ports end before the switches that they are at, those of one kind at the same time:
// each may take as long as frames are in flight.
func (f *fleet) stop(parts map[id]part) map[id]error {
	errs := map[id]error{}
	for _, kind := range slices.Backward(config.Kinds) {
		var mu sync.Mutex
		var all sync.WaitGroup
		for i, p := range parts {
			if i.kind != kind {
				continue
			}
			all.Go(func() {
				if err := p.stop(); err != nil {
					mu.Lock()
					defer mu.Unlock()
					errs[i] = fmt.Errorf("closing %v: %w", i, err)
				}
			})
		}
		all.Wait()
	}
	return errs
}

// change changes what goes on. One port may want what another gives up (an address that is its alone), so that those that fail are tried again
// until it is no use.
func (f *fleet) change(r *reloadReport, u *understood) {
	for left := -1; ; {
		failed := 0
		for s := range r.steps(config.Change) {
			if left >= 0 && s.Error == "" {
				continue
			}
			s.Error, s.Stands = "", ""
			if err := f.part(s.id()).change(f, u, s.Name); err != nil {
				s.fail(err, "it goes on as before")
				failed++
			}
		}
		if failed == 0 || failed == left {
			return
		}
		left = failed
	}
}

// open opens a part. One stands for it in any case, to tell why it is not there.
func (f *fleet) open(s *stepReport, u *understood) {
	var p part
	switch s.Kind {
	case config.KindSwitch:
		p = f.openSwitch(u.Switches[s.Name])
	case config.KindUplink:
		p = f.openUplink(u.Uplinks[s.Name], u.uplinks[s.Name])
	default:
		p = f.openPort(u.Ports[s.Name], u.ports[s.Name])
	}
	f.put(s.id(), p)
	if err := p.err(); err != nil {
		s.fail(err, "it is closed")
	}
}
