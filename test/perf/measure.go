package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/vhostd/vhostd/bench"
	"github.com/vhostd/vhostd/internal/placement"
	"github.com/vhostd/vhostd/test/dpdk"
)

// kind is what a work measures.
type kind int

const (
	rate    kind = iota // frames per second
	latency             // p50 of a round trip, in nanoseconds
	idle                // share of a processor that the back-end takes
)

// work is one thing to compare.
type work struct {
	name    string
	kind    kind
	size    int           // bytes of a frame
	toGuest bool          // rate: host to guest
	headers bool          // vhostd reads each frame's header, as a device with a wire must
	think   time.Duration // latency: pause between frames, in which a back-end may fall asleep
	guest   string        // that alone can do it; "": any
	want    want
}

var works = []work{
	{name: "guest-to-host-64", size: 64, want: want{split: 1.05, packed: 1}},
	{name: "guest-to-host-64-headers", size: 64, headers: true},
	{name: "guest-to-host-1518", size: 1518, want: want{split: 1.4, packed: 1.4}},
	{name: "guest-to-host-1518-headers", size: 1518, headers: true},
	{name: "host-to-guest-64", size: 64, toGuest: true, want: want{split: 1.2, packed: 1}},
	{name: "host-to-guest-1518", size: 1518, toGuest: true, want: want{split: 1.4, packed: 1.3}},
	{name: "guest-to-host-9000", size: 9000, want: want{split: 1.5, packed: 1.5}},
	{name: "guest-to-host-9000-headers", size: 9000, headers: true},
	{name: "host-to-guest-9000", size: 9000, toGuest: true, want: want{split: 1.5, packed: 1.5}},
	{name: "echo-polling", kind: latency, size: 64, guest: "bench", want: want{split: 1.2, packed: 1.2}},
	{name: "echo-asleep", kind: latency, size: 64, think: asleep, guest: "bench", want: want{own: 60e3}},
	{name: "wake-up-alone", kind: latency, think: asleep, guest: nobody},
	{name: "idle", kind: idle, size: 64, guest: "virtio-user", want: want{own: 0.001}},
}

// asleep is a pause in which a back-end that may sleep does.
const asleep = 2 * time.Millisecond

func workNames() string {
	var names []string
	for _, w := range works {
		names = append(names, w.name)
	}
	return strings.Join(names, ",")
}

// dpdkPeer is the peer that is DPDK's vhost library; all others are vhostd binaries.
const dpdkPeer = "dpdk"

// turn is who does a work.
type turn struct {
	peer  string // dpdkPeer or a vhostd binary
	guest string // virtio-user, bench or nobody
	ring  string // split or packed
}

func (t turn) packed() bool { return t.ring == "packed" }

// measure is one turn: the back-end on one processor, the guest on the other.
func (o options) measure(w work, t turn) ([]sample, error) {
	if w.guest == nobody {
		if t.peer != o.peers[0] {
			return nil, nil
		}
		return o.wakeAlone(w.think)
	}
	dir, err := os.MkdirTemp("", "vhostd-perf")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	socket := dir + "/s"
	back, err := o.start(w, t, socket)
	if err != nil {
		return nil, err
	}
	defer back.Stop()
	if err := back.WaitSocket(socket); err != nil {
		return nil, err
	}
	if t.guest == "bench" {
		return o.byBench(w, t, socket, back)
	}
	return o.byVirtioUser(w, t, socket, back)
}

// start starts a back-end that does its part of a work, or will when it is told to.
func (o options) start(w work, t turn, socket string) (*dpdk.Process, error) {
	if t.peer == dpdkPeer {
		mode := "rxonly"
		switch {
		case w.kind == latency:
			mode = "io"
		case w.toGuest:
			mode = "txonly"
		}
		return dpdk.Testpmd(dpdk.Options{CPU: backCPU, Vdevs: []string{dpdk.Vhost(socket)}, Mode: mode, Frame: w.size})
	}
	net := "null"
	switch {
	case w.kind == latency:
		net = "null,echo=on"
	case w.toGuest:
		net = fmt.Sprintf("null,generate=on,size=%d", w.size)
	case w.headers:
		net = "null,readheaders=on"
	}
	args := []string{"run", "--socket-path", socket, "--net", net}
	if w.kind == latency {
		args = append(args, "--workers", "pair") // as testpmd, which has one thread for both directions
	}
	return dpdk.Start(backCPU, t.peer, args...)
}

