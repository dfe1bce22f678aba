//go:build linux

package soak

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vhostd/vhostd/guestmem"
	"github.com/vhostd/vhostd/internal/control"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/virtio"
)

// streams numbers the streams of all rounds.
var streams atomic.Uint32

// gate keeps guests from their rings while a front-end is away.
type gate struct{ mu sync.RWMutex }

func (g *gate) through(f func() error) error {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return f()
}

// round is the life of the guests of a link, from their start to their end.
type round struct {
	tally
	l       *link
	r       *rand.Rand
	lasts   time.Duration
	options [2]vhosttest.Options
	large   bool
	abrupt  bool // guests hang up with frames under way
	kill    bool // a front-end of its own process, killed
	did     []string
	before  uint64 // frames refused
}

// optional are features that drivers do without.
var optional = []virtio.Features{
	virtio.FNetMrgRxbuf, virtio.FIndirectDesc, virtio.FEventIdx, virtio.FInOrder, virtio.FNetCsum, virtio.FNetGuestCsum, virtio.FNetGuestTSO4, virtio.FNetHostTSO4,
}

// depend are the features that a driver must have accepted for another one (virtio-v1.2 §5.1.3.1).
var depend = []struct{ lost, with virtio.Features }{
	{virtio.FNetCsum, virtio.FNetHostTSO4 | virtio.FNetHostTSO6 | virtio.FNetHostUSO | virtio.FNetHostUFO | virtio.FNetHostECN},
	{virtio.FNetHostTSO4, virtio.FNetHostECN},
	{virtio.FNetGuestCsum, virtio.FNetGuestTSO4 | virtio.FNetGuestTSO6 | virtio.FNetGuestUSO4 | virtio.FNetGuestUSO6 | virtio.FNetGuestUFO | virtio.FNetGuestECN},
	{virtio.FNetGuestTSO4, virtio.FNetGuestECN},
}

func newRound(l *link, r *rand.Rand, left time.Duration) *round {
	rd := &round{l: l, r: r, large: r.IntN(2) == 0, abrupt: r.IntN(2) == 0, kill: l.echo && r.IntN(4) == 0}
	rd.rounds = 1
	rd.lasts = min(500*time.Millisecond+time.Duration(r.IntN(2500))*time.Millisecond, max(left, 300*time.Millisecond))
	for i := range rd.options {
		rd.options[i] = rd.guest()
	}
	return rd
}

// guest makes a guest by chance.
func (rd *round) guest() vhosttest.Options {
	r := rd.r
	o := vhosttest.Options{
		Packed: r.IntN(2) == 0, QueueSize: 64 << r.IntN(4), MemSlots: r.IntN(2) == 0, Direct: r.IntN(4) == 0, Polled: r.IntN(8) == 0, AtZero: r.IntN(2) == 0,
	}
	for _, f := range optional {
		if r.IntN(4) == 0 {
			o.Without |= f
		}
	}
	for _, d := range depend {
		if o.Without&d.lost != 0 {
			o.Without |= d.with
		}
	}
	if rd.large {
		o.QueueSize, o.SendSize = min(o.QueueSize, 256), headers+maxPayload+virtio.NetHdrSize
	}
	if o.Without&virtio.FNetMrgRxbuf != 0 && o.Without&virtio.FNetGuestTSO4 == 0 {
		o.RecvSize, o.QueueSize = virtio.MaxFrame+virtio.NetHdrSize, 64 // any segment has to fit in one buffer
	}
	return o
}

func (rd *round) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%v, large %v, abrupt %v, kill %v", rd.lasts.Round(time.Millisecond), rd.large, rd.abrupt, rd.kill)
	for _, o := range rd.options {
		fmt.Fprintf(&b, "; packed %v, %d descriptors, without %v", o.Packed, o.QueueSize, o.Without)
	}
	fmt.Fprintf(&b, "; %s", strings.Join(rd.did, ", "))
	return b.String()
}

func (rd *round) play(t *testing.T) {
	if rd.kill {
		rd.killed(t)
		return
	}
	rd.before = rd.l.refused(t)
	var guests []*vhosttest.Guest
	for i, d := range rd.l.daemons {
		o := rd.options[i]
		o.Path = d.socket
		guests = append(guests, vhosttest.Start(t, nil, o))
	}
	if rd.l.traffic != nil {
		rd.l.traffic(t, rd, guests[0])
	} else {
		rd.exchange(t, guests)
	}
	if rd.abrupt {
		for _, g := range guests {
			g.Hangup()
		}
	}
}

