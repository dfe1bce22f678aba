package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/vhostd/vhostd/internal/config"
	"github.com/vhostd/vhostd/netdev/l2switch"
)

// switchReport is one switch of a `vhostd serve`. Stats are missing when it could not be opened.
type switchReport struct {
	Name  string `json:"name"`
	Error string `json:"error,omitempty"`
	*l2switch.Stats
	Uplinks []uplinkReport     `json:"uplinks,omitempty"`
	Learned []l2switch.Address `json:"learned,omitempty"` // if they were asked for; at most maxLearned of them
}

// uplinkReport is an uplink that is not there.
type uplinkReport struct {
	Name  string `json:"name"`
	Error string `json:"error"`
}

// maxLearned is how many addresses are told: what an answer has room for.
const maxLearned = 16384

func (p *switchPart) report(name string) switchReport {
	r := switchReport{Name: name}
	if p.cause != nil {
		r.Error = p.cause.Error()
		return r
	}
	st := p.sw.Stats()
	slices.SortFunc(st.Ports, func(a, b l2switch.PortStats) int { return cmp.Compare(a.Name, b.Name) })
	r.Stats = &st
	return r
}

// byPort are the counters of its ports.
func (r *switchReport) byPort() map[string]l2switch.PortStats {
	ports := map[string]l2switch.PortStats{}
	if r.Stats != nil {
		for _, p := range r.Ports {
			ports[p.Name] = p
		}
	}
	return ports
}

// uplinks adds those that are not there.
func (r *switchReport) uplinks(parts map[id]part) {
	for i, p := range parts {
		if u, ok := p.(*uplinkPart); ok && u.cause != nil && u.configured().Switch == r.Name {
			r.Uplinks = append(r.Uplinks, uplinkReport{i.name, u.cause.Error()})
		}
	}
	slices.SortFunc(r.Uplinks, func(a, b uplinkReport) int { return cmp.Compare(a.Name, b.Name) })
}

// reportSwitch is one switch with what it has learned, in a field of its own so that nobody takes it for a port.
func (f *fleet) reportSwitch(name string) (any, error) {
	p, ok := f.part(id{config.KindSwitch, name}).(*switchPart)
	if !ok {
		return nil, fmt.Errorf("there is no switch %q", name)
	}
	if p.cause != nil {
		return nil, fmt.Errorf("switch %s is not there: %w", name, p.cause)
	}
	r := p.report(name)
	r.uplinks(f.all())
	r.Learned = p.sw.Table()
	slices.SortFunc(r.Learned, func(a, b l2switch.Address) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.VLAN, b.VLAN), cmp.Compare(a.MAC, b.MAC))
	})
	r.Learned = r.Learned[:min(len(r.Learned), maxLearned)]
	return struct {
		Daemon daemonInfo    `json:"vhostd"`
		Switch *switchReport `json:"switch"`
	}{f.info(), &r}, nil
}

// String is a line about it, and one for each uplink that is not there.
func (r *switchReport) String() string {
	if r.Stats == nil {
		return fmt.Sprintf("switch %s is not there: %s", r.Name, r.Error)
	}
	s := fmt.Sprintf("switch %s: %s, %d of %d addresses learned (%d refused), %s to another port",
		r.Name, count(len(r.Ports), "port"), r.Addresses, r.MaxAddresses, r.NotLearned, count(int(r.Moves), "move"))
	for _, u := range r.Uplinks {
		s += fmt.Sprintf("\nuplink %s is not there: %s", u.Name, u.Error)
	}
	return s
}

