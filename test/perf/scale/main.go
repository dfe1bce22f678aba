//go:build linux

// Command scale measures what a virtual machine costs a daemon that has many: memory, processor time while all are idle, and the time to
// connect; and what a guest that floods its queue does to others.
//
//	go build -o bin/vhostd ./cmd/vhostd && go run ./test/perf/scale -vhostd bin/vhostd
//
// # Theory of operation
//
// `vhostd serve` gets a port for each guest; guests are the driver ends of a queue pair each, in this process, with a memory file each. Ports return
// what they get, so that a guest can tell that it lost nothing. For each number of guests:
//
//	start    ports, and nobody connected      memory of the daemon by itself
//	connect  one guest after the other        time from connect(2) to the answer behind the last message
//	idle     nobody sends                     memory, page tables, threads, descriptors; processor time of the daemon
//	busy     each guest sends 256 frames, in 4 bursts
//	rounds   all leave, all come back, and send again
//	left     all leave                        what is left 5 s later
//
// Memory is what is resident and the daemon's own (RssAnon, RssFile); guest memory that it has touched is the guest's, and page tables are
// listed beside. Figures for one guest are differences to the daemon without any, divided by their number.
//
// # Fairness
//
// One guest sends as fast as it can and others a frame now and then: each at a port of its own that returns them, and then all at one switch, where each has
// another guest that gets them. What is measured is how long the others wait for the used element of their frame, and for the frame to arrive. Their
// threads have real-time priority, so that what they wait for is vhostd, and not their own turn on a processor; vhostd and the one that floods have none.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// config is what to measure.
type config struct {
	vhostd string
	size   int           // descriptors of each queue
	idle   time.Duration // over which processor time is taken
	rounds int           // that all guests leave and come back
}

func main() {
	var c config
	counts, fair, asJSON := "1,10,100,500", 10*time.Second, false
	flag.StringVar(&c.vhostd, "vhostd", "bin/vhostd", "the program to measure")
	flag.StringVar(&counts, "guests", counts, "numbers of guests, a list")
	flag.IntVar(&c.size, "size", 256, "descriptors of each queue")
	flag.DurationVar(&c.idle, "idle", 20*time.Second, "time over which idle guests are watched")
	flag.IntVar(&c.rounds, "rounds", 3, "times that all guests leave and come back")
	flag.DurationVar(&fair, "fair", fair, "time of the measurement of fairness; 0: none")
	flag.BoolVar(&asJSON, "json", false, "print JSON")
	flag.Parse()
	if err := measure(os.Stdout, c, counts, fair, asJSON); err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(1)
	}
}

func measure(w io.Writer, c config, counts string, fair time.Duration, asJSON bool) error {
	var all []result
	for s := range strings.SplitSeq(counts, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			return fmt.Errorf("-guests %q: want numbers with commas between", counts)
		}
		r, err := scale(c, n)
		if err != nil {
			return fmt.Errorf("%d guests: %w", n, err)
		}
		all = append(all, *r)
	}
	var f []fairness
	for _, network := range []string{echoing, switched} {
		if fair == 0 {
			break
		}
		one, err := fairly(c, network, 9, fair)
		if err != nil {
			return fmt.Errorf("fairness: %w", err)
		}
		f = append(f, *one)
	}
	if asJSON {
		return json.NewEncoder(w).Encode(map[string]any{"guests": all, "fairness": f})
	}
	return report(w, all, f)
}

// result is what one number of guests has come to.
type result struct {
	Guests  int           `json:"guests"`
	Start   usage         `json:"start"`
	Idle    usage         `json:"idle"`
	Busy    usage         `json:"busy"`
	Left    usage         `json:"left"`     // by the first that were there
	Again   usage         `json:"again"`    // by the last
	CPU     float64       `json:"idle_cpu"` // of a processor
	Median  time.Duration `json:"connect_median_ns"`
	P99     time.Duration `json:"connect_p99_ns"`
	Longest time.Duration `json:"connect_max_ns"`
}

// frames that each guest sends when it is busy: so many at once, so often.
const (
	burst  = 64
	bursts = 4
)

func scale(c config, n int) (_ *result, err error) {
	d, err := startDaemon(c.vhostd, echoing, n)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	r := &result{Guests: n}
	if r.Start, err = d.usage(); err != nil {
		return nil, err
	}
	guests, took, err := connect(d, n, c.size)
	if err != nil {
		return nil, err
	}
	r.Median, r.P99, r.Longest = quantile(took, 0.5), quantile(took, 0.99), quantile(took, 1)
	if err := r.watch(d, c.idle); err != nil {
		return nil, err
	}
	if err := exchange(guests); err != nil {
		return nil, err
	}
	if r.Busy, err = d.usage(); err != nil {
		return nil, err
	}
	if err := leave(d, guests); err != nil {
		return nil, err
	}
	if r.Left, err = d.tidied(); err != nil {
		return nil, err
	}
	for range c.rounds {
		if guests, _, err = connect(d, n, c.size); err != nil {
			return nil, err
		}
		if err := exchange(guests); err != nil {
			return nil, err
		}
		if err := leave(d, guests); err != nil {
			return nil, err
		}
	}
	r.Again, err = d.tidied()
	return r, err
}

// connect has n guests come, one after the other.
func connect(d *daemon, n, size int) (guests []*guest, took []time.Duration, err error) {
	for i := range n {
		from := time.Now()
		g, err := newGuest(d.socket(i), size)
		if err != nil {
			return guests, took, fmt.Errorf("guest %d: %w", i, err)
		}
		took = append(took, time.Since(from))
		guests = append(guests, g)
	}
	return guests, took, nil
}

// watch takes the daemon's memory and processor time while nobody does anything.
func (r *result) watch(d *daemon, idle time.Duration) (err error) {
	time.Sleep(idle / 4) // what polls, polls no more
	before, err := d.cpu()
	if err != nil {
		return err
	}
	from := time.Now()
	time.Sleep(idle)
	after, err := d.cpu()
	if err != nil {
		return err
	}
	r.CPU = float64(after-before) / float64(time.Since(from))
	r.Idle, err = d.usage()
	return err
}

// exchange has every guest send its frames, a few guests at a time.
func exchange(guests []*guest) error {
	var all sync.WaitGroup
	errs := make([]error, len(guests))
	for from := 0; from < len(guests); from += 8 {
		for i, g := range guests[from:min(from+8, len(guests))] {
			all.Go(func() {
				for range bursts {
					if err := g.echo(burst, maxFrame); err != nil {
						errs[from+i] = fmt.Errorf("guest %d: %w", from+i, err)
						return
					}
				}
			})
		}
		all.Wait()
	}
	return errors.Join(errs...)
}

// leave has all guests hang up, and waits until the daemon has noticed.
func leave(d *daemon, guests []*guest) error {
	for _, g := range guests {
		g.close()
	}
	return d.emptied()
}
