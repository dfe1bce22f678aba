package main

import (
	"errors"
	"io/fs"
	"log/slog"

	"github.com/vhostd/vhostd/backend"
	"github.com/vhostd/vhostd/netdev"
)

// port is the network card of one guest: its device, what serves it, and where front-ends come from.
type port struct {
	dev    netdev.Device
	be     *backend.Backend
	src    source
	became bool // vhostd has become another user than made the socket
	report func() report
	log    *slog.Logger
}

// openPort opens all three, or nothing. open is of parseDevice.
func openPort(s settings, open opener, log *slog.Logger) (*port, error) {
	dev, err := open()
	if err != nil {
		return nil, err
	}
	p := &port{dev: dev, became: s.become != nil, log: log}
	if err := p.serveDevice(s); err != nil {
		return nil, errors.Join(err, closeDevice(dev, log))
	}
	return p, nil
}

func (p *port) serveDevice(s settings) (err error) {
	p.be, err = backend.New(backend.Options{
		Device: p.dev, MAC: s.mac, MTU: s.mtu, Log: p.log, Poll: s.poll, PairWorkers: s.workers == "pair", MaxPairs: s.queues, Disable: s.disable,
		Left: s.left,
	})
	if err != nil {
		return err
	}
	if p.src, err = openSource(s, p.log); err != nil {
		return err
	}
	p.report = reporter(p.be, p.dev, s, p.src.path)
	return nil
}

// pairs is how many queue pairs a front-end can start.
func (p *port) pairs() int { return p.be.Stats().Device.Pairs }

// close closes what openPort has opened. Nobody is served any more.
func (p *port) close() error {
	err := p.src.Close()
	if p.became && errors.Is(err, fs.ErrPermission) {
		p.log.Warn("the socket stays behind, in a directory of somebody else's; the next vhostd replaces it", "error", err)
		err = nil
	}
	return errors.Join(err, closeDevice(p.dev, p.log))
}

// closeDevice closes a device. Frames that the kernel still holds are no failure: their pages are the kernel's to keep until they have left, whether this
// process lives or not.
func closeDevice(dev netdev.Device, log *slog.Logger) error {
	err := dev.Close()
	var held *netdev.HeldError
	if errors.As(err, &held) {
		log.Warn("ending with frames in the kernel, which will leave all the same", "frames", held.Frames, "waited", held.Waited)
		return nil
	}
	return err
}