// print is for people.
func (r *switchReport) print(w io.Writer) error {
	fmt.Fprintf(w, "%s\n\n", r)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "PORT\tCONNECTED\tFROM GUEST\tBYTES\tTO GUEST\tBYTES\tFLOODED\tWAITING\tCOPIED OUT\tADDRESSES\tDROPPED BECAUSE\t")
	for _, p := range r.Ports {
		fmt.Fprintf(t, "%s\t%v\t%d\t%s\t%d\t%s\t%d\t%d\t%d\t%d\t%s\t\n", p.Name, p.Connected, p.FromGuest.Frames, bytesOf(p.FromGuest.Bytes),
			p.ToGuest.Frames, bytesOf(p.ToGuest.Bytes), p.Flooded, p.Waiting, p.Orphaned, p.Addresses, reasons(p.Drops))
	}
	if len(r.Learned) > 0 {
		fmt.Fprintln(t, "\nADDRESS\tVLAN\tPORT\tSECONDS\t")
	}
	for _, a := range r.Learned {
		fmt.Fprintf(t, "%s\t%d\t%s\t%d\t\n", a.MAC, a.VLAN, a.Port, a.Age)
	}
	if more := r.Addresses - len(r.Learned); more > 0 && len(r.Learned) == maxLearned {
		fmt.Fprintf(t, "\nand %d more\n", more)
	}
	return t.Flush()
}

// reasons lists drops, "-" for none.
func reasons(drops map[string]uint64) string {
	var list []string
	for _, reason := range slices.Sorted(maps.Keys(drops)) {
		list = append(list, fmt.Sprintf("%s %d", reason, drops[reason]))
	}
	if list == nil {
		return "-"
	}
	return strings.Join(list, ", ")
}

var switchLabels = []string{"switch"}

var switchMetrics = []metric[*l2switch.Stats]{
	gauge("vhostd_switch_addresses", "Addresses learned.", switchLabels, func(s *l2switch.Stats) float64 { return float64(s.Addresses) }),
	gauge("vhostd_switch_addresses_max", "The most that can be learned.", switchLabels, func(s *l2switch.Stats) float64 { return float64(s.MaxAddresses) }),
	counter("vhostd_switch_moves", "Addresses that were learned at another port before.", switchLabels, func(s *l2switch.Stats) float64 { return float64(s.Moves) }),
	counter("vhostd_switch_not_learned", "Addresses that were not learned because the table was full.", switchLabels, func(s *l2switch.Stats) float64 { return float64(s.NotLearned) }),
}

var switchPortLabels = []string{"switch", "port"}

var switchPortMetrics = []metric[*l2switch.PortStats]{
	counter("vhostd_switch_port_flooded", "Frames from the port that went to all others.", switchPortLabels, func(p *l2switch.PortStats) float64 { return float64(p.Flooded) }),
	counter("vhostd_switch_port_orphaned", "Frames for the port that were copied so that their sender got its pages back.", switchPortLabels,
		func(p *l2switch.PortStats) float64 { return float64(p.Orphaned) }),
	gauge("vhostd_switch_port_waiting_frames", "Frames that wait for the port.", switchPortLabels, func(p *l2switch.PortStats) float64 { return float64(p.Waiting) }),
	gauge("vhostd_switch_port_addresses", "Addresses learned behind the port.", switchPortLabels, func(p *l2switch.PortStats) float64 { return float64(p.Addresses) }),
}

var (
	switchOpenDesc = prometheus.NewDesc("vhostd_switch_open", "Whether the switch is there.", switchLabels, nil)
	switchDropDesc = prometheus.NewDesc("vhostd_switch_port_dropped_total", "Frames that the switch dropped, by reason.", append(switchPortLabels, "reason"), nil)
)

func (r *switchReport) collect(ch chan<- prometheus.Metric) {
	ch <- prometheus.MustNewConstMetric(switchOpenDesc, prometheus.GaugeValue, truth(r.Stats != nil), r.Name)
	if r.Stats == nil {
		return
	}
	for _, m := range switchMetrics {
		ch <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value(r.Stats), r.Name)
	}
	for i := range r.Ports {
		p := &r.Ports[i]
		for _, m := range switchPortMetrics {
			ch <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value(p), r.Name, p.Name)
		}
		for reason, n := range p.Drops {
			ch <- prometheus.MustNewConstMetric(switchDropDesc, prometheus.CounterValue, float64(n), r.Name, p.Name, reason)
		}
	}
}
