package backend_test

import (
	"encoding/binary"
	"math"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/vhostuser"
	"github.com/vhostd/vhostd/virtio"
)

func TestF14Order(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	kick, num, addr, base, enable := 0, 1, 2, 3, 4
	steps := []func() error{
		func() error { return e.FE.SetVringKick(1, e.Queues[1].Kick.FD()) },
		func() error { return e.FE.SetVringNum(1, 256) },
		func() error { return e.FE.SetVringAddr(e.Queues[1].Addr()) },
		func() error { return e.FE.SetVringBase(1, uint32(e.Queues[1].Base)) },
		func() error { return e.FE.SetVringEnable(1, true) },
	}
	for _, order := range [][]int{
		{kick}, {addr}, {base}, {enable}, {kick, addr, num, base}, {kick, num, base, addr}, {addr, num, kick}, {num, kick, enable},
	} {
		for _, negotiated := range []bool{false, true} { // without acks the first step that is refused ends the session
			e.Hangup()
			e.Dial() // no memory
			if negotiated {
				e.Negotiate()
			}
			for _, s := range order {
				_ = steps[s]() // refused or not: nothing may come of it
			}
			_, err := e.FE.GetFeatures()
			if negotiated && err != nil {
				t.Fatalf("order %v: the session ended: %v", order, err)
			}
			if st := e.be.Stats(); st.Queues[0].Started || st.Queues[1].Started {
				t.Errorf("order %v, negotiated %v: a ring started", order, negotiated)
			}
			for i := range uint32(2) {
				if _, err2 := e.FE.GetVringBase(i); err == nil && err2 != nil {
					t.Fatalf("order %v: GET_VRING_BASE %d: %v", order, i, err2)
				}
			}
			n.goesOn(t)
			e.Reconnect()
			e.works(t)
		}
	}
}

func TestF14BaseOfUntouchedRing(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := vhosttest.New(t, serve(t, newDevice(t, 1)), vhosttest.Options{})
	e.Dial()
	for i := range uint32(2) {
		if base, err := e.FE.GetVringBase(i); err != nil || base != 0 {
			t.Errorf("GET_VRING_BASE of a ring that was never there: %d, %v", base, err)
		}
	}
	n.goesOn(t)
}

func TestF15Features(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	for name, f := range map[string]func() error{
		"not offered":           func() error { e.Stop(); return e.FE.SetFeatures(uint64(e.Features | virtio.FAccessPlatform)) },
		"changed while it runs": func() error { return e.FE.SetFeatures(uint64(e.Features &^ virtio.FNetMrgRxbuf)) },
		"protocol, not offered": func() error { return e.FE.SetProtocolFeatures(e.Protocol | vhostuser.ProtocolInflightShmFD) },
		"in-band notifications": func() error { return e.FE.SetProtocolFeatures(vhostuser.ProtocolInbandNotify) },
	} {
		t.Log(name)
		if err := f(); err == nil {
			t.Error("it was taken")
		}
		e.closed(t)
		n.goesOn(t)
	}
	if err := e.FE.SetFeatures(uint64(e.Features)); err != nil { // as QEMU does for every queue pair
		t.Error(err)
	}
}

// A front-end that asks and never reads the answers.
func TestF19ReplyNotRead(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	ask := header(vhostuser.ReqGetFeatures, vhostuser.FlagVersion, 0)
	for {
		if err := e.FE.SendRaw(slices.Repeat(ask, 100), nil); err != nil {
			break // the back-end has hung up, or this end has: it waited as long
		}
	}
	vhosttest.Eventually(t, "the session's end", func() bool { return e.be.Stats().FrontEndErrors == 1 })
	n.goesOn(t)
	e.Reconnect()
	e.works(t)
}

func TestF20SecondOwner(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	refused(t, e, "SET_OWNER", e.FE.SetOwner())
	e.works(t)
	n.goesOn(t)
}

