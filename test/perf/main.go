// Command perf compares vhostd with DPDK's vhost library, both driven by the same guest: DPDK's virtio-user in dpdk-testpmd, which is
// neither's own. The two take turns (A B A B), each run is cut into seconds, and a second counts only in its placement class, and only if
// nothing else ran on the two processors.
//
//	go build -o bin/vhostd ./cmd/vhostd && go run ./test/perf -pairs 5
//
// # Placement
//
// On a shared machine the hypervisor moves the two processors that a comparison runs on: sometimes they share a cache ("near", a line
// travels there and back in some 60 ns), sometimes not ("far", some 310 ns). Rates differ by up to four times between the two, so rates
// are compared within a class only. The round trip is measured before and after every second.
package main

import (
	"flag"
	"fmt"
	"log"
	"os"
	"slices"
	"strings"
	"time"
)

// work is one thing to compare.
type work struct {
	name string
	size int  // bytes of a frame
	rx   bool // host to guest
}

var works = []work{
	{"guest-to-host-64", 64, false}, {"guest-to-host-1518", 1518, false},
	{"host-to-guest-64", 64, true}, {"host-to-guest-1518", 1518, true},
	{"guest-to-host-9000", 9000, false}, {"host-to-guest-9000", 9000, true},
}

// peer is a back-end.
type peer struct {
	name  string
	start func(w work, socket string, cpu int) (*process, error)
}

func main() {
	log.SetFlags(0)
	var (
		vhostd  = flag.String("vhostd", "bin/vhostd", "the vhostd binary")
		pairs   = flag.Int("pairs", 3, "turns of each back-end")
		seconds = flag.Int("seconds", 4, "good seconds wanted of each turn")
		only    = flag.String("work", "", "comma-separated names of the works to do; all when empty")
	)
	flag.Parse()
	peers := []peer{
		{"vhostd", func(w work, socket string, cpu int) (*process, error) { return startVhostd(*vhostd, w, socket, cpu) }},
		{"dpdk", startDPDK},
	}
	fmt.Printf("| work | class | vhostd Mpps | dpdk Mpps | ratio | seconds |\n|---|---|---|---|---|---|\n")
	for _, w := range works {
		if *only != "" && !slices.Contains(strings.Split(*only, ","), w.name) {
			continue
		}
		rates := map[string]map[string][]float64{}
		for range *pairs {
			for _, p := range peers {
				samples, err := measure(p, w, *seconds)
				if err != nil {
					// testpmd's console hangs at times under a flood: the turn is lost, and said to be.
					log.Printf("%s, %s: turn lost: %v", w.name, p.name, err)
				}
				for _, s := range samples {
					if rates[s.class] == nil {
						rates[s.class] = map[string][]float64{}
					}
					rates[s.class][p.name] = append(rates[s.class][p.name], s.mpps)
				}
			}
		}
		report(w, rates)
	}
}

func report(w work, rates map[string]map[string][]float64) {
	for _, class := range []string{near, far} {
		ours, theirs := rates[class]["vhostd"], rates[class]["dpdk"]
		if len(ours) == 0 && len(theirs) == 0 {
			continue
		}
		ratio := "-"
		if len(ours) > 0 && len(theirs) > 0 {
			ratio = fmt.Sprintf("%.2f", median(ours)/median(theirs))
		}
		fmt.Printf("| %s | %s | %.1f | %.1f | %s | %d + %d |\n", w.name, class, median(ours), median(theirs), ratio, len(ours), len(theirs))
	}
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Clone(v)
	slices.Sort(s)
	return s[len(s)/2]
}

// sample is one second.
type sample struct {
	mpps  float64
	class string
}

// measure runs one turn: the back-end on one processor, the guest on the other.
func measure(p peer, w work, seconds int) ([]sample, error) {
	dir, err := os.MkdirTemp("", "vhostd-perf")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	socket := dir + "/s"
	back, err := p.start(w, socket, backCPU)
	if err != nil {
		return nil, err
	}
	defer back.stop()
	if err := waitFor(socket, back); err != nil {
		return nil, err
	}
	guest, err := startGuest(w, socket, guestCPU)
	if err != nil {
		return nil, err
	}
	defer guest.stop()
	// The receiving end goes first. vhostd needs no telling.
	first, second := back, guest
	if w.rx {
		first, second = guest, back
	}
	first.say("start")
	time.Sleep(300 * time.Millisecond)
	second.say("start")
	time.Sleep(time.Second)
	return guest.sample(w, back, seconds)
}

// waitFor waits until the back-end listens.
func waitFor(socket string, p *process) error {
	for range 200 {
		if _, err := os.Stat(socket); err == nil {
			return nil
		}
		if p.ended() {
			return fmt.Errorf("ended early:\n%s", p.tail())
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("no socket after 10 s:\n%s", p.tail())
}
