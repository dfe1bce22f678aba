package config

// Log is [log].
type Log struct {
	Format string // text or json
	Level  string
}

var defaultLog = Log{Format: "text", Level: "info"}

var logKeys = keys[Log]{
	{name: "format", form: `"text" or "json"`, field: func(l *Log) any { return &l.Format }, check: oneOf("text", "json")},
	{name: "level", form: `"debug", "info", "warn" or "error"`, field: func(l *Log) any { return &l.Level }, check: oneOf("debug", "info", "warn", "error"), live: true},
}

// Control is [control].
type Control struct {
	Socket string // path
}

// ControlNone is the Socket that stands for none.
const ControlNone = "none"

var defaultControl = Control{Socket: "/run/vhostd/vhostd.ctl"}

var controlKeys = keys[Control]{
	{name: "socket", form: "a path", field: func(c *Control) any { return &c.Socket }},
}

// Metrics is [metrics].
type Metrics struct {
	Listen   string // address; "" for none
	Profiles bool   // Go's, at the same address
}

var metricsKeys = keys[Metrics]{
	{name: "listen", form: "an address like 127.0.0.1:9100", field: func(m *Metrics) any { return &m.Listen }},
	{name: "pprof", form: "true or false", field: func(m *Metrics) any { return &m.Profiles }},
}

// Sandbox is [sandbox]: which rights the daemon keeps once everything is open.
type Sandbox struct {
	Enabled bool
	User    string   // to become; "": nobody else
	Keep    []string // kinds of networks that a reload may add, beside those that are there at the start
}

var defaultSandbox = Sandbox{Enabled: true}

var sandboxKeys = keys[Sandbox]{
	{name: "enabled", form: "true or false", field: func(s *Sandbox) any { return &s.Enabled }},
	{name: "user", form: "NAME or UID, with :GROUP behind it or not", field: func(s *Sandbox) any { return &s.User }},
	{name: "keep", form: "kinds of networks", field: func(s *Sandbox) any { return &s.Keep }},
}