func TestF20SecondConnection(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	path := filepath.Join(t.TempDir(), "vhost.sock")
	l, err := vhostuser.Listen(path, vhostuser.ListenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	d := newDevice(t, 1)
	b := serve(t, d)
	done := make(chan error, 1)
	go func() { done <- b.Serve(t.Context(), l) }()
	e := &end{Guest: vhosttest.Start(t, nil, vhosttest.Options{Path: path}), dev: d, be: b}
	e.works(t)
	second, err := vhostuser.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := second.GetFeatures(); err == nil {
		t.Error("a second connection is served")
	}
	second.Close()
	e.works(t)
	n.goesOn(t)
	e.Reconnect() // the first one's place is free again
	e.works(t)
	e.Hangup()
	l.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Somebody who connects and says nothing does not keep the guest out.
func TestF20SilentConnection(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	path := filepath.Join(vhosttest.ShortDir(t), "vhost.sock")
	const grace = 50 * time.Millisecond
	l, err := vhostuser.Listen(path, vhostuser.ListenOptions{Conn: vhostuser.ConnOptions{PartialTimeout: grace}})
	if err != nil {
		t.Fatal(err)
	}
	d := newDevice(t, 1)
	b := serve(t, d)
	done := make(chan error, 1)
	go func() { done <- b.Serve(t.Context(), l) }()
	silent, err := vhostuser.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	vhosttest.Eventually(t, "the silent session", func() bool { return b.Stats().Connected })
	time.Sleep(2 * grace)
	e := &end{Guest: vhosttest.Start(t, nil, vhosttest.Options{Path: path}), dev: d, be: b}
	e.works(t)
	if st := b.Stats(); st.FrontEndErrors != 1 || st.Sessions != 2 {
		t.Errorf("%d front-end errors, %d sessions; want 1 and 2", st.FrontEndErrors, st.Sessions)
	}
	n.goesOn(t)
	e.Hangup()
	l.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestF21Enable(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	for _, v := range []uint32{2, 256, math.MaxUint32} {
		e.raw(t, append(header(vhostuser.ReqSetVringEnable, vhostuser.FlagVersion|vhostuser.FlagNeedReply, 8), u32s(1, v)...))
		m, err := e.FE.Receive()
		if err != nil || binary.NativeEndian.Uint64(m.Payload) == 0 {
			t.Fatalf("enable %d: %+v, %v; want a refusal", v, m, err)
		}
	}
	e.works(t)
	e.Hangup()
	e.Dial()
	if err := e.FE.SetVringEnable(1, false); err != nil { // without ack, as REPLY_ACK was not accepted yet
		t.Error(err)
	}
	if _, err := e.FE.GetFeatures(); err != nil {
		t.Errorf("after SET_VRING_ENABLE 0 before SET_FEATURES: %v", err)
	}
	e.Reconnect()
	e.works(t)
	n.goesOn(t)
}

// Connections that end at any point of a message cost nothing: each is a session, which takes all that it had with it, and the next is served.
func TestF24ConnectionStorm(t *testing.T) {
	vhosttest.NoLeaks(t)
	n := newNeighbour(t)
	e := attack(t, vhosttest.Options{})
	whole := append(header(vhostuser.ReqSetVringNum, vhostuser.FlagVersion, 8), u32s(0, 256)...)
	const storm = 500
	var first [3]int
	before := e.be.Stats()
	for i := range storm {
		e.Hangup()
		e.Dial()
		if cut := i % len(whole); cut > 0 {
			if err := e.FE.SendRaw(whole[:cut], nil); err != nil {
				t.Fatal(err)
			}
			continue
		}
		e.Barrier()
		if i == 0 {
			first = resources(t)
		}
		vhosttest.Eventually(t, "no more descriptors, mappings and goroutines than the first session had", func() bool { return !grown(first, resources(t)) })
		if got := e.be.Stats().Sessions - before.Sessions; got != uint64(i+1) {
			t.Fatalf("%d sessions of %d connections", got, i+1)
		}
		n.goesOn(t)
	}
	e.Reconnect()
	e.works(t)
	after := e.be.Stats()
	if got := after.Sessions - before.Sessions; got != storm+1 {
		t.Errorf("%d sessions of %d connections", got, storm+1)
	}
	if got, want := after.FrontEndErrors-before.FrontEndErrors, uint64(storm-storm/len(whole)); got != want {
		t.Errorf("%d front-end errors, %d connections ended within a message", got, want)
	}
	n.goesOn(t)
}
