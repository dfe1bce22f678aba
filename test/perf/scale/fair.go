//go:build linux

package main

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"
)

// fairness is what a guest that floods does to others.
type fairness struct {
	Network   string        `json:"network"`
	Trickling int           `json:"trickling"`
	Flooded   float64       `json:"flooded_per_second"` // frames
	Sent      int           `json:"sent"`               // by all that trickle; each came back
	Alone     quantiles     `json:"alone"`              // the same without the one that floods
	Queued    quantiles     `json:"queued"`             // until the used element
	There     quantiles     `json:"there"`              // until the frame is there
	Took      time.Duration `json:"took_ns"`
}

type quantiles struct {
	Median time.Duration `json:"median_ns"`
	P99    time.Duration `json:"p99_ns"`
	Max    time.Duration `json:"max_ns"`
}

func quantilesOf(d []time.Duration) quantiles {
	return quantiles{quantile(d, 0.5), quantile(d, 0.99), quantile(d, 1)}
}

// every is the time between two frames of a guest that trickles.
const every = 10 * time.Millisecond

// fairly has n guests trickle, first alone and then beside one that floods.
func fairly(c config, network string, n int, took time.Duration) (_ *fairness, err error) {
	ends := 1 // of a conversation
	if network == switched {
		ends = 2
	}
	d, err := startDaemon(c.vhostd, network, ends*(n+1))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2 * (n + 2))) // no thread waits for another to leave it one of Go's processors
	guests, _, err := connect(d, ends*(n+1), c.size)
	if err != nil {
		return nil, err
	}
	all := guests
	defer func() {
		for _, g := range all {
			g.close()
		}
	}()
	if network == switched {
		if err := acquaint(guests); err != nil {
			return nil, err
		}
	}
	guests = guests[:n+1] // who send
	f := &fairness{Network: "a port each", Trickling: n, Took: took}
	if network == switched {
		f.Network = "a switch"
	}
	alone, _, err := trickling(guests[1:], took/4)
	if err != nil {
		return nil, fmt.Errorf("alone: %w", err)
	}
	f.Alone = quantilesOf(alone)
	stop, flooded := make(chan struct{}), make(chan error, 1)
	sent, from := 0, time.Now()
	go func() {
		var err error
		sent, err = guests[0].flood(stop)
		flooded <- err
	}()
	queued, back, err := trickling(guests[1:], took)
	close(stop)
	if err := errors.Join(err, <-flooded); err != nil {
		return nil, err
	}
	f.Flooded = float64(sent) / time.Since(from).Seconds()
	f.Sent, f.Queued, f.There = len(back), quantilesOf(queued), quantilesOf(back)
	return f, nil
}

// acquaint makes the guests of the second half the peers of those in the first, and has the switch learn all of them.
func acquaint(guests []*guest) error {
	n := len(guests) / 2
	for i, g := range guests {
		if err := g.introduce(); err != nil {
			return err
		}
		if i < n {
			g.peer, g.to = guests[i+n], guests[i+n].mac
		}
	}
	for _, g := range guests {
		if err := g.forget(); err != nil {
			return err
		}
	}
	return nil
}

// trickling has guests trickle for a while; a frame that does not come back is an error.
func trickling(guests []*guest, took time.Duration) (queued, back []time.Duration, err error) {
	var mu sync.Mutex
	var all sync.WaitGroup
	var errs []error
	stop := make(chan struct{})
	for _, g := range guests {
		all.Go(func() {
			q, b, err := g.trickle(every, stop)
			mu.Lock()
			defer mu.Unlock()
			queued, back, errs = append(queued, q...), append(back, b...), append(errs, err)
		})
	}
	time.Sleep(took)
	close(stop)
	all.Wait()
	return queued, back, errors.Join(errs...)
}
