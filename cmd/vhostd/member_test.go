package main

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"

	"github.com/vhostd/vhostd/internal/config"
	"github.com/vhostd/vhostd/internal/vhosttest"
	"github.com/vhostd/vhostd/netdev"
)

// counting is a context that knows how many wait for its end.
type counting struct {
	context.Context
	done chan struct{}
	n    atomic.Int32
}

func (c *counting) Done() <-chan struct{} { return c.done }

func (c *counting) AfterFunc(func()) (stop func() bool) {
	c.n.Add(1)
	return func() bool { return c.n.Add(-1) >= 0 }
}

// TestReloadBeforeBegin: whoever is quick to ask a daemon that starts has nothing opened that begin does not know of, be it that begin fails.
func TestReloadBeforeBegin(t *testing.T) {
	m := &many{dir: vhosttest.ShortDir(t)}
	m.write(t, "[port.a]\n")
	f := newFleet(t.Context(), m.file(), slog.New(slog.DiscardHandler), new(slog.LevelVar))
	if r, err := f.reload(false); !errors.Is(err, errStarting) {
		t.Errorf("%+v, %v", r, err)
	}
	if exists(m.socket("a")) {
		t.Error("a port was opened")
	}
	if err := f.end(); err != nil {
		t.Error(err)
	}
}

// TestFailedPortsLeaveNothing: a port that cannot be opened is tried at each reload, for as long as the daemon lives.
func TestFailedPortsLeaveNothing(t *testing.T) {
	ctx := &counting{Context: t.Context(), done: make(chan struct{})}
	f := newFleet(ctx, "", slog.New(slog.DiscardHandler), new(slog.LevelVar))
	no := errors.New("there is no such interface")
	m := f.startMember(config.Port{}, settled{open: func() (netdev.Device, error) { return nil, no }}, f.log)
	if n := ctx.n.Load(); n != 0 || !errors.Is(m.err(), no) {
		t.Errorf("%d wait for the daemon's end; the port's error is %v", n, m.err())
	}
}
