//go:build linux

package main

import (
	"context"
	"fmt"
	"log"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vhostd/vhostd/bench"
	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/vhosttest"
)

// kinds are what a bad guest does, or its front-end, as fast as it can. Each returns after a while, and is called again.
var kinds = map[string]func(g *vhosttest.Guest){
	"kicks":     kicks,
	"malformed": malformed,
	"tiny":      tiny,
	"indices":   indices,
	"control":   control,
	"memory":    memory,
	"reconnect": func(g *vhosttest.Guest) { g.Reconnect() },
	"refused":   refused,
}

func kindNames() []string { return append(slices.Sorted(maps.Keys(kinds)), "flood") }

// busy are guests that break no rule, at full load: one with frames under way, and one that sends as fast as it can, whatever becomes of it.
var busy = map[string]bench.Direction{good: bench.Echo, "flood": bench.GuestToHost}

// misbehave is the other guest's process. It says on its standard output that it has begun, and goes on until it is killed.
func misbehave(kind, path string) {
	if direction, ok := busy[kind]; ok {
		begun()
		for {
			c := bench.DefaultConfig()
			c.Path, c.Direction, c.Window, c.Duration, c.WarmUp = path, direction, 64, time.Hour, 0
			if _, err := bench.Run(context.Background(), c); err != nil {
				log.Fatal(err)
			}
		}
	}
	f, ok := kinds[kind]
	if !ok {
		log.Fatalf("-kinds: no kind %q, known are %v", kind, kindNames())
	}
	g := vhosttest.Start(lone{}, nil, vhosttest.Options{Path: path})
	begun()
	for {
		f(g)
	}
}

func begun() {
	fmt.Println()
	_ = os.Stdout.Close()
}

// lone stands for the test that a vhosttest.Guest belongs to.
type lone struct{ testing.TB }

func (lone) Helper()                   {}
func (lone) Cleanup(func())            {}
func (lone) Fatal(args ...any)         { log.Fatal(args...) }
func (lone) Fatalf(f string, a ...any) { log.Fatalf(f, a...) }
func (lone) Errorf(f string, a ...any) { log.Fatalf(f, a...) }

// kicks notifies queues in which there is nothing to do.
func kicks(g *vhosttest.Guest) {
	for range 1000 {
		g.Queues[0].Kick.Signal()
		g.Queues[1].Kick.Signal()
	}
}

// fill adds chains until the ring is full, has the device see them, and takes back what it has done with.
func fill(q *vhosttest.Queue, add func() error) {
	for add() == nil {
	}
	q.Driver.Publish()
	q.Kick.Signal()
	for range 1000 {
		if q.Reap() > 0 {
			return
		}
	}
}

// malformed sends chains that point outside memory.
func malformed(g *vhosttest.Guest) {
	q := g.Transmitq(0)
	fill(q, func() error {
		_, err := q.Driver.Add([]vhosttest.Piece{{GPA: guestmem.GPA(rand.Uint64() | 1<<60), Len: 1500}}, nil)
		return err
	})
}

// tiny sends frames that are too short for an Ethernet header, in as many descriptors as they have bytes.
func tiny(g *vhosttest.Guest) {
	q := g.Transmitq(0)
	fill(q, func() error { _, err := q.Resend(20, vhosttest.Layout{1, 1, 1, 1, 1, 1, 1, 1}); return err })
}

// indices breaks the ring, again and again: its available index jumps, and the queue starts anew.
func indices(g *vhosttest.Guest) {
	q := g.Transmitq(0)
	q.Driver.RawSetAvailIndex(q.Driver.RawUsedIndex() + 30000)
	q.Kick.Signal()
	q.Driver.RawSetAvailIndex(q.Driver.RawUsedIndex() - 5)
	base, err := g.FE.GetVringBase(1)
	if err != nil {
		log.Fatal(err)
	}
	q.Reset(uint16(base))
	q.Start()
}

// control sends messages that stop the workers, each in its turn.
func control(g *vhosttest.Guest) {
	for range 100 {
		g.Transmitq(0).Enable(false)
		g.Transmitq(0).Enable(true)
		g.Barrier()
	}
}

// memory gives all memory anew.
func memory(g *vhosttest.Guest) { g.ShareMemory() }

// refused sends messages that are refused, and logged.
func refused(g *vhosttest.Guest) {
	for range 100 {
		if g.FE.SetVringNum(0, 3) == nil {
			log.Fatal("a bad request was not refused")
		}
	}
}
