//go:build linux

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/vring"
)

// put makes the next frame available, n bytes long with its number in it.
func (g *guest) put(n int) error {
	b, err := g.send.add(g.send.hdr + n)
	if err != nil {
		return err
	}
	clear(b[:g.send.hdr])
	f := b[g.send.hdr:]
	copy(f, g.to[:])
	copy(f[6:], g.mac[:])
	copy(f[12:], "\x88\xb5")
	binary.BigEndian.PutUint64(f[14:], uint64(g.frame))
	g.frame++
	return nil
}

// settle waits until the device has returned every frame that was sent.
func (g *guest) settle() error {
	for until := time.Now().Add(stuck); ; {
		for g.send.reap() != nil {
		}
		if g.send.driver.Out() == 0 {
			return g.send.driver.Err()
		}
		if err := g.send.wait(until); err != nil {
			return fmt.Errorf("%d frames are out: %w", g.send.driver.Out(), err)
		}
	}
}

// take receives the frame that is due; it waits for it.
func (g *guest) take() error {
	for until := time.Now().Add(stuck); ; {
		b := g.recv.reap()
		if b == nil {
			if err := g.recv.wait(until); err != nil {
				return fmt.Errorf("frame %d: %w", g.want, err)
			}
			continue
		}
		if n := int(binary.BigEndian.Uint64(b[g.recv.hdr+14:])); n != g.want {
			return fmt.Errorf("frame %d came, and not %d", n, g.want)
		}
		g.want++
		return g.recv.post()
	}
}

// echo sends n frames of size bytes to a port that returns them, and takes them back in order.
func (g *guest) echo(n, size int) error {
	for range n {
		if err := g.put(size); err != nil {
			return err
		}
	}
	g.send.flush()
	for range n {
		if err := g.take(); err != nil {
			return err
		}
	}
	return g.settle()
}

// flood sends as fast as it goes, and takes what comes to its peer unseen, until stop. It never sleeps.
func (g *guest) flood(stop <-chan struct{}) (sent int, err error) {
	for {
		select {
		case <-stop:
			return sent, nil
		default:
		}
		for {
			if err := g.put(60); errors.Is(err, vring.ErrFull) {
				break
			} else if err != nil {
				return sent, err
			}
			sent++
		}
		g.send.flush()
		for g.send.reap() != nil {
		}
		to := g.peer.recv
		for to.reap() != nil {
		}
		if err := errors.Join(to.post(), g.send.driver.Err(), to.driver.Err()); err != nil {
			return sent, err
		}
	}
}

// urgent gives the goroutine a thread of its own, at real-time priority where that is allowed: it runs as soon as it is woken. The thread ends with the goroutine.
func urgent() {
	runtime.LockOSThread()
	_ = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0)
}

// trickle sends a frame every so often and waits for it to be used and to come to its peer. It returns how long the transmitq's used element took
// each time, and how long the whole way: the wake-ups of this thread are in both.
func (g *guest) trickle(every time.Duration, stop <-chan struct{}) (queued, back []time.Duration, err error) {
	urgent()
	next := time.NewTicker(every)
	defer next.Stop()
	for {
		select {
		case <-stop:
			return queued, back, nil
		case <-next.C:
		}
		from := time.Now()
		if err := g.put(60); err != nil {
			return queued, back, err
		}
		g.send.flush()
		if err := g.settle(); err != nil {
			return queued, back, err
		}
		queued = append(queued, time.Since(from))
		if err := g.peer.take(); err != nil {
			return queued, back, err
		}
		back = append(back, time.Since(from))
	}
}

// quantile is that of a list, which it sorts.
func quantile(d []time.Duration, q float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	return d[min(int(float64(len(d))*q), len(d)-1)]
}

// introduce has the switch learn the guest's address, with a frame to all.
func (g *guest) introduce() error {
	to := g.to
	g.to = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	if err := g.put(60); err != nil {
		return err
	}
	g.frame--
	g.send.flush()
	g.to = to
	return g.settle()
}

// forget takes all frames that have come, unseen.
func (g *guest) forget() error {
	for g.recv.reap() != nil {
	}
	return g.recv.post()
}
