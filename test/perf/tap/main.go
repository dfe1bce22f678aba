//go:build linux

// Command tap compares what a guest's traffic over a tap costs behind vhostd and behind QEMU's own -netdev tap: the CPU time of the
// back-end's side, per GiB of TCP.
//
//	make setup && go build -o bin/vhostd ./cmd/vhostd && go run ./test/perf/tap
//
// It needs root (network namespaces, taps), QEMU and the guest kernel that scripts/setup.sh unpacks.
//
// # Theory of operation
//
//	guest -- virtio-net -- QEMU main loop -- tap -- namespace with a TCP server       "qemu"
//	guest -- virtio-net -- vhostd --------- tap -- namespace with a TCP server        "vhostd"
//	              `-- QEMU main loop: interrupts, and kicks where the machine is emulated
//
// The same guest is booted twice and both stay up, each in a network namespace of its own. They take turns: one carries so many MiB from
// the guest to the host and then as many to it, with every byte checked, while the other one is idle. The first turn of each warms up and does not
// count. Results are medians over the turns.
//
// # What is counted
//
//	back-end  "qemu":   the CPU time of QEMU's main thread, which is the back-end: it walks the rings, reads and writes the tap, interrupts the guest
//	          "vhostd": the CPU time of all of vhostd's threads, and of QEMU's main thread, which relays interrupts where the machine is emulated
//	vCPU      the CPU time of the guest's processors' threads, shown beside it: not the back-end's, but it tells whether work was moved there
//	other     QEMU's other threads
//
// The kernel's work is in these where it runs on their behalf: what is written to a tap goes through the host's network stack up to the server's
// socket within that write. What the server sends is carried to the tap's queue on the server's account, and is in neither. Clocks are those
// of the scheduler, in nanoseconds; the kernel charges stolen time to nobody.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vhostd/vhostd/test/vm/machine"
	"github.com/vhostd/vhostd/test/vm/stream"
)

// The directions, in the order in which a turn takes them.
var directions = []struct {
	name string
	mode stream.Mode
}{{"guest to host", stream.Sink}, {"host to guest", stream.Source}}

func main() {
	log.SetFlags(0)
	var (
		vhostd = flag.String("vhostd", "bin/vhostd", "`path` of the vhostd program, or several to compare, with commas between")
		mib    = flag.Uint64("mib", 256, "MiB of a transfer")
		turns  = flag.Int("turns", 5, "turns of each back-end that count")
		net    = flag.String("net", "", "options of vhostd's tap, as \"io-uring=off\"")
		props  = flag.String("props", "", "properties of both guests' virtio-net-pci, as \"packed=on\"")
		mtu    = flag.Int("mtu", 1500, "bytes, of both ends")
	)
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	o := options{vhostd: strings.Split(*vhostd, ","), bytes: *mib << 20, turns: *turns, net: *net, props: *props, mtu: *mtu}
	if err := run(ctx, o); err != nil {
		log.Fatal("tap: ", err)
	}
}

type options struct {
	vhostd     []string
	net, props string
	bytes      uint64
	turns, mtu int
}

func run(ctx context.Context, o options) error {
	dir, err := os.MkdirTemp("", "vhostd-perf-tap-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	assets, err := machine.Prepare(ctx, dir, func(format string, args ...any) { log.Printf(format, args...) })
	if err != nil {
		return err
	}
	var sides []*side
	defer func() {
		for _, s := range sides {
			s.close()
		}
	}()
	var names []string
	for _, binary := range append([]string{""}, o.vhostd...) {
		name := "qemu"
		if binary != "" {
			name = filepath.Base(binary)
		}
		names = append(names, name)
		s, err := boot(ctx, name, binary, dir, assets, o)
		if s != nil {
			sides = append(sides, s)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	results := map[string][]sample{}
	for turn := range o.turns + 1 {
		for _, s := range sides {
			for i, d := range directions {
				got, err := s.transfer(ctx, d.mode, o.bytes, uint64(turn*10+i))
				if err != nil {
					return fmt.Errorf("%s, %s: %w", s.name, d.name, err)
				}
				log.Printf("turn %d, %-6s %s: %v", turn, s.name, d.name, got)
				if turn > 0 {
					results[s.name+d.name] = append(results[s.name+d.name], got)
				}
			}
		}
	}
	for _, s := range sides {
		if err := s.explain(ctx); err != nil {
			return err
		}
	}
	report(results, names, o)
	return nil
}

func report(results map[string][]sample, names []string, o options) {
	fmt.Printf("%d MiB a transfer, medians of %d turns; CPU seconds per GiB\n\n", o.bytes>>20, o.turns)
	fmt.Println("| direction | back-end | back-end's side | of it vhostd | of it QEMU's main thread | vCPU | other | MiB/s |")
	fmt.Println("|---|---|---|---|---|---|---|---|")
	perGiB := float64(1<<30) / float64(o.bytes)
	for _, d := range directions {
		var sums []float64
		for _, name := range names {
			r := results[name+d.name]
			med := func(f func(sample) time.Duration) float64 {
				v := make([]float64, len(r))
				for i, s := range r {
					v[i] = f(s).Seconds() * perGiB
				}
				slices.Sort(v)
				return v[len(v)/2]
			}
			sum := med(sample.side)
			sums = append(sums, sum)
			fmt.Printf("| %s | %s | **%.2f** | %.2f | %.2f | %.2f | %.2f | %.0f |\n", d.name, name, sum,
				med(func(s sample) time.Duration { return s.vhostd }), med(func(s sample) time.Duration { return s.main }),
				med(func(s sample) time.Duration { return s.vcpu }), med(func(s sample) time.Duration { return s.other }),
				1024/med(func(s sample) time.Duration { return s.wall }))
		}
		for i, sum := range sums[1:] {
			fmt.Printf("| %s | %s / %s | **%.2f** | | | | | |\n", d.name, names[i+1], names[0], sum/sums[0])
		}
	}
}
