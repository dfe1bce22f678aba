// Command vmtovm compares two guests on a switch of vhostd's (netdev/l2switch) with two guests on DPDK's testpmd, which forwards between two vhost ports
// (io). They take turns (A B A B), with the same guest for both: the driver end of vhostd bench, one thread that has both ports. The back-end has
// processor 0, the guest processor 1. A second counts only in its placement class (internal/placement), and only if nothing else ran on the two.
// Where both sides send frames of one length, frames per second are compared, else bits. What has no bar is measured with -frame only.
//
//	go run ./test/perf/vmtovm -pairs 5        five minutes
//
// On a machine that has other work, -any counts all seconds: that shows a direction, which is no result.
//
// It wants root, and 512 huge pages, for which see test/perf.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/bench"
	"github.com/vhostd/vhostd/internal/placement"
	"github.com/vhostd/vhostd/netdev/l2switch"
	"github.com/vhostd/vhostd/test/dpdk"
	"github.com/vhostd/vhostd/vhostuser"
)

const (
	backCPU  = 0
	guestCPU = 1
)

// work is a length of frames; DPDK's may be another. bar is the ratio that is wanted, 0 where none is.
type work struct {
	vhostd, dpdk int
	bar          float64
}

var works = []work{{64, 64, 1}, {1518, 1518, 1.5}, {65535, 65535, 2}, {9000, 9000, 0}, {65535, 9000, 0}}

// String is the work as -frame names it.
func (w work) String() string {
	if w.vhostd == w.dpdk {
		return strconv.Itoa(w.vhostd)
	}
	return fmt.Sprintf("%d/%d", w.vhostd, w.dpdk)
}

// wanted tells whether a work is to be done.
func (o options) wanted(w work) bool {
	if o.only == "" {
		return w.bar > 0
	}
	return o.only == w.String()
}

type options struct {
	pairs, seconds     int
	window             int
	packed, guard, any bool
	only               string
}

func main() {
	log.SetFlags(0)
	var o options
	flag.IntVar(&o.pairs, "pairs", 3, "turns of each")
	flag.IntVar(&o.seconds, "seconds", 4, "good seconds wanted of each turn, of half as many again")
	flag.BoolVar(&o.any, "any", false, "count seconds in which other work ran on the two processors")
	flag.IntVar(&o.window, "window", 0, "`frames` under way at most, as TCP has them; 0: a flood")
	flag.BoolVar(&o.packed, "packed", false, "packed rings")
	flag.BoolVar(&o.guard, "guard", false, "the switch checks source addresses and DHCP")
	flag.StringVar(&o.only, "frame", "", "only frames of this `length`: of the lengths with a bar, 9000, or 65535/9000, where testpmd has 9000")
	serve := flag.String("serve", "", "be the switch, with ports at these `sockets`")
	flag.Parse()
	if *serve != "" {
		if err := o.serve(strings.Split(*serve, ",")); err != nil {
			log.Fatal(err)
		}
		return
	}
	if err := o.compare(); err != nil {
		log.Fatal(err)
	}
}

