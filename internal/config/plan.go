package config

import (
	"cmp"
	"maps"
	"slices"
)

// Action is what has to be done to a port or another part.
type Action string

// The actions, in the order in which they are done: what goes makes room (a socket, an interface) for what comes.
const (
	Remove Action = "remove"
	Reopen Action = "reopen" // its front-end is disconnected, and comes back
	Change Action = "change" // in place: nobody notices
	Add    Action = "add"
)

var actions = []Action{Remove, Reopen, Change, Add}

// Step is something that has to be done.
type Step struct {
	Action Action   `json:"action"`
	Port   string   `json:"port"`
	Keys   []string `json:"keys,omitempty"` // that have changed
}

// Plan leads from one Config to another.
type Plan struct {
	Steps     []Step
	Unchanged int      // ports
	Live      []string // keys of the daemon itself that have changed, and can be had at once
	Restart   []string // and those that cannot
}

// Compare finds out what leads from old to new.
func Compare(old, new Config) Plan {
	var p Plan
	for _, name := range names(old.Ports, new.Ports) {
		a, had := old.Ports[name]
		b, has := new.Ports[name]
		switch {
		case !has:
			p.Steps = append(p.Steps, Step{Action: Remove, Port: name})
		case !had:
			p.Steps = append(p.Steps, Step{Action: Add, Port: name})
		default:
			p.port(name, &a, &b)
		}
	}
	slices.SortStableFunc(p.Steps, func(a, b Step) int {
		return cmp.Compare(slices.Index(actions, a.Action), slices.Index(actions, b.Action))
	})
	compare(&p, "log", logKeys, &old.Log, &new.Log)
	compare(&p, "control", controlKeys, &old.Control, &new.Control)
	compare(&p, "metrics", metricsKeys, &old.Metrics, &new.Metrics)
	return p
}

func (p *Plan) port(name string, a, b *Port) {
	live, other := portKeys.differ(a, b)
	switch {
	case len(other) > 0:
		p.Steps = append(p.Steps, Step{Reopen, name, append(other, live...)})
	case len(live) > 0:
		p.Steps = append(p.Steps, Step{Change, name, live})
	default:
		p.Unchanged++
	}
}

func compare[T any](p *Plan, section string, ks keys[T], a, b *T) {
	live, other := ks.differ(a, b)
	for _, k := range live {
		p.Live = append(p.Live, section+"."+k)
	}
	for _, k := range other {
		p.Restart = append(p.Restart, section+"."+k)
	}
}

// names are those of both, in order.
func names[T any](a, b map[string]T) []string {
	all := slices.AppendSeq(slices.Collect(maps.Keys(a)), maps.Keys(b))
	slices.Sort(all)
	return slices.Compact(all)
}
