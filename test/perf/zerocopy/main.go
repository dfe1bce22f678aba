//go:build linux

// Command zerocopy measures what transmission from the guest's own pages saves: the CPU time of vhostd and of the kernel's work for it, per
// frame, beside a vhostd that copies.
//
//	go build -o bin/vhostd ./cmd/vhostd && go run ./test/perf/zerocopy
//
// It needs root (network namespaces), iproute2, taskset, the kernel's ifb, veth and bridge, and two processors that nothing else runs on.
//
// # Theory of operation
//
//	processor B                      processor A
//	guest process                    vhostd run --net dgram:...,zerocopy=MODE      kernel
//	  driver end of a transmitq  -->   transmitq's worker  -- sendmsg -->  UDP --> PATH --> ifb
//	  memfd, walked frame by frame <-- used ring
//
// One turn is one vhostd and one guest, both fresh. The guest walks its memory once to warm up, then sends a number of frames that is the same
// for all modes of a case, never more of them out than the ring holds (a closed loop), and vhostd's processor clock is read before and
// after. Turns of the modes alternate (A B A B); what is compared is each turn with that of the first mode in the same round, and the median of these ratios
// is the result. So a machine that is slower for a minute is slower for both.
//
// The paths end in an ifb, which takes pages as a network card does and frees every frame at once:
//
//	ifb      vhostd's datagrams are routed into it
//	bridge   veth, a bridge in another namespace, ifb
//	forward  veth, IP forwarding in another namespace, ifb
//
// Memory is cold by default: the span is larger than any cache and walked page by page in scattered order, so that a frame is in no cache when its turn
// comes. With -hot the frames are few and stay in the cache.
//
// # What is counted
//
// The process clock of vhostd (CLOCK_PROCESS_CPUTIME_ID: nanoseconds, all threads that are or were, io_uring's workers included) and the clock of
// ksoftirqd on its processor. The kernel's network softirqs run within vhostd's system calls and are charged to it, unless the kernel has
// IRQ_TIME_ACCOUNTING: then they are in no process's clock, and what /proc/stat says of vhostd's processor (10 ms) is added. A worker of vhostd that has
// nothing to do polls, and that counts too; the guest is faster than vhostd, so there is nearly always work.
//
// Not counted: kernel threads other than ksoftirqd (shown as kthreads, of the whole machine), softirqs that interrupt somebody else on
// that processor, and what the guest's processor does. The cross-check is the tick-counted busy time of vhostd's processor (busy).
//
// On a machine that is never quiet, many short turns (-seconds 0.2 -pairs 15) and the column "of least" say more than long ones: the quotient of
// the least figures of the two modes, which fell into the quietest moments.
//
// A turn is noisy when the hypervisor stole time, when somebody else ran on vhostd's processor or kept the guest from its own. It is repeated a few times; a
// turn that stays noisy counts, and is marked.
//
// # What is checked
//
// That the copying vhostd copied every frame and the other one did not, by the queue's counters (vhostd stats --json), and that all frames
// arrived at the ifb, by its. Where one is not so the line says it, and the program fails.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
)

// config is what the flags say.
type config struct {
	vhostd, tunnel, lock, record string
	qdisc                        string
	capture                      bool
	pairs, retries               int
	seconds                      float64
	sizes                        []int
	paths                        []string
	modes                        []mode
	hot, json                    bool
	backCPU, guestCPU            int
	guest                        guestOptions
}

const modesUsage = "comma-separated `list` of ways to send, the first is what the others are compared with: a zerocopy= value (off, auto, on), " +
	"then further options of --net, each after a +, then another binary after an @: auto+no-balloon=on, on+zerocopy-pending=64, auto@/tmp/vhostd-of-yesterday"

