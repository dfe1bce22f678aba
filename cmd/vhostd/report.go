package main

import (
	"os"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/netdev"
	"github.com/vhostd/vhostd/netdev/user"
)

// The directions: fromGuest is that of a transmitq, the queues that have outcomes.
const (
	fromGuest = "FromGuest"
	toGuest   = "ToGuest"
)

// outcomes are the keys of QueueStats.Outcomes in the order in which people see them: what is truly zero-copy, copies by their reason, losses.
var outcomes = []string{"zerocopied", "copied", "copied_small", "copied_cap", "copied_fallback", "copied_anyway", "dropped"}

// report is what vhostd stats shows and prints as JSON: the backend's counters with the daemon they belong to.
type report struct {
	Daemon daemonInfo `json:"vhostd"`
	backend.Stats
	User *userInfo `json:"user,omitempty"` // with --net user
}

// userInfo is what a user-mode network carries now.
type userInfo struct {
	Connections      int           `json:"connections"`
	ConnectionsTotal uint64        `json:"connections_total"`
	UDPFlows         int           `json:"udp_flows"`
	Pings            int           `json:"pings"`
	Leases           int           `json:"leases"`
	Forwards         []forwardInfo `json:"forwards,omitempty"`
}

type forwardInfo struct {
	Proto  string `json:"proto"`
	Host   string `json:"host"` // as it is listened on
	Guest  string `json:"guest"`
	Active int    `json:"active"`
	Total  uint64 `json:"total"`
}

type daemonInfo struct {
	Version       string  `json:"version"`
	PID           int     `json:"pid"`
	Socket        string  `json:"socket,omitempty"`
	Net           string  `json:"net,omitempty"`
	Config        string  `json:"config,omitempty"` // of vhostd serve
	UptimeSeconds float64 `json:"uptime_seconds"`
}

// reporter returns a function that takes snapshots.
func reporter(be *backend.Backend, dev netdev.Device, s settings, socket string) func() report {
	start, info := time.Now(), daemonInfo{Version: buildInfo().Version, PID: os.Getpid(), Socket: socket, Net: s.net}
	return func() report {
		r := report{Daemon: info, Stats: be.Stats()}
		r.Daemon.UptimeSeconds = time.Since(start).Seconds()
		if u, ok := dev.(*user.Device); ok {
			r.User = userReport(u.Stats())
		}
		return r
	}
}

func userReport(st user.Stats) *userInfo {
	u := &userInfo{Connections: st.Conns, ConnectionsTotal: st.ConnsTotal, UDPFlows: st.UDPFlows, Pings: st.Pings, Leases: st.Leases}
	for _, f := range st.Forwards {
		u.Forwards = append(u.Forwards, forwardInfo{f.Proto, f.Host.String(), f.Guest.String(), f.Active, f.Total})
	}
	return u
}