// exchange has guests send to each other, and one to itself where the network returns all that it gets.
func (rd *round) exchange(t *testing.T, guests []*vhosttest.Guest) {
	gates := make([]gate, len(guests))
	stop, errs := make(chan struct{}), make(chan error)
	var all []*stream
	for i, from := range guests {
		to := (i + 1) % len(guests)
		s := &stream{id: streams.Add(1), end: byte(i), begin: time.Now(), partial: from.Features.Has(virtio.FNetCsum), large: rd.large && from.Features.Has(virtio.FNetHostTSO4)}
		all = append(all, s)
		sent := make(chan struct{})
		r := rand.New(rand.NewPCG(rd.r.Uint64(), 0))
		layout := []vhosttest.Layout{vhosttest.Flat, vhosttest.HeaderApart, vhosttest.Crumbs}[rd.r.IntN(3)]
		go func() {
			defer close(sent)
			errs <- s.send(from, &gates[i], layout, r, stop)
		}()
		go func() { errs <- s.receive(guests[to], &gates[to], sent) }()
	}
	end := sync.OnceFunc(func() {
		close(stop)
		for range 2 * len(all) {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
	})
	defer end() // before the guests, where disturb has failed
	rd.disturb(t, guests, gates)
	end()
	for _, s := range all {
		rd.frames, rd.bytes, rd.lost = rd.frames+s.frames, rd.bytes+s.expected.Load(), rd.lost+s.lost
	}
	if rd.lost > 0 && rd.reconnects == 0 {
		rd.report(t, all)
	}
}

// report tells of frames that were lost although no front-end went away. Where the kernel is on the way its queues may run over, and say so.
func (rd *round) report(t *testing.T, all []*stream) {
	rd.quietly = rd.lost
	refused, gaps, logf := rd.l.refused(t)-rd.before, uint64(0), t.Logf
	for _, s := range all {
		gaps += s.missing
	}
	if rd.l.echo || gaps > refused {
		logf = t.Errorf
	}
	logf("%d bytes, %d frames at least, were lost and nobody had reconnected; %d frames count as refused: %s", rd.lost, gaps, refused, rd)
	for i, s := range all {
		logf("from guest %d: of %d bytes, %s", i, s.sent, strings.Join(s.gaps, "; "))
	}
	for _, d := range rd.l.daemons {
		t.Logf("%s: %s", d.net, d.ask(t))
	}
}

// disturb does what front-ends do to guests that work, now and then, for as long as the round lasts.
func (rd *round) disturb(t *testing.T, guests []*vhosttest.Guest, gates []gate) {
	for end := time.Now().Add(rd.lasts); ; {
		left := time.Until(end)
		if left <= 0 {
			return
		}
		time.Sleep(min(left, time.Duration(50+rd.r.IntN(500))*time.Millisecond))
		i := rd.r.IntN(len(guests))
		g, what := guests[i], ""
		switch rd.r.IntN(6) {
		case 0:
			q := g.Queues[rd.r.IntN(2)]
			q.Stop()
			q.Start()
			rd.restarts++
			what = fmt.Sprintf("queue %d of guest %d restarts", q.Index, i)
		case 1:
			func() {
				gates[i].mu.Lock()
				defer gates[i].mu.Unlock()
				g.Reconnect()
			}()
			rd.reconnects++
			what = fmt.Sprintf("guest %d reconnects", i)
		case 2:
			rd.plug(t, g)
			rd.memory++
			what = fmt.Sprintf("memory of guest %d comes and goes", i)
		case 3:
			rd.l.daemons[i].ask(t)
			what = "stats"
		default:
			continue
		}
		rd.did = append(rd.did, what)
	}
}

// plug gives a guest more memory and takes it away again.
func (rd *round) plug(t *testing.T, g *vhosttest.Guest) {
	extra := vhosttest.NewRegion(t, vhosttest.RegionSpec{GPA: guestmem.GPA(1) << 40, Size: 2 << 20})
	defer extra.Close()
	if err := g.FE.AddMemReg(extra.MemoryRegion, extra.FD); err != nil {
		t.Fatalf("ADD_MEM_REG: %v", err)
	}
	if rd.r.IntN(2) == 0 {
		time.Sleep(10 * time.Millisecond)
	}
	if err := g.FE.RemMemReg(extra.MemoryRegion); err != nil {
		t.Fatalf("REM_MEM_REG: %v", err)
	}
}

// killed has another process play the guest, and kills it.
func (rd *round) killed(t *testing.T) {
	ring := "split"
	if rd.options[0].Packed {
		ring = "packed"
	}
	cmd := exec.Command(program, "bench", "--socket-path", rd.l.daemons[0].socket, "--direction", "echo", "--verify", "--window", "32", "--frame", "64,900,1514",
		"--ring", ring, "--duration", "1h", "--warm-up", "0s")
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(rd.lasts)
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != -1 {
		t.Errorf("the front-end was to be killed, and ended with %v: %s", err, out.String())
	}
	rd.kills++
	rd.did = append(rd.did, "the front-end is killed")
}

// ask asks a daemon about itself.
func (d *daemonOf) ask(t testing.TB) (answer json.RawMessage) {
	ctx, cancel := context.WithTimeout(context.Background(), vhosttest.Patience)
	defer cancel()
	c, err := control.Dial(ctx, d.control)
	if err != nil {
		t.Error(err)
		return nil
	}
	defer c.Close()
	if err := c.Call(ctx, "stats", nil, &answer); err != nil {
		t.Error(err)
	}
	return answer
}
