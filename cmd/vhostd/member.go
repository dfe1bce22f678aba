package main

import (
	"context"
	"errors"
	"log/slog"
	"sync"

	"github.com/vhostd/vhostd/internal/config"
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

// startMember opens a port and serves it, until it is stopped or fails.
func startMember(ctx context.Context, conf config.Port, s settled, log *slog.Logger) *member {
	m := &member{conf: conf, done: make(chan struct{})}
	ctx, m.cancel = context.WithCancel(ctx)
	p, err := openPort(s.settings, s.open, log)
	if err != nil {
		m.fail(err)
		close(m.done)
		return m
	}
	m.port = p
	go m.serve(ctx)
	return m
}

func (m *member) serve(ctx context.Context) {
	defer close(m.done)
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

// err tells why the port is not there; nil: it is.
func (m *member) err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cause
}

// stop ends the port.
func (m *member) stop() error {
	m.cancel()
	<-m.done
	if m.err() != nil {
		return nil // which was told when it happened
	}
	return m.closed
}

// change gives the port what can be changed while it goes on.
func (m *member) change(conf config.Port, s settings) error {
	if err := ownSocket(s); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.conf = conf
	return nil
}
