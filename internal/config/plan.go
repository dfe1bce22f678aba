package config

import (
	"cmp"
	"maps"
	"slices"
)

// Action is what has to be done to a part of the daemon.
type Action string

// The actions, in the order in which they are listed.
const (
	Remove Action = "remove"
	Reopen Action = "reopen" // a port's front-end is disconnected, and comes back
	Change Action = "change" // in place: nobody notices
	Add    Action = "add"
)

var actions = []Action{Remove, Reopen, Change, Add}

// Kind is what something has to be done to.
type Kind string

// The kinds, in the order in which they are opened; they are closed in the opposite one.
const (
	KindSwitch Kind = "switch"
	KindUplink Kind = "uplink"
	KindPort   Kind = "port"
)

// Kinds are all, in that order.
var Kinds = []Kind{KindSwitch, KindUplink, KindPort}

// Step is something that has to be done.
type Step struct {
	Action Action   `json:"action"`
	Kind   Kind     `json:"kind"`
	Name   string   `json:"name"`
	Keys   []string `json:"keys,omitempty"` // that have changed
}

// Plan leads from one Config to another.
type Plan struct {
	Steps     []Step
	Unchanged int      // ports, uplinks and switches
	Live      []string // keys of the daemon itself that have changed, and can be had at once
	Restart   []string // and those that cannot
}

// Compare finds out what leads from old to new. What hangs on a switch that has to be opened anew is opened anew with it.
func Compare(old, new Config) Plan {
	var p Plan
	compareAll(&p, KindSwitch, switchKeys, old.Switches, new.Switches, func(*Switch) string { return "" })
	again := map[string]bool{}
	for _, s := range p.Steps {
		again[s.Name] = s.Action == Reopen
	}
	hangs := func(sw string) string {
		if again[sw] {
			return "switch." + sw
		}
		return ""
	}
	compareAll(&p, KindUplink, uplinkKeys, old.Uplinks, new.Uplinks, func(u *Uplink) string { return hangs(u.Switch) })
	compareAll(&p, KindPort, portKeys, old.Ports, new.Ports, func(port *Port) string { return hangs(port.Switch) })
	slices.SortStableFunc(p.Steps, func(a, b Step) int {
		return cmp.Compare(slices.Index(actions, a.Action), slices.Index(actions, b.Action))
	})
	compareOwn(&p, "log", logKeys, &old.Log, &new.Log)
	compareOwn(&p, "control", controlKeys, &old.Control, &new.Control)
	compareOwn(&p, "metrics", metricsKeys, &old.Metrics, &new.Metrics)
	compareOwn(&p, "sandbox", sandboxKeys, &old.Sandbox, &new.Sandbox)
	return p
}

// compareAll adds the steps of one kind. hangs says which other change has something opened anew, if one does.
func compareAll[T any](p *Plan, kind Kind, ks keys[T], old, new map[string]T, hangs func(*T) string) {
	for _, name := range names(old, new) {
		a, had := old[name]
		b, has := new[name]
		s := Step{Kind: kind, Name: name}
		switch {
		case !has:
			s.Action = Remove
		case !had:
			s.Action = Add
		default:
			live, other := ks.differ(&a, &b)
			if why := hangs(&b); why != "" {
				other = append(other, why)
			}
			s.Keys = append(other, live...)
			if len(s.Keys) == 0 {
				p.Unchanged++
				continue
			}
			if s.Action = Reopen; len(other) == 0 {
				s.Action = Change
			}
		}
		p.Steps = append(p.Steps, s)
	}
}

// compareOwn compares a table of the daemon itself.
func compareOwn[T any](p *Plan, section string, ks keys[T], a, b *T) {
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
