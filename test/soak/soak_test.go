//go:build linux

// Package soak runs the built vhostd for as long as it is told, one daemon or two for each kind of network, with guests that come and go and
// never rest: split and packed rings, sizes, features and offloads by chance, queues that stop and start, memory that is plugged and unplugged,
// front-ends that hang up in the middle or are killed, and questions over the control socket all the while.
//
// # What is checked
//
// Every byte of every frame (stream_test.go), that none comes twice or out of order, and that none is lost while nobody reconnects; of those that the host's
// kernel carries hardly any, and each is in a counter of vhostd's or the kernel's. Between two rounds no guest is there: then a daemon holds the
// descriptors, goroutines and mappings that it held after its first round, and no more; behind the user-mode network, whose sockets of the host stay for
// minutes, at the end of a long run. What may fluctuate, memory and threads, is compared by windows: the last third of the time against the second (watch_test.go says with what tolerance). At the
// end a daemon leaves with exit code 0 within its deadline, and its log tells of nothing unexpected.
//
//	go test ./test/soak -count=1 -v -soak 1h
package soak

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/require"
)

// part is what package require knows these tests by.
const part = "netns"

var (
	duration = flag.Duration("soak", 5*time.Second, "how long to go on")
	seed     = flag.Uint64("seed", uint64(time.Now().UnixNano()), "of all that is left to chance")
	only     = flag.String("links", "", "comma list of the networks, all by default")
)

// program is the vhostd under test.
var program string

func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", strconv.Itoa(len(links))); err != nil { // they are busy with waiting
		panic(err)
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "vhostd-soak-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, "vhostd")
		build := exec.Command("go", "build", "-o", program, "../../cmd/vhostd")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building vhostd: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

func TestSoak(t *testing.T) {
	require.NotShort(t)
	require.Root(t, part)
	t.Logf("for %v, -seed %d", *duration, *seed)
	end := time.Now().Add(*duration)
	for i, make := range links {
		if !chosen(make.name) {
			continue
		}
		t.Run(make.name, func(t *testing.T) {
			t.Parallel()
			l := make.open(t)
			l.name = make.name
			l.run(t, rand.New(rand.NewPCG(*seed, uint64(i))), end)
		})
	}
}

// run plays rounds until the end, and tells what there was.
func (l *link) run(t *testing.T, r *rand.Rand, end time.Time) {
	var sum tally
	failed := 0
	w := newWatch(t, l, end)
	for i := 0; time.Now().Before(end) || i < 2; i++ {
		rd := newRound(l, r, time.Until(end))
		ok := t.Run(fmt.Sprintf("round %d", i), func(t *testing.T) { rd.play(t) })
		sum.add(&rd.tally)
		if !ok {
			t.Logf("round %d: %s", i, rd)
			if failed++; failed == maxFailed {
				t.Fatalf("%d rounds have failed", failed)
			}
		}
		w.look(t, rd.String())
	}
	w.judge(t)
	w.settle(t)
	if sum.frames == 0 {
		t.Error("no frame arrived")
	}
	if sum.quietly > sum.bytes/maxLost {
		t.Errorf("of %d bytes, %d were lost while no front-end went away", sum.bytes, sum.quietly)
	}
	t.Logf("%d rounds, %d frames, %.1f GB; %d reconnects, %d restarts of queues, %d memory changes, %d front-ends killed; %d bytes lost when front-ends went away, %d else",
		sum.rounds, sum.frames, float64(sum.bytes)/1e9, sum.reconnects, sum.restarts, sum.memory, sum.kills, sum.lost-sum.quietly, sum.quietly)
}

const (
	maxFailed = 10  // rounds of a link
	maxLost   = 100 // one part of so many may get lost in the host's kernel, where its own queues run over
)

// tally is what a round, or several, came to.
type tally struct {
	rounds, reconnects, restarts, memory, kills int
	frames, bytes                               uint64
	lost, quietly                               uint64 // bytes; of these, in rounds without a reconnect
}

func (s *tally) add(o *tally) {
	s.rounds += o.rounds
	s.reconnects += o.reconnects
	s.restarts += o.restarts
	s.memory += o.memory
	s.kills += o.kills
	s.frames += o.frames
	s.bytes += o.bytes
	s.lost += o.lost
	s.quietly += o.quietly
}
