package main

import (
	"os"
	"time"

	"github.com/vhostd/vhostd/backend"
)

// report is what vhostd stats shows and prints as JSON: the backend's counters with the daemon they belong to.
type report struct {
	Daemon daemonInfo `json:"vhostd"`
	backend.Stats
}

type daemonInfo struct {
	Version       string  `json:"version"`
	PID           int     `json:"pid"`
	Socket        string  `json:"socket,omitempty"`
	Net           string  `json:"net"`
	UptimeSeconds float64 `json:"uptime_seconds"`
}

// reporter returns a function that takes snapshots.
func reporter(be *backend.Backend, s settings, socket string) func() report {
	start, info := time.Now(), daemonInfo{Version: buildInfo().Version, PID: os.Getpid(), Socket: socket, Net: s.net}
	return func() report {
		info := info
		info.UptimeSeconds = time.Since(start).Seconds()
		return report{info, be.Stats()}
	}
}
