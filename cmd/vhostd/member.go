package main

import (
	"context"
	"errors"
	"log/slog"
	"sync"

	"github.com/vhostd/vhostd/internal/config"
	"github.com/vhostd/vhostd/netdev"
)

// member is a port of a fleet, or why it is not there.
type member struct {
	port   *port // nil: it could not be opened
	cancel context.CancelFunc
	done   chan struct{} // closed when the port is
	closed error         // after done

	mu    sync.Mutex
	conf  config.Port // as it was opened, or changed since
	cause error       // why the port is not there
}

// openPort opens a port, on a network of its own or at a switch.
func (f *fleet) openPort(conf config.Port, s settled) part {
	if conf.Switch != "" {
		s.open = func() (netdev.Device, error) {
			sw, err := f.switchOf(conf.Switch)
			if err != nil {
				return nil, err
			}
			return sw.AddPort(s.rules)
		}
	}
	return f.startMember(conf, s, f.log.With("port", conf.Name))
}

// startMember opens a port and serves it from the time on that the process is confined, until it is stopped or fails.
func (f *fleet) startMember(conf config.Port, s settled, log *slog.Logger) *member {
	m := &member{conf: conf, done: make(chan struct{})}
	var ctx context.Context
	ctx, m.cancel = context.WithCancel(f.ctx)
	s.left = f.tidier.left
	p, err := openPort(s.settings, s.open, log)
	if err == nil {
		if err = f.room(p.pairs()); err != nil {
			err = errors.Join(err, p.close())
		}
	}
	if err != nil {
		m.cancel() // another one takes its place without stopping it
		m.fail(err)
		close(m.done)
		return m
	}
	m.port = p
	go m.serve(ctx, f.confined)
	return m
}

func (m *member) serve(ctx context.Context, ready <-chan struct{}) {
	defer close(m.done)
	defer m.cancel()
	select {
	case <-ready:
	case <-ctx.Done():
	}
	err := m.port.be.Serve(ctx, m.port.src)
	m.closed = m.port.close()
	if err != nil {
		m.port.log.Error("the port has ended", "error", err)
		m.fail(errors.Join(err, m.closed))
	}
}

func (m *member) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cause = err
}

func (m *member) configured() config.Port {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.conf
}

func (m *member) err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cause
}

func (m *member) standsIn(c *config.Config, name string) { c.Ports[name] = m.configured() }

func (m *member) stop() error {
	m.cancel()
	<-m.done
	if m.err() != nil {
		return nil // which was told when it happened
	}
	return m.closed
}

func (m *member) change(f *fleet, u *understood, name string) error {
	conf, s := u.Ports[name], u.ports[name]
	undo := func() error { return nil }
	if conf.Switch != "" {
		sw, err := f.switchOf(conf.Switch)
		if err != nil {
			return err
		}
		if err := sw.Update(s.rules); err != nil {
			return err
		}
		was := portRules(name, s.queues, s.mtu, m.configured().Rules)
		undo = func() error { return sw.Update(was) }
	}
	if !conf.Client { // then the socket is the VMM's
		if err := ownSocket(s.settings); err != nil {
			return errors.Join(f.cannotOwn(err, s), undo())
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.conf = conf
	return nil
}