// serve is the switch's process.
func (o options) serve(sockets []string) error {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt)
	defer cancel()
	s, err := l2switch.New(l2switch.Config{})
	if err != nil {
		return err
	}
	var all sync.WaitGroup
	for _, path := range sockets {
		d, err := s.AddPort(l2switch.PortConfig{Name: path, Guard: l2switch.Guard{NoDHCPServer: o.guard, NoRouter: o.guard}})
		if err != nil {
			return err
		}
		b, err := backend.New(backend.Options{Device: d, Poll: backend.DefaultPoll, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
		if err != nil {
			return err
		}
		l, err := vhostuser.Listen(path, vhostuser.ListenOptions{})
		if err != nil {
			return err
		}
		all.Add(1)
		go func() {
			defer all.Done()
			if err := b.Serve(ctx, l); err != nil {
				log.Print(err)
			}
		}()
	}
	all.Wait()
	return nil
}

var sides = [...]string{"vhostd", "DPDK"}

// compare prints the table.
func (o options) compare() error {
	var table strings.Builder
	for _, w := range works {
		if !o.wanted(w) {
			continue
		}
		rates := map[placement.Class]*[2][]float64{}
		for i := range o.pairs {
			for side, size := range []int{w.vhostd, w.dpdk} {
				seconds, err := o.turn(side == 1, size)
				if err != nil { // testpmd does not answer at times: the turn is lost, not what was measured so far
					log.Printf("%d B, turn %d of %s is lost: %v", size, i+1, sides[side], err)
					continue
				}
				log.Printf("%d B, turn %d of %s: %d seconds count", size, i+1, sides[side], len(seconds))
				for _, s := range seconds {
					if rates[s.Class] == nil {
						rates[s.Class] = &[2][]float64{}
					}
					v := float64(s.HostToGuest.Bytes) / s.Length.Seconds()
					rates[s.Class][side] = append(rates[s.Class][side], v)
				}
			}
		}
		w.print(&table, rates)
	}
	fmt.Printf("| frames | class | vhostd | DPDK | ratio | bar | seconds |\n|---|---|---:|---:|---:|---:|---:|\n%s", table.String())
	return nil
}

// print prints the medians, in frames per second or, when the two sides' lengths differ, in bits.
func (w work) print(to *strings.Builder, rates map[placement.Class]*[2][]float64) {
	for class, r := range rates {
		if len(r[0]) == 0 || len(r[1]) == 0 {
			fmt.Fprintf(to, "| %d B | %s | | | | %.1f | %d + %d |\n", w.vhostd, class, w.bar, len(r[0]), len(r[1]))
			continue
		}
		m := [2]float64{placement.Median(r[0]), placement.Median(r[1])}
		name, unit, by := fmt.Sprintf("%d B", w.vhostd), "M/s", float64(w.vhostd)*1e6
		if w.vhostd != w.dpdk {
			name, unit, by = fmt.Sprintf("%d B against %d B", w.vhostd, w.dpdk), "Gbit/s", 1e9/8
		}
		fmt.Fprintf(to, "| %s | %s | %.2f %s | %.2f %s | %.2f | %.1f | %d + %d |\n", name, class, m[0]/by, unit, m[1]/by, unit, m[0]/m[1], w.bar, len(r[0]), len(r[1]))
	}
}

// turn is one side's.
func (o options) turn(isDPDK bool, size int) (good []bench.Second, err error) {
	dir, err := os.MkdirTemp("", "vhostd-perf")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	a, b := dir+"/a", dir+"/b"
	var back *dpdk.Process
	if isDPDK {
		second := strings.Replace(dpdk.Vhost(b), "net_vhost0", "net_vhost1", 1)
		back, err = dpdk.Testpmd(dpdk.Options{CPU: backCPU, Vdevs: []string{dpdk.Vhost(a), second}, Mode: "io", Frame: min(size, 9000)})
	} else {
		back, err = dpdk.Start(backCPU, os.Args[0], "-serve", a+","+b, fmt.Sprintf("-guard=%v", o.guard))
	}
	if err != nil {
		return nil, err
	}
	defer back.Stop()
	for _, path := range []string{a, b} {
		if err := back.WaitSocket(path); err != nil {
			return nil, err
		}
	}
	if isDPDK {
		back.Say("start")
		time.Sleep(300 * time.Millisecond)
	}
	c := bench.DefaultConfig()
	c.Path, c.To, c.Direction, c.Packed, c.Frames, c.InOrder, c.Huge, c.CPU = a, b, bench.Through, o.packed, []int{size}, true, true, guestCPU
	c.Window = o.window
	c.Duration = time.Duration(o.seconds) * time.Second * 3 / 2
	r, err := bench.Run(context.Background(), c)
	if err != nil {
		return nil, fmt.Errorf("%w\n%s", err, back.Tail())
	}
	for _, s := range r.Seconds {
		if (s.Quiet || o.any) && s.Class != placement.Moved && len(good) < o.seconds {
			good = append(good, s)
		}
	}
	if os.Getenv("VERBOSE") != "" {
		for _, s := range r.Seconds {
			log.Printf("dpdk=%v %+v", isDPDK, s)
		}
	}
	return good, nil
}
