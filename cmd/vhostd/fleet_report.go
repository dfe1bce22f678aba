package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/internal/config"
	"github.com/vhostd/vhostd/internal/control"
	"github.com/vhostd/vhostd/netdev/l2switch"
)

// fleetReport is what vhostd stats shows of a `vhostd serve`.
type fleetReport struct {
	Daemon   daemonInfo     `json:"vhostd"`
	Switches []switchReport `json:"switches,omitempty"`
	Ports    []portReport   `json:"ports"`
}

// portReport is one port of it. Stats are missing when it could not be opened.
type portReport struct {
	Name   string `json:"name"`
	State  string `json:"state"` // serving, waiting or failed
	Error  string `json:"error,omitempty"`
	Net    string `json:"net,omitempty"`
	Switch string `json:"switch,omitempty"`
	Socket string `json:"socket"`
	*backend.Stats
	User     *userInfo           `json:"user,omitempty"`
	Switched *l2switch.PortStats `json:"switched,omitempty"` // of a port of a switch
}

// States of a port.
const (
	serving = "serving" // a front-end is connected
	waiting = "waiting" // for one
	failed  = "failed"
)

func (m *member) report(name string) portReport {
	conf := m.configured()
	r := portReport{Name: name, State: waiting, Net: conf.Net, Switch: conf.Switch, Socket: conf.SocketPath}
	if err := m.err(); err != nil {
		r.State, r.Error = failed, err.Error()
		return r
	}
	full := m.port.report()
	if full.Connected {
		r.State = serving
	}
	r.Stats, r.User = &full.Stats, full.User
	return r
}

func (f *fleet) info() daemonInfo {
	return daemonInfo{Version: buildInfo().Version, PID: os.Getpid(), Config: f.path, UptimeSeconds: time.Since(f.start).Seconds()}
}

// report takes a snapshot of all switches and ports, in the order of their names.
func (f *fleet) report() fleetReport {
	r := fleetReport{Daemon: f.info(), Ports: []portReport{}}
	parts := f.all()
	switched := map[string]map[string]l2switch.PortStats{}
	for _, i := range slices.SortedFunc(maps.Keys(parts), func(a, b id) int { return cmp.Compare(a.name, b.name) }) {
		switch p := parts[i].(type) {
		case *switchPart:
			one := p.report(i.name)
			r.Switches = append(r.Switches, one)
			switched[i.name] = one.byPort()
		case *member:
			r.Ports = append(r.Ports, p.report(i.name))
		}
	}
	for i := range r.Ports {
		if st, ok := switched[r.Ports[i].Switch][r.Ports[i].Name]; ok {
			r.Ports[i].Switched = &st
		}
	}
	for i := range r.Switches {
		r.Switches[i].uplinks(parts)
	}
	return r
}

// statsArgs are those of the control request "stats".
type statsArgs struct {
	Port   string `json:"port,omitempty"`   // this one alone, with its queues
	Switch string `json:"switch,omitempty"` // this one alone, with the addresses that it has learned
}

func (f *fleet) handleStats(args json.RawMessage) (any, error) {
	var a statsArgs
	if err := control.ParseArgs(args, &a); err != nil {
		return nil, err
	}
	switch {
	case a.Port != "" && a.Switch != "":
		return nil, errors.New("a port or a switch can be asked for, not both")
	case a.Port != "":
		return f.reportPort(a.Port)
	case a.Switch != "":
		return f.reportSwitch(a.Switch)
	}
	return f.report(), nil
}

func (f *fleet) reportPort(name string) (any, error) {
	m, ok := f.part(id{config.KindPort, name}).(*member)
	if !ok {
		return nil, fmt.Errorf("there is no port %q", name)
	}
	if err := m.err(); err != nil {
		return nil, fmt.Errorf("port %s is closed: %w", name, err)
	}
	return m.port.report(), nil
}

// flow is the sum of a port's queues of one direction.
type flow struct{ frames, bytes uint64 }

func (p *portReport) flow(direction string) (f flow) {
	if p.Stats == nil {
		return f
	}
	for _, q := range p.Queues {
		if q.Direction == direction {
			f.frames += q.Frames
			f.bytes += q.Bytes
		}
	}
	return f
}

