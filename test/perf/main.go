// Command perf compares vhostd with DPDK's vhost library, or with other vhostd binaries. They take turns (A B A B), driven by the same guest: DPDK's
// virtio-user in dpdk-testpmd, and the driver end of vhostd bench. Each turn is cut into seconds, and a second counts only in its placement class
// (internal/placement), and only if nothing else ran on the two processors.
//
//	make bench-peers
//	go build -o bin/vhostd ./cmd/vhostd && go run ./test/perf -pairs 5 -date 2026-11-22
//	go run ./test/perf -against /tmp/vhostd.before,dpdk -work host-to-guest-64 -guest virtio-user
//
// The back-end runs on processor 0, the guest on processor 1. It wants root, and 512 huge pages, which it sets aside and gives back.
package main

import (
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vhostd/vhostd/internal/placement"
)

// The processors that the two ends run on.
const (
	backCPU  = 0
	guestCPU = 1
)

// options are the command line's.
type options struct {
	peers   []string // the vhostd binary, and what it is compared with: dpdk, or other binaries
	pairs   int
	seconds int
	works   []string
	rings   []string
	guests  []string
	date    string
	limit   time.Duration
}

func main() {
	log.SetFlags(0)
	var o options
	var vhostd, against, works, rings, guests string
	flag.StringVar(&vhostd, "vhostd", "bin/vhostd", "the vhostd binary")
	flag.StringVar(&against, "against", dpdkPeer, "comma-separated: what it is compared with, "+dpdkPeer+" or other vhostd binaries")
	flag.IntVar(&o.pairs, "pairs", 3, "turns of each back-end")
	flag.IntVar(&o.seconds, "seconds", 2, "good seconds wanted of each turn")
	flag.StringVar(&works, "work", "", "comma-separated names of the works to do; all when empty: "+workNames())
	flag.StringVar(&rings, "ring", "split,packed", "layouts of the rings")
	flag.StringVar(&guests, "guest", "virtio-user", "who drives the rings where rates are measured: virtio-user (DPDK's), bench (vhostd's), or both with a comma")
	flag.DurationVar(&o.limit, "limit", 0, "begin no work after this time; 0: none is left out")
	flag.StringVar(&o.date, "date", "", "also write docs/perf/DATE-peers.md, for example 2026-11-22")
	flag.Parse()
	o.peers = append([]string{vhostd}, split(against)...)
	o.works, o.rings, o.guests = split(works), split(rings), split(guests)
	if err := o.run(); err != nil {
		log.Fatal(err)
	}
}

// split cuts a comma list; nothing is an empty list.
func split(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' })
}

// run does all works and prints the table, and writes it if it has a date.
func (o options) run() error {
	back, err := hugePages(512)
	if err != nil {
		return err
	}
	defer back()
	out := io.Writer(os.Stdout)
	if o.date != "" {
		f, err := os.Create("docs/perf/" + o.date + "-peers.md")
		if err != nil {
			return err
		}
		defer f.Close()
		out = io.MultiWriter(os.Stdout, f)
		fmt.Fprint(f, o.preamble())
	}
	o.printHead(out)
	began := time.Now()
	for _, w := range works {
		if len(o.works) > 0 && !slices.Contains(o.works, w.name) {
			continue
		}
		guests, rings := o.guests, o.rings
		if w.guest != "" {
			guests = []string{w.guest}
		}
		if w.guest == nobody {
			rings = []string{"-"}
		}
		for _, guest := range guests {
			for _, ring := range rings {
				if o.limit > 0 && time.Since(began) > o.limit {
					log.Printf("%s, %s, %s: left out, as %v are over", w.name, guest, ring, o.limit)
					continue
				}
				o.compare(out, w, turn{guest: guest, ring: ring})
			}
		}
	}
	return nil
}