func parseFlags() (c config, err error) {
	var sizes, paths, modes string
	var spanMiB int
	flag.StringVar(&c.vhostd, "vhostd", "bin/vhostd", "the vhostd `binary`")
	flag.IntVar(&c.pairs, "pairs", 5, "rounds, each with one turn of every mode")
	flag.Float64Var(&c.seconds, "seconds", 2, "least time of a turn")
	flag.StringVar(&sizes, "sizes", "1500,9000,65000", "comma-separated frame sizes in bytes, Ethernet header included")
	flag.StringVar(&paths, "paths", "ifb,bridge,forward", "comma-separated paths to take")
	flag.StringVar(&modes, "modes", "off,auto,on", modesUsage)
	flag.BoolVar(&c.hot, "hot", false, "send memory that is in the cache")
	flag.StringVar(&c.tunnel, "tunnel", "dgram", "dgram, vxlan or geneve")
	flag.StringVar(&c.qdisc, "qdisc", "", "queueing `discipline` of the ifb, as tc(8) has it, that frames wait in: \"tbf rate 10gbit burst 256kb limit 64mb\"")
	flag.BoolVar(&c.capture, "capture", false, "have a packet socket listen at the ifb, as a capture does: the kernel copies for it")
	flag.IntVar(&spanMiB, "span", 512, "MiB of guest memory that cold frames are spread over")
	flag.IntVar(&c.guest.Ring, "ring", 256, "descriptors of the transmitq")
	flag.IntVar(&c.guest.Window, "window", 0, "frames out at once at most (default: the ring's size)")
	flag.IntVar(&c.guest.Piece, "piece", 32768, "bytes of payload in one descriptor at most")
	flag.IntVar(&c.guest.Offset, "offset", 0, "bytes between the start of a page and that of the payload")
	flag.IntVar(&c.backCPU, "cpu", 0, "processor of vhostd")
	flag.IntVar(&c.guestCPU, "guest-cpu", 1, "processor of the guest")
	flag.IntVar(&c.retries, "retries", 2, "repeats of a turn that was noisy")
	flag.StringVar(&c.lock, "lock", "", "`file` to hold an flock(2) on for the time of each round")
	flag.StringVar(&c.record, "record", "", "`folder` for perf(1) records of vhostd, one of each turn; they make turns slower")
	flag.BoolVar(&c.json, "json", false, "print all turns as JSON instead of a table")
	flag.Usage = usage
	flag.Parse()
	if flag.NArg() > 0 {
		return c, fmt.Errorf("%q: no arguments are taken, see -h", flag.Args())
	}
	c.guest.Span, c.paths = spanMiB<<20, strings.Split(paths, ",")
	for s := range strings.SplitSeq(sizes, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < minFrame || n > maxFrame {
			return c, fmt.Errorf("-sizes %s: want bytes, %d to %d", s, minFrame, maxFrame)
		}
		c.sizes = append(c.sizes, n)
	}
	for s := range strings.SplitSeq(modes, ",") {
		c.modes = append(c.modes, parseMode(s))
	}
	return c, c.check()
}

func usage() {
	fmt.Fprint(flag.CommandLine.Output(), `CPU time of vhostd and the kernel per frame, copying and from the guest's pages, in alternating turns.

  go build -o bin/vhostd ./cmd/vhostd && sudo go run ./test/perf/zerocopy          about 15 minutes, all paths
  go run ./test/perf/zerocopy -paths ifb -sizes 65000 -pairs 9                     one bar
  go run ./test/perf/zerocopy -paths ifb -sizes 1024,2048,4096,8192 -modes off,on  where it begins to pay, with -hot as well

A ratio is CPU per frame of a mode by that of the first mode, of the same round; the median over the rounds counts.

`)
	flag.PrintDefaults()
}

func (c *config) check() error {
	g := &c.guest
	if g.Window == 0 {
		g.Window = g.Ring
	}
	switch {
	case c.pairs < 1 || c.seconds <= 0 || c.retries < 0:
		return fmt.Errorf("-pairs %d, -seconds %v, -retries %d: want at least 1, more than 0, at least 0", c.pairs, c.seconds, c.retries)
	case g.Ring < 2 || g.Ring > 32768 || g.Ring&(g.Ring-1) != 0:
		return fmt.Errorf("-ring %d: want a power of two, 2 to 32768", g.Ring)
	case g.Window < 1 || g.Window > g.Ring:
		return fmt.Errorf("-window %d: want 1 to -ring, which is %d", g.Window, g.Ring)
	case g.Piece < 1024 || g.Offset < 0 || g.Offset >= pageSize:
		return fmt.Errorf("-piece %d, -offset %d: want at least 1024, and 0 to %d", g.Piece, g.Offset, pageSize-1)
	case g.Span < 1<<20 || g.Span > 1<<30:
		return fmt.Errorf("-span %d: want 1 to 1024 (MiB)", g.Span>>20)
	case c.backCPU == c.guestCPU:
		return fmt.Errorf("-cpu and -guest-cpu are both %d: the two would take turns", c.backCPU)
	case c.tunnel != "dgram" && c.tunnel != "vxlan" && c.tunnel != "geneve":
		return fmt.Errorf("-tunnel %s: want dgram, vxlan or geneve", c.tunnel)
	}
	return nil
}

func main() {
	log.SetFlags(0)
	if orders := os.Getenv(guestEnv); orders != "" {
		if err := guestMain(orders); err != nil {
			log.Fatalf("guest: %v", err)
		}
		return
	}
	c, err := parseFlags()
	if err != nil {
		log.Fatal(err)
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	r, broken := measure(ctx, c)
	if err := r.print(os.Stdout, c.json); err != nil { // what there is
		log.Fatal(err)
	}
	if broken != nil {
		log.Fatal(broken)
	}
	if bad := r.unproven(); bad > 0 {
		log.Fatalf("%d turns were not what their mode says", bad)
	}
}