// printFleet prints for people. before is an earlier answer to make rates from, or nil.
func printFleet(w io.Writer, a, before *answer) error {
	d := a.Daemon
	states := map[string]int{}
	for _, p := range a.Ports {
		states[p.State]++
	}
	fmt.Fprintf(w, "vhostd %s, process %d, up %v, %s\n%s: %d serving, %d waiting, %d failed\n\n", d.Version, d.PID,
		time.Duration(d.UptimeSeconds*float64(time.Second)).Round(time.Second), d.Config,
		count(len(a.Ports), "port"), states[serving], states[waiting], states[failed])
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "PORT\tSTATE\tSESSIONS\tFROM GUEST\tBYTES\tBIT/S\tTO GUEST\tBYTES\tBIT/S\tDROPPED\t")
	for i := range a.Ports {
		p := &a.Ports[i]
		from, to := p.flow(fromGuest), p.flow(toGuest)
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%s\t%s\t%d\t%s\t%s\t%d\t\n", p.Name, p.State, p.sessions(),
			from.frames, bytesOf(from.bytes), bitRate(a, before, p, fromGuest), to.frames, bytesOf(to.bytes), bitRate(a, before, p, toGuest), p.dropped())
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, p := range a.Ports {
		if p.Error != "" {
			fmt.Fprintf(w, "\nport %s is closed: %s\n", p.Name, p.Error)
		}
	}
	for i := range a.Switches {
		if _, err := fmt.Fprintf(w, "\n%s\n", &a.Switches[i]); err != nil {
			return err
		}
	}
	return printDrops(w, a.Ports)
}

func (p *portReport) sessions() uint64 {
	if p.Stats == nil {
		return 0
	}
	return p.Sessions
}

// bitRate is that of a port since before, "-" if it cannot be told.
func bitRate(a, before *answer, p *portReport, direction string) string {
	if before == nil || before.Daemon.PID != a.Daemon.PID {
		return "-"
	}
	seconds := a.Daemon.UptimeSeconds - before.Daemon.UptimeSeconds
	i, ok := slices.BinarySearchFunc(before.Ports, p.Name, func(p portReport, name string) int { return cmp.Compare(p.Name, name) })
	if !ok || seconds <= 0 {
		return "-"
	}
	was, is := before.Ports[i].flow(direction).bytes, p.flow(direction).bytes
	if is < was { // it was opened anew
		return "-"
	}
	return decimal(float64(is-was) * 8 / seconds)
}

// drop is a reason for which a frame is lost.
type drop struct {
	name   string
	device bool // or the device's own reasons cover it
	count  func(q *queueStats) uint64
}

var drops = []drop{
	{"malformed", false, func(q *queueStats) uint64 { return q.Malformed }},
	{"invalid", false, func(q *queueStats) uint64 { return q.Invalid }},
	{"not enabled", true, func(q *queueStats) uint64 { return q.Outcomes["dropped"] - min(q.Outcomes["dropped"], q.SendDropped) }},
	{"too big", false, func(q *queueStats) uint64 { return q.TooBig }},
	{"send dropped", true, func(q *queueStats) uint64 { return q.SendDropped }},
	{"recv dropped", true, func(q *queueStats) uint64 { return q.RecvDropped }},
}

// drops are the port's, by reason; those that did not happen are missing.
func (p *portReport) drops() map[string]uint64 {
	all := map[string]uint64{}
	if p.Stats == nil {
		return all
	}
	for i := range p.Queues {
		for _, d := range drops {
			if n := d.count(&p.Queues[i]); n > 0 && (p.Switched == nil || !d.device) {
				all[d.name] += n
			}
		}
	}
	if p.Switched != nil { // which knows better why
		maps.Copy(all, p.Switched.Drops)
	}
	return all
}

func (p *portReport) dropped() (n uint64) {
	for _, m := range p.drops() {
		n += m
	}
	return n
}

// printDrops lists what was lost, and nothing if nothing was.
func printDrops(w io.Writer, ports []portReport) error {
	var lines []string
	for i := range ports {
		all := ports[i].drops()
		for _, reason := range slices.Sorted(maps.Keys(all)) {
			lines = append(lines, fmt.Sprintf("%s\t%s\t%d\t", ports[i].Name, reason, all[reason]))
		}
	}
	if len(lines) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t, "\nPORT\tDROPPED BECAUSE\tFRAMES\t\n%s\n", strings.Join(lines, "\n"))
	return t.Flush()
}

// portsCollector has the metrics of every port, with a label that tells it.
type portsCollector func() fleetReport

var portStateDesc = prometheus.NewDesc("vhostd_port_open", "Whether the port is open.", []string{"port"}, nil)

// Describe implements prometheus.Collector: ports come and go, so that nothing can be said before.
func (portsCollector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c portsCollector) Collect(ch chan<- prometheus.Metric) {
	r := c()
	for i := range r.Switches {
		r.Switches[i].collect(ch)
	}
	for _, p := range r.Ports {
		ch <- prometheus.MustNewConstMetric(portStateDesc, prometheus.GaugeValue, truth(p.State != failed), p.Name)
		if p.Stats == nil {
			continue
		}
		one := report{Daemon: r.Daemon, Stats: *p.Stats}
		one.Daemon.Socket = p.Socket
		prometheus.WrapCollectorWith(prometheus.Labels{"port": p.Name}, collector(func() report { return one })).Collect(ch)
	}
}
