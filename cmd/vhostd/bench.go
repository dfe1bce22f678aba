package main

import (
	"context"
	"fmt"
	"io"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/vhostd/vhostd/bench"
	"github.com/vhostd/vhostd/internal/netopt"
)

// benchFlags are those of vhostd bench, as they were given.
type benchFlags struct {
	bench.Config
	ring, mergeable, eventIdx string
	direction, frames         string
	memory, cold              string
	json                      bool
}

func newBench() *cobra.Command {
	f := benchFlags{Config: bench.DefaultConfig()}
	cmd := &cobra.Command{
		Use:   "bench --socket-path PATH",
		Short: "Measure a vhost-user back-end, as a guest would use it",
		Long: `Measure a vhost-user net back-end: vhostd, DPDK's, or any other. vhostd bench is the front-end and the guest's driver in one; it
needs no virtual machine. It connects, moves frames for a while, and tells how many went, how long they took, and where the two
threads ran: on a shared machine two processors are sometimes near each other and sometimes far, and rates differ by up to four times between
the two. Compare rates within a class only, from runs in turn. One processor is the driver's alone: it polls.

  guest-to-host   frames are sent as fast as the back-end takes them; latency is from available to used
  host-to-guest   the back-end makes frames (vhostd run --net null,generate=on; dpdk-testpmd --forward-mode=txonly)
  both            both at once
  echo            the back-end returns frames (vhostd run --net null,echo=on; dpdk-testpmd --forward-mode=io); latency is that of a
                  round trip: --window 1 for a back-end that polls, --think 10ms for one that has gone to sleep
  through         frames go into this port, and out of another of the same switch (--to), as fast as they are taken; with --window as fast
                  as they arrive, which is how TCP sends, and latency is then that from one guest to the other

A back-end that breaks the rules of the ring or, with --verify, changes a frame ends the run with an error. Exit code 0 says that there
was no such thing, and that frames went.`,
		Example: `  vhostd run --socket-path /tmp/b.sock --net null &
  vhostd bench --socket-path /tmp/b.sock --ring packed --frame 1518
  vhostd run --socket-path /tmp/e.sock --net null,echo=on &
  vhostd bench --socket-path /tmp/e.sock --direction echo --think 10ms`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.Path == "" {
				return usagef("--socket-path is needed: where the back-end listens")
			}
			if err := f.settle(cmd.Flags().Changed); err != nil {
				return &usageError{err}
			}
			return f.run(cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f.register(cmd.Flags())
	cmd.Flags().SortFlags = false
	return cmd
}

func (f *benchFlags) register(fs *pflag.FlagSet) {
	fs.StringVar(&f.Path, "socket-path", "", "`path` of the vhost-user socket")
	fs.BoolVar(&f.Server, "server", false, "listen on --socket-path for a back-end that connects (vhostd run --client)")

	fs.StringVar(&f.ring, "ring", "split", "layout of the rings: split or packed")
	fs.IntVar(&f.Size, "size", f.Size, "descriptors of each ring, `N`")
	fs.IntVar(&f.Batch, "batch", f.Batch, "frames made available at once, `N`")
	fs.IntVar(&f.Chain, "chain", f.Chain, "descriptors of each buffer, `N`: the header in one, the frame cut into the others")
	fs.BoolVar(&f.Indirect, "indirect", false, "chains in indirect tables; needs --chain 2 or more")
	fs.BoolVar(&f.InOrder, "in-order", false, "negotiate IN_ORDER")
	fs.StringVar(&f.mergeable, "mrg-rxbuf", "on", "on or off: frames over several receive buffers (MRG_RXBUF)")
	fs.StringVar(&f.eventIdx, "event-idx", "on", "on or off: EVENT_IDX, if the back-end offers it")
	fs.IntVar(&f.Buffer, "buffer", 0, "`bytes` of a receive buffer (default 2048, or with --mrg-rxbuf off what the longest frame takes)")

	fs.StringVar(&f.direction, "direction", string(f.Direction), "guest-to-host, host-to-guest, both, echo or through")
	fs.StringVar(&f.To, "to", "", "with through: `path` of the socket of another port, where the frames come out")
	fs.StringVar(&f.frames, "frame", "64", "length of the frames in `bytes`, without check sequence; several, like 64,1518, take turns")
	fs.Float64Var(&f.Rate, "rate", 0, "frames per second to send, `N`; latency then counts from when a frame was due (default: as fast as they go)")
	fs.IntVar(&f.Window, "window", 0, "with echo (default 1) or through: frames under way, `N`")
	fs.DurationVar(&f.Think, "think", 0, "with --window or echo: pause after each frame that has come back, in which the back-end may fall asleep")
	fs.DurationVar(&f.Duration, "duration", f.Duration, "how long to measure")
	fs.DurationVar(&f.WarmUp, "warm-up", f.WarmUp, "how long to go before that")
	fs.DurationVar(&f.Patience, "patience", 10*time.Second, "give up when the back-end does nothing for that long")
	fs.BoolVar(&f.Verify, "verify", false, "with --window or echo: make, number and check all bytes of each frame")

	fs.StringVar(&f.memory, "memory", "memfd", "guest memory: memfd (4 KiB pages) or hugetlb (2 MiB pages)")
	fs.StringVar(&f.cold, "cold", "", "spread the buffers of each ring over `bytes` of memory, like 256M, so that frames are in no cache")
	fs.IntVar(&f.CPU, "cpu", f.CPU, "processor to run on, `N`; taskset(1) places the back-end (default: any)")
	fs.BoolVar(&f.json, "json", false, "print JSON")
}

// settle understands the flags. All its errors are the command line's.
func (f *benchFlags) settle(given func(name string) bool) (err error) {
	switch f.ring {
	case "split", "packed":
		f.Packed = f.ring == "packed"
	default:
		return fmt.Errorf("--ring %q: want split or packed", f.ring)
	}
	if f.Mergeable, err = netopt.OnOff(f.mergeable); err != nil {
		return fmt.Errorf("--mrg-rxbuf %q: %w", f.mergeable, err)
	}
	if f.EventIdx, err = netopt.OnOff(f.eventIdx); err != nil {
		return fmt.Errorf("--event-idx %q: %w", f.eventIdx, err)
	}
	f.Direction = bench.Direction(f.direction)
	switch {
	case given("window") && f.Direction != bench.Echo && f.Direction != bench.Through:
		return fmt.Errorf("--window is for --direction echo or through")
	case given("window") && f.Window < 1:
		return fmt.Errorf("--window %d: want a number of frames", f.Window)
	case f.Direction == bench.Echo && !given("window"):
		f.Window = 1
	}
	if f.Frames, err = parseLengths(f.frames); err != nil {
		return fmt.Errorf("--frame %q: %w", f.frames, err)
	}
	switch f.memory {
	case "memfd", "hugetlb":
		f.Huge = f.memory == "hugetlb"
	default:
		return fmt.Errorf("--memory %q: want memfd or hugetlb", f.memory)
	}
	if f.Cold, err = parseBytes(f.cold); err != nil {
		return fmt.Errorf("--cold %q: %w", f.cold, err)
	}
	if f.Config.Batch > f.Size && !given("batch") {
		f.Config.Batch = f.Size
	}
	return f.Check()
}

// parseLengths reads a comma list of lengths.
func parseLengths(s string) (all []int, err error) {
	for part := range strings.SplitSeq(s, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(part))
		if err != nil {
			return nil, fmt.Errorf("%q is no length in bytes", part)
		}
		all = append(all, n)
	}
	return all, nil
}

// maxCold is the most memory that --cold may ask for: what a file descriptor of guest memory is good for, and more than any cache has.
const maxCold = 1 << 36

// parseBytes reads a number of bytes with an optional K, M or G behind it. "" is 0.
func parseBytes(s string) (int, error) {
	if s == "" {
		return 0, nil
	}
	digits, shift := s, 0
	if i := strings.IndexByte("KMG", s[len(s)-1]); i >= 0 {
		digits, shift = s[:len(s)-1], 10*(i+1)
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || n > maxCold>>shift {
		return 0, fmt.Errorf("want a number of bytes up to 64G, like 256M")
	}
	return int(n << shift), nil
}

// run measures and prints. On a terminal a line shows how it goes.
func (f *benchFlags) run(stdout, stderr io.Writer) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if terminal(stderr) {
		f.Progress = func(done, total int, s bench.Second) {
			fmt.Fprintf(stderr, "\r\x1b[K%s", progressLine(f.Config, done, total, s)) // back to the start of the line, clear it
		}
		defer fmt.Fprint(stderr, "\r\x1b[K")
	}
	r, err := bench.Run(ctx, f.Config)
	if err != nil {
		return err
	}
	if f.Progress != nil {
		fmt.Fprint(stderr, "\r\x1b[K")
	}
	if f.json {
		return writeJSON(stdout, benchReport(f, r))
	}
	return printBench(stdout, f.Config, r)
}