// byBench measures with the driver end of vhostd bench.
func (o options) byBench(w work, t turn, socket string, back *dpdk.Process) (all []sample, err error) {
	c := bench.DefaultConfig()
	c.Path, c.Packed, c.Frames, c.InOrder, c.Huge, c.CPU = socket, t.packed(), []int{w.size}, true, true, guestCPU
	c.Duration, c.WarmUp = time.Duration(o.tries())*time.Second, 300*time.Millisecond
	switch {
	case w.kind == latency:
		c.Direction, c.Think = bench.Echo, w.think
	case w.toGuest:
		c.Direction = bench.HostToGuest
	}
	back.Say("start")
	r, err := bench.Run(context.Background(), c)
	if err != nil {
		return nil, fmt.Errorf("%w\n%s", err, back.Tail())
	}
	for _, s := range r.Seconds {
		if !s.Quiet || s.Class != placement.Near && s.Class != placement.Far || len(all) == o.seconds {
			continue
		}
		v := float64(s.GuestToHost.Frames+s.HostToGuest.Frames) / s.Length.Seconds() // one of them is 0
		if w.kind == latency {
			if s.Latency == nil {
				continue
			}
			v = float64(s.Latency.P50)
		}
		all = append(all, sample{v, s.Class})
	}
	return all, nil
}

// byVirtioUser measures with DPDK's driver.
func (o options) byVirtioUser(w work, t turn, socket string, back *dpdk.Process) ([]sample, error) {
	mode := "txonly"
	if w.toGuest || w.kind == idle {
		mode = "rxonly"
	}
	form := dpdk.Form{Packed: t.packed(), InOrder: true, Mergeable: true}
	guest, err := dpdk.Testpmd(dpdk.Options{
		CPU: guestCPU, Vdevs: []string{form.VirtioUser(socket)}, Mode: mode, Frame: w.size, Scatter: w.size > dpdk.MbufRoom,
	})
	if err != nil {
		return nil, err
	}
	defer guest.Stop()
	// The receiving end goes first. vhostd needs no telling.
	first, second := back, guest
	if mode == "rxonly" {
		first, second = guest, back
	}
	first.Say("start")
	time.Sleep(300 * time.Millisecond)
	second.Say("start")
	time.Sleep(time.Second)
	if w.kind == idle {
		return o.sampleIdle(back)
	}
	return o.sampleRate(w, guest, back)
}

// tries is how many seconds are measured at most, to have as many good ones as are wanted.
func (o options) tries() int { return 2 * o.seconds }

// sampleRate asks the guest once a second how many frames it has moved, until enough seconds were good: one placement class before and
// after, and nothing else on the processors. It gives up after twice as many.
func (o options) sampleRate(w work, guest, back *dpdk.Process) (all []sample, err error) {
	threads := func() (t [2]map[int]placement.Thread) {
		return [2]map[int]placement.Thread{placement.Threads(guest.PID()), placement.Threads(back.PID())}
	}
	for tries := 0; tries < o.tries() && len(all) < o.seconds; tries++ {
		class, _ := placement.Between(backCPU, guestCPU)
		before := threads()
		from, err := guest.Stats(0)
		if err != nil {
			return nil, err
		}
		time.Sleep(time.Second)
		to, err := guest.Stats(0)
		if err != nil {
			return nil, err
		}
		now := threads()
		waited := placement.Waited(before[0], now[0]) + placement.Waited(before[1], now[1])
		after, _ := placement.Between(backCPU, guestCPU)
		if waited >= placement.MaxWaited || class != after {
			continue
		}
		n := to.Sent - from.Sent
		if w.toGuest {
			n = to.Received - from.Received
		}
		all = append(all, sample{float64(n) / to.At.Sub(from.At).Seconds(), class})
	}
	return all, nil
}

// sampleIdle watches a back-end that has nothing to do. Where it does so makes no difference.
func (o options) sampleIdle(back *dpdk.Process) (all []sample, err error) {
	time.Sleep(time.Second) // what began before has come to its end
	for range o.seconds {
		before, at := placement.Threads(back.PID()), time.Now()
		time.Sleep(time.Second)
		ran := placement.Ran(before, placement.Threads(back.PID()))
		all = append(all, sample{float64(ran) / float64(time.Since(at)), placement.Unknown})
	}
	return all, nil
}
