// Package config reads the file of `vhostd serve`: which ports and switches a daemon has, in TOML.
//
// # Theory of operation
//
//	text --go-toml--> tables --keys--> Config        what the file asks for, as values of which the types and bounds are right
//	  `--lines------> where each key stands  `--> problems, each with its line; all of them, not the first
//
// Every table has a list of its keys (ports.go and others), and that list is all there is to know about a key: its name, its bounds, the field that
// it sets, and whether a running port takes a new value without being opened again. What a value means beyond that (whether a network can
// be opened, say) is for the reader of the Config to find out, who reports it in the same way: File.Blame.
//
// Compare takes two Configs apart into what has to be done to get from one to the other.
//
// # Rules of the file
//
// An unknown key is an error, for a key that was mistyped would be a wish that is silently not granted. A name is what TOML takes without
// quotes. Keys of [defaults] hold for every port that does not say otherwise.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/pelletier/go-toml/v2"
)

// MaxFile is the size of the largest file that is read, in bytes: more than a thousand ports take.
const MaxFile = 8 << 20

// Config is what a file says.
type Config struct {
	Log     Log
	Control Control
	Metrics Metrics
	Sandbox Sandbox
	// Defaults is [defaults], with its placeholders.
	Defaults Port
	// By name:
	Switches map[string]Switch
	Uplinks  map[string]Uplink
	Ports    map[string]Port
}

// File is a Config with what is wrong about it.
type File struct {
	Config
	Name     string // of the file, for people
	lines    map[string]int
	problems []Problem
}

// Load reads a file. Its error is one of the host's: what is wrong about the text is in File.Err.
func Load(path string) (*File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("configuration: %w", err)
	case len(text) > MaxFile:
		return nil, fmt.Errorf("configuration: %s has more than %d bytes", path, MaxFile)
	}
	return Parse(path, text), nil
}

// Parse reads a text; name stands for it in errors.
func Parse(name string, text []byte) *File {
	f := &File{Name: name, Config: Config{
		Log: defaultLog, Control: defaultControl, Sandbox: defaultSandbox,
		Switches: map[string]Switch{}, Uplinks: map[string]Uplink{}, Ports: map[string]Port{},
	}}
	var tables map[string]any
	if err := toml.NewDecoder(bytes.NewReader(text)).Decode(&tables); err != nil {
		f.syntax(err)
		return f
	}
	f.lines = lines(text)
	f.read(tables)
	f.check()
	return f
}

// syntax takes note of a text that is no TOML: nothing can be said about what follows.
func (f *File) syntax(err error) {
	p := Problem{Err: err}
	if d := (*toml.DecodeError)(nil); errors.As(err, &d) {
		p.Line, _ = d.Position()
	}
	f.problems = append(f.problems, p)
}

// sections are the tables at the top of a file.
var sections = []string{"log", "control", "metrics", "sandbox", "defaults", "switch", "uplink", "port"}

func (f *File) read(tables map[string]any) {
	for name, v := range tables {
		table, ok := v.(map[string]any)
		switch {
		case !contains(sections, name):
			f.Blame(name, fmt.Errorf("unknown table%s", suggest(name, sections)))
		case !ok:
			f.Blame(name, fmt.Errorf("want a table, [%s]", name))
		}
		tables[name] = table // nil reads as an empty one
	}
	table := func(name string) map[string]any { t, _ := tables[name].(map[string]any); return t }
	logKeys.read(f, "log", table("log"), &f.Log)
	controlKeys.read(f, "control", table("control"), &f.Control)
	metricsKeys.read(f, "metrics", table("metrics"), &f.Metrics)
	sandboxKeys.read(f, "sandbox", table("sandbox"), &f.Sandbox)
	f.named("switch", table("switch"), func(name, path string, keys map[string]any) {
		s := Switch{Name: name}
		switchKeys.read(f, path, keys, &s)
		f.Switches[name] = s
	})
	f.named("uplink", table("uplink"), func(name, path string, keys map[string]any) {
		u := defaultUplink
		u.Name = name
		uplinkKeys.read(f, path, keys, &u)
		f.Uplinks[name] = u
	})
	defaults := defaultPort
	portKeys.without("mac").read(f, "defaults", table("defaults"), &defaults)
	f.Defaults = defaults
	f.named("port", table("port"), func(name, path string, keys map[string]any) {
		p := defaults.clone()
		p.Name = name
		portKeys.read(f, path, keys, &p)
		p.expand()
		f.Ports[name] = p
	})
}

// named reads tables that people have given names to, [port.NAME] say.
func (f *File) named(kind string, tables map[string]any, read func(name, path string, keys map[string]any)) {
	for name, v := range tables {
		path := kind + "." + name
		keys, ok := v.(map[string]any)
		switch {
		case !ok:
			f.Blame(path, fmt.Errorf("unknown key: what stands in [%s] are tables, [%s.NAME]", kind, kind))
			continue
		case !isName(name):
			f.Blame(path, fmt.Errorf("%q is no name: want 1 to %d letters, digits, - and _", name, maxName))
			continue
		}
		read(name, path, keys)
	}
}

// maxName is the length of the longest name, in bytes.
const maxName = 64

func isName(s string) bool {
	for _, r := range s {
		if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_' {
			return false
		}
	}
	return s != "" && len(s) <= maxName
}
