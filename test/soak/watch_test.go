//go:build linux

package soak

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/test/vm/daemon"
)

// What fluctuates is compared by medians, of the last third of the time with the second, and may grow by this much: what Go's heap, its stacks and its
// allocator are worth, and threads that the runtime makes when many goroutines are in system calls at once, and keeps. Buffers that a device uses again are as
// long as the longest frame that each has held, and in a short time not all have held a long one.
const (
	memorySlack      = 0.10
	memoryFloor      = 3 << 10 // KiB
	memoryFloorShort = 12 << 10
	threadsSlack     = 4
	goroutinesSlack  = 3
	short            = 10 * time.Minute
)

// rest bounds the time that a daemon takes to be done with guests that have gone, and hostRest that in which the host's sockets go as well: those of UDP stay
// for three minutes behind the last answer.
const (
	rest     = 20 * time.Second
	hostRest = 10 * time.Minute
	longEnd  = 5 * time.Minute // a run that is to wait for that is longer than this
)

// sample is a look at a daemon without guests.
type sample struct {
	at time.Time
	daemon.Resources
}

// watch keeps what the daemons of a link held, round by round.
type watch struct {
	l       *link
	every   time.Duration
	floor   int // KiB
	next    time.Time
	samples [][]sample // by daemon
	unused  []daemon.Resources
}

// maxSamples is how many samples there are at most.
const maxSamples = 300

func newWatch(t *testing.T, l *link, end time.Time) *watch {
	w := &watch{l: l, every: time.Until(end) / maxSamples, floor: memoryFloor, samples: make([][]sample, len(l.daemons))}
	if time.Until(end) < short {
		w.floor = memoryFloorShort
	}
	for _, d := range l.daemons {
		w.unused = append(w.unused, d.resources(t))
	}
	return w
}

// look waits until the daemons are at rest and have let go of all that was the guests'.
func (w *watch) look(t *testing.T, what string) {
	t.Helper()
	if time.Now().Before(w.next) {
		return
	}
	w.next = time.Now().Add(w.every)
	for i, d := range w.l.daemons {
		var now daemon.Resources
		for end := time.Now().Add(rest); ; time.Sleep(20 * time.Millisecond) {
			now = d.resources(t)
			if leak := w.leak(i, now); leak == "" {
				break
			} else if time.Now().After(end) {
				t.Fatalf("%s holds more than after its first round: %s. The round: %s", d.net, leak, what)
			}
		}
		w.samples[i] = append(w.samples[i], sample{time.Now(), now})
	}
}

// leak compares with the first look.
func (w *watch) leak(i int, now daemon.Resources) string {
	switch {
	case now.Memory > 0:
		return fmt.Sprintf("%d mappings of guest memory", now.Memory)
	case len(w.samples[i]) == 0 || w.l.host:
		return ""
	}
	now.Goroutines -= goroutinesSlack // the runtime's and the web server's come and go
	return now.Leak(w.samples[i][0].Resources)
}

// settle waits, behind the last round of a long run, until the host's sockets have gone. How many there are before depends on how fast the guests were.
func (w *watch) settle(t *testing.T) {
	if !w.l.host || *duration < longEnd {
		return
	}
	for i, d := range w.l.daemons {
		before := w.samples[i][0].Resources // with what the first guest leaves for all that follow
		before.FDs = maps.Clone(before.FDs)
		before.FDs["socket"], before.Goroutines = w.unused[i].FDs["socket"], w.unused[i].Goroutines+goroutinesSlack
		for end := time.Now().Add(hostRest); ; time.Sleep(time.Second) {
			now := d.resources(t)
			if leak := now.Leak(before); leak == "" {
				t.Logf("%s: at rest %v", d.net, now)
				break
			} else if time.Now().After(end) {
				t.Errorf("%s holds more than before its first guest: %s", d.net, leak)
				break
			}
		}
	}
}

// resources looks at a daemon after a garbage collection.
func (d *daemonOf) resources(t *testing.T) daemon.Resources {
	t.Helper()
	d.get(t, "/debug/pprof/heap?gc=1")
	r, err := daemon.ResourcesOf(d.PID())
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(d.get(t, "/metrics")) {
		_, _ = fmt.Sscanf(line, "go_goroutines %d", &r.Goroutines)
	}
	return r
}

// get asks a daemon's own web server.
func (d *daemonOf) get(t *testing.T, path string) string {
	t.Helper()
	dial := func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		err = d.ns.Do(func() error {
			c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
			return err
		})
		return c, err
	}
	client := &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}, Timeout: vhosttest.Patience}
	var resp *http.Response
	vhosttest.Eventually(t, "an answer to "+path, func() bool { // the server gives up on who asks too slowly, as all do on a busy machine
		r, err := client.Get("http://" + d.metrics + path)
		resp = r
		return err == nil
	})
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// judge compares windows.
func (w *watch) judge(t *testing.T) {
	for i, d := range w.l.daemons {
		s := w.samples[i]
		if len(s) == 0 {
			t.Errorf("%s was never looked at", d.net)
			continue
		}
		t.Logf("%s: first %v", d.net, s[0].Resources)
		t.Logf("%s: last  %v", d.net, s[len(s)-1].Resources)
		if len(s) < 6 {
			continue // too few rounds for windows
		}
		third := len(s) / 3
		for what, f := range map[string]struct {
			of    func(daemon.Resources) int
			slack func(before int) int
		}{
			"KiB resident":     {func(r daemon.Resources) int { return r.RSSKiB }, func(n int) int { return int(float64(n)*memorySlack) + w.floor }},
			"threads":          {func(r daemon.Resources) int { return r.Threads }, func(int) int { return threadsSlack }},
			"goroutines":       {func(r daemon.Resources) int { return r.Goroutines }, func(n int) int { return n/10 + goroutinesSlack }},
			"file descriptors": {daemon.Resources.Total, func(n int) int { return n / 10 }},
		} {
			if w.l.host && (what == "goroutines" || what == "file descriptors") {
				continue // see settle
			}
			before, after := median(s[third:2*third], f.of), median(s[2*third:], f.of)
			t.Logf("%s: %s: %d in the second third of the time, %d in the last", d.net, what, before, after)
			if after > before+f.slack(before) {
				t.Errorf("%s: %s grew from %d to %d (medians)", d.net, what, before, after)
			}
		}
	}
}

func median(s []sample, of func(daemon.Resources) int) int {
	var n []int
	for _, x := range s {
		n = append(n, of(x.Resources))
	}
	slices.Sort(n)
	return n[len(n)/2]
}