// preamble is the head of the file.
func (o options) preamble() string {
	return fmt.Sprintf(`# %s: vhostd beside DPDK's vhost library

%s

Back-end on processor %d, guest on processor %d, in turns A B A B. Medians over quiet seconds of one placement class; compare within a line only.
Rates are millions of frames a second, and a ratio above 1 says that vhostd is faster; latencies are the p50 of each second, idle is the
share of a processor that the back-end takes, and there a ratio below 1 says that vhostd does with less. "headers": vhostd's null device reads each frame's header, as
a device with a wire must. Echo: vhostd with --workers pair, back to back, or 2 ms apart. "wake-up-alone" is what it takes a thread that waits for an eventfd on the
other processor to wake, as far apart and with no back-end at all: echo-asleep has it in it.

`, o.date, "```\n"+"go run ./test/perf "+strings.Join(os.Args[1:], " ")+"\n```", backCPU, guestCPU)
}

// printHead prints the head of the table.
func (o options) printHead(out io.Writer) {
	fmt.Fprint(out, "| work | guest | ring | class | vhostd |")
	for _, peer := range o.peers[1:] {
		fmt.Fprintf(out, " %s | ratio |", peer)
	}
	fmt.Fprintf(out, " wanted | samples |\n|%s\n", strings.Repeat("---|", 5+2*len(o.peers)))
}

// compare has the back-ends take turns at a work.
func (o options) compare(out io.Writer, w work, t turn) {
	values := map[placement.Class][][]float64{} // by peer
	for range o.pairs {
		for i, peer := range o.peers {
			t.peer = peer
			samples, err := o.measure(w, t)
			if err != nil {
				// testpmd's console hangs at times under a flood: the turn is lost, and said to be.
				log.Printf("%s, %s, %s: turn lost: %v", w.name, t.guest, peer, err)
			}
			for _, s := range samples {
				if values[s.class] == nil {
					values[s.class] = make([][]float64, len(o.peers))
				}
				values[s.class][i] = append(values[s.class][i], s.value)
			}
		}
	}
	for _, class := range []placement.Class{placement.Near, placement.Far, placement.Unknown} {
		if v := values[class]; v != nil {
			o.printLine(out, w, t, class, v)
		}
	}
}

// printLine prints what the peers reached in seconds of one class.
func (o options) printLine(out io.Writer, w work, t turn, class placement.Class, v [][]float64) {
	fmt.Fprintf(out, "| %s | %s | %s | %s | %s |", w.name, t.guest, t.ring, class, w.format(v[0]))
	samples := fmt.Sprint(len(v[0]))
	for _, theirs := range v[1:] {
		ratio := "-"
		if len(v[0]) > 0 && len(theirs) > 0 {
			ratio = fmt.Sprintf("%.2f", placement.Median(v[0])/placement.Median(theirs))
		}
		fmt.Fprintf(out, " %s | %s |", w.format(theirs), ratio)
		samples += fmt.Sprintf(" + %d", len(theirs))
	}
	var theirs []float64
	if i := slices.Index(o.peers, dpdkPeer); i >= 0 {
		theirs = v[i]
	}
	fmt.Fprintf(out, " %s | %s |\n", w.verdict(t.packed(), v[0], theirs), samples)
}

// sample is one second, in the work's unit.
type sample struct {
	value float64
	class placement.Class
}

// format writes a median in the work's unit.
func (w work) format(v []float64) string {
	m := placement.Median(v)
	switch {
	case len(v) == 0:
		return "-"
	case w.kind == latency:
		return time.Duration(m).Round(10 * time.Nanosecond).String()
	case w.kind == idle:
		return fmt.Sprintf("%.3f %%", 100*m)
	}
	return fmt.Sprintf("%.2f", m/1e6)
}

const hugePagesFile = "/proc/sys/vm/nr_hugepages"

// hugePages sets huge pages of 2 MiB aside, unless there are as many, and returns what gives them back.
func hugePages(n int) (back func(), err error) {
	text, err := os.ReadFile(hugePagesFile)
	if err != nil {
		return nil, err
	}
	had, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || had >= n {
		return func() {}, err
	}
	if err := os.WriteFile(hugePagesFile, []byte(strconv.Itoa(n)), 0); err != nil {
		return nil, fmt.Errorf("%d huge pages are needed: %w", n, err)
	}
	return func() {
		if err := os.WriteFile(hugePagesFile, []byte(strconv.Itoa(had)), 0); err != nil {
			log.Print(err)
		}
	}, nil
}
